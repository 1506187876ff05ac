"""A study as plain data: how it stands, without its trials."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lcsc_opt.base.records import Coefficients, Yardstick
from lcsc_opt.base.study_spec import EMA_GRID
from lcsc_opt.coefficients.profiles import average_name
from lcsc_opt.database.measurement import Measurement
from lcsc_opt.database.names import BASELINES, EMA, label
from lcsc_opt.database.report import Report
from lcsc_opt.database.summary import Summary

Floats = npt.NDArray[np.float64]


def sign_of(attributes: Mapping[str, Any]) -> int:
    """−1 for the attributes of a study or an experiment whose loss is a maximized score times −1; else 1."""
    if attributes.get("maximize") is True:
        return -1
    return 1


def as_known(loss: float | None, sign: int) -> float | None:
    """A loss as a user knows it, by the sign of its study (:func:`sign_of`)."""
    if loss is None:
        return None
    return sign * loss


@dataclasses.dataclass(frozen=True, eq=False)
class Standing:
    """How a study stands at one moment, without its trials.

    Attributes:
        study_id: the database's key.
        study: ``experiment/optimizer/seed``.
        experiment: the first part of it.
        optimizer: its name.
        seed: of the study.
        summary: of its trials.
        steps: ``[K]`` training steps of the checkpoints.
        checkpoint_names: ``[K]`` what people call them; empty before the experiment has said so.
        layer_groups: layer → how many rows of coefficients it has, in their order; empty where all have the
            same.
        settings: its specification, as nested mappings.
        budget: ``{"evaluations": n}``, ``{"images": n}``, or ``{"seconds": n}``.
        workers: how many evaluate at once.
        ended: whether the search has spent its budget, or had nothing more to ask.
        how: how it ended, in words; ``None`` before.
        yardstick: what losses are relative to; ``None`` if they are absolute.
        changes: of the user's code since the experiment began, each with its time.
        report: of the experiment; ``None`` before there is one.
        average: what the answer of a baseline is called, as ``average of the last 10``; ``None`` of other studies.
        sign: −1 where the loss is a score times −1, which is maximized; else 1.
        forgotten: the numbers of the trials that were forgotten, and asked again; they count nowhere.
        holds_out: whether the experiment's objective can report.
        holder: the machine whose process runs it now; ``None`` if none does.
    """

    study_id: int
    study: str
    experiment: str
    optimizer: str
    seed: int
    _: dataclasses.KW_ONLY
    summary: Summary = dataclasses.field(default_factory=Summary)
    steps: tuple[int, ...] = ()
    checkpoint_names: Sequence[str] = ()
    layer_groups: Mapping[str, int] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    budget: Mapping[str, int] = dataclasses.field(default_factory=dict)
    workers: int = 1
    ended: bool = False
    how: str | None = None
    yardstick: Yardstick | None = None
    changes: Sequence[Any] = ()
    report: Report | None = None
    average: str | None = None
    sign: int = 1
    forgotten: frozenset[int] = frozenset()
    holds_out: bool = True
    holder: str | None = None

    def average_name(self, coefficients: Coefficients) -> str | None:
        """What people call coefficients that a baseline asks; ``None`` for others."""
        return average_name(coefficients, self.steps, self.checkpoint_names)

    @property
    def metric(self) -> str:
        """Which metric the loss is; where it is none, ``score`` if one is maximized, else ``loss``."""
        if self.yardstick is not None and self.yardstick.kept is not None:  # it may have a penalty, and is no metric
            return "loss"
        if self.sign < 0 and self.summary.metric == "loss":
            return "score"
        return self.summary.metric

    @property
    def label(self) -> str:
        """The optimizer's name in tables; that of a baseline says which average is its best."""
        name = label(self.optimizer)
        if self.average is None:
            return name
        return f"{name} ({self.average})"

    @property
    def state(self) -> str:
        """``running``, ``finished``, ``interrupted`` or ``empty``."""
        if self.ended:
            return "finished"
        if self.running:
            return "running"
        if self.summary.trials:
            return "interrupted"
        return "empty"

    @property
    def budget_unit(self) -> str:
        """The unit of the budget: ``evaluations``, ``images`` or ``seconds``; the first if no budget is stored."""
        return next(iter(self.budget), "evaluations")

    @property
    def budget_total(self) -> int | None:
        """The budget in its unit; ``None`` if none is stored."""
        return self.budget.get(self.budget_unit)

    @property
    def budget_spent(self) -> int:
        """How much of the budget was spent.

        A failed trial takes the images that it was asked for, else as many as a complete trial. Seconds are those of
        evaluations.
        """
        if self.budget_unit == "images":
            return self.summary.charged_images
        if self.budget_unit == "seconds":
            return round(self.seconds)
        return self.summary.evaluations

    @property
    def found(self) -> Measurement | None:
        """The model that the report chose of this search, measured on held-out noise.

        ``None`` before there is a report, and for a search without a result.
        """
        if self.report is None:
            return None
        return self.report.of_study(self.study)

    @property
    def reported(self) -> float | None:
        """The loss of :attr:`found` on held-out noise, as a user knows it; ``None`` before it was measured."""
        if self.found is None:
            return None
        return as_known(self.found.loss, self.sign)

    @property
    def seconds(self) -> float:
        """How many seconds the search spent in evaluations, in whole milliseconds: it is printed as JSON."""
        return round(self.summary.cost.seconds, 3)

    @property
    def running(self) -> bool:
        """Whether somebody runs it now."""
        return self.holder is not None

    @property
    def searched(self) -> float | None:
        """The lowest loss of the search that compares, as a user knows it: of a maximized score the highest score."""
        return as_known(self.summary.loss, self.sign)

    @property
    def searched_of_shown(self) -> float | None:
        """What a row shows beside :attr:`reported`: what the search measured of the same model.

        ``None`` if it is a mean that the search did not measure. While there is no report, :attr:`searched`.
        """
        if self.found is None:
            return self.searched
        return as_known(self.found.model.searched, self.sign)

    @property
    def chosen(self) -> int | None:
        """The number of the trial that was chosen on other noise, ``None`` if it is a mean; else that of the best."""
        if self.found is not None:
            return self.found.model.trial
        return self.summary.best


def ema_grid(studies: Sequence[Standing]) -> Standing | None:
    """The grid whose best is EMA*, the best plain average of the checkpoints: an EMA, a uniform one, or the last one.

    By the report; before there is one, the grid that has ended with the lowest searched loss.
    """
    ended = [study for study in studies if study.optimizer == EMA_GRID and study.ended]
    grids = [grid for grid in ended if grid.summary.loss is not None]
    for grid in grids:
        if grid.found is not None and grid.found.model.name == EMA:
            return grid
    return min(grids, key=lambda grid: grid.summary.loss or 0.0, default=None)  # 0.0 is for mypy: each has a loss


def best_searched(studies: Sequence[Standing]) -> Standing | None:
    """The study of the lowest searched loss, of equal ones a plain average's; ``None`` without a loss."""
    with_loss = [study for study in studies if study.summary.loss is not None]
    return min(with_loss, key=lambda study: (study.summary.loss or 0.0, study.optimizer not in BASELINES), default=None)
