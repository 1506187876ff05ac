"""The tables of the paper: their rows and claims.

A setting is given by positions in the lists of varied values, so that a quicker run may have other values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

Where = Mapping[str, int]
"""Short name of a varied key → position of its value in the list."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row of a table.

    Attributes:
        label: its name in the paper.
        where: its point in the study file.
        fid: FID of LCSC in the paper; ``None`` if the paper has none.
        ema: FID of EMA* in the paper, else of EMA; ``None`` if the paper has neither.
        judges: metric → (value of LCSC, value of EMA* or EMA) in the paper.
        speed_up: how many times faster than the standard training it is in the paper, its search included.
    """

    label: str
    where: Where
    fid: float | None
    ema: float | None = None
    judges: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    speed_up: float | None = None


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim of the paper: one loss is below another one.

    Attributes:
        text: the claim in short.
        better: the point whose loss is below.
        paper: the ratio of both in the paper.
        worse: the point whose loss is above; ``None`` stands for EMA* of the first point.
        cross_check: both losses are in the second network's features.
        of_ema: the loss above is that of EMA* at ``worse``.
        judge: a metric that is compared with EMA*'s in place of the loss; higher is better.
    """

    text: str
    better: Where
    paper: float
    worse: Where | None = None
    cross_check: bool = False
    of_ema: bool = False
    judge: str | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """One study file, and the part of the paper that it tests.

    Attributes:
        study: the file's name in ``studies/paper``.
        title: the tables and figures of the paper.
        note: what differs here.
        settings: its rows; without any, its searches are only in the table of judges, and not in a quick run.
        claims: the paper's claims about them.
        beside: another file of the same points; its searches replace those that this one lacks.
        seeds: how many seeds decide.
        standard: the point whose training speed-ups are relative to; ``None`` if there are none.
        fewest: a varied key; the page says its lowest value at which a search is as good as EMA* at its first value.
    """

    study: str
    title: str
    note: str
    settings: tuple[Setting, ...]
    claims: tuple[Claim, ...]
    beside: str | None = None
    seeds: int = 5
    standard: Where | None = None
    fewest: str | None = None
