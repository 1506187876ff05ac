"""What a table of the paper is: its rows, and what is claimed of them.

A setting is named by positions in the lists that a study file varies, so that a quicker run may vary other values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

Where = Mapping[str, int]
"""Short name of a varied key → position of its value in the study file's list."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row of a table.

    Attributes:
        label: what the paper calls it.
        where: which point of the study file it is.
        fid: of LCSC in the paper; ``None`` where it has none.
        ema: of EMA* in the paper, or of EMA where there is no EMA* for this model; ``None`` where there is neither.
        judges: metric → of LCSC and of EMA* (or EMA) in the paper.
        speed_up: how much faster than the standard training it is in the paper, its search counted in.
    """

    label: str
    where: Where
    fid: float | None
    ema: float | None = None
    judges: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    speed_up: float | None = None


@dataclasses.dataclass(frozen=True)
class Claim:
    """Something the paper says: one loss is below another one.

    Attributes:
        text: in short.
        better: the point whose loss is below.
        paper: the ratio of both in the paper.
        worse: the point whose loss is above; ``None`` stands for EMA* of the first point.
        cross_check: both losses are those in the second network's features.
        of_ema: the loss above is that of EMA* at ``worse``.
        judge: the metric, of which higher is better, that is compared with EMA*'s in place of the loss.
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
    """One study file, and what of the paper it asks.

    Attributes:
        study: the file's name in ``studies/paper``.
        title: which tables and figures.
        note: what differs here.
        settings: its rows.
        claims: what is said of them.
        beside: another file of the same points, whose searches stand beside those that this one lacks.
        seeds: how many decide.
        standard: the point whose training speed-ups are told against; ``None`` where none are.
        fewest: a varied key; the lowest of its values is asked for that is as good as EMA* at its first one.
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
