"""Merged weights → score: any network and any function of it, such as accuracy or a loss with its gradient."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lcsc_opt.base.errors import MetricError, ObjectiveError
from lcsc_opt.base.records import (
    HELD_OUT,
    SEARCH,
    SELECTION,
    STANDARD_ERROR,
    Candidate,
    Coefficients,
    Cost,
    Evaluation,
    Noise,
)
from lcsc_opt.base.reproducibility import derive_seed
from lcsc_opt.objective.contract import Mergeable, Objective, stop_if_told
from lcsc_opt.trajectory import Trajectory

if TYPE_CHECKING:
    from lcsc_opt.objective.command import CommandScore
    from lcsc_opt.objective.network_score import NetworkScore

_SEED_BITS = 31  # what every generator takes

Floats = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Draw:
    """Which data a score is to be measured on.

    Attributes:
        group: ``search``, ``selection`` (which of the best trials is the answer) or ``held-out`` (the answer's report).
        seed: of all that is random; another one for each group, and for each evaluation that wants fresh data.
        size: how many items to take; ``None`` leaves it to the score.
    """

    group: str
    seed: int
    size: int | None

    @classmethod
    def of(cls, noise: Noise, size: int | None) -> Draw:
        """The draw of a group of noise; those of an optimizer's own are of the search."""
        group = noise.group if noise.group in (SELECTION.group, HELD_OUT.group) else SEARCH.group
        return cls(group, derive_seed(noise.seed, noise.group, bits=_SEED_BITS), size)


class WeightScore(Objective):
    """The score of the merged weights, and its gradient in the coefficients if it has a graph.

    Args:
        trajectory: K checkpoints.
        scorer: weights → metrics.
        maximize: whether a higher score is better; the loss is then the score times −1.
        size: how many items an evaluation of a search takes; ``None`` leaves it to the score.
    """

    trajectory: Mergeable

    def __init__(
        self,
        trajectory: Mergeable,
        scorer: NetworkScore | CommandScore,
        *,
        maximize: bool = False,
        size: int | None = None,
    ) -> None:
        self.trajectory, self.scorer = trajectory, scorer
        self._sign, self._size, self._placed = -1.0 if maximize else 1.0, size, False

    @property
    def steps(self) -> tuple[int, ...]:
        """``[K]`` training steps of the trajectory."""
        return self.trajectory.steps

    @property
    def images_per_evaluation(self) -> int:
        """How many items an evaluation of a search takes, images or others; 0 if the score decides that."""
        return self._size or 0

    def why_no_gradient(self) -> str | None:
        """Why gradients are unavailable, or ``None``; this calls the score once, with a few items."""
        return self.scorer.why_no_gradient(self.trajectory.varying, self._size)

    def why_nothing_held_out(self) -> str | None:
        """A score without a draw is measured on the same data by searches and by reports."""
        return None if self.scorer.takes_draw else "the score takes no draw, so its data are always those of the search"

    def evaluate(self, candidate: Candidate, *, gradient: bool = False) -> Evaluation:
        """Merge, and call the score.

        Raises:
            MetricError: the score is not finite.
            ObjectiveError: it is no number; a gradient is wanted and it has no graph.
            Exception: whatever the score raises.
        """
        start, product = time.perf_counter(), None
        draw = Draw.of(candidate.noise, candidate.images or self._size)
        weights = self._merged(candidate.coefficients)
        merged = time.perf_counter()
        stop_if_told()
        metrics, sums = self.scorer.measure(weights, draw, self.trajectory.varying if gradient else None)
        if gradient:
            product = self._sign * self.trajectory.project(sums)
            if product.ndim > candidate.coefficients.ndim:
                product = product.sum(axis=0)
        end = time.perf_counter()
        cost = Cost(draw.size or 0, 0, end - start, merge_seconds=merged - start, metric_seconds=end - merged)
        return Evaluation(self._sign * next(iter(metrics.values())), metrics, cost, gradient=product)

    def statistics(self, coefficients: Coefficients) -> Mapping[str, Tensor]:
        """Statistics of batch normalization, if they are estimated again."""
        return self.scorer.statistics(self._merged(coefficients))

    def describe(self) -> dict[str, Any]:
        """The trajectory's hash, the score, its direction and how many items it takes."""
        described = {"maximize": self._sign < 0, "size": self._size, **self.scorer.describe()}
        return {"trajectory": self.trajectory.sha256, **described}

    def _merged(self, coefficients: Coefficients) -> dict[str, Tensor]:
        if not self._placed and isinstance(self.trajectory, Trajectory):
            self.trajectory = self.trajectory.on(self.scorer.device)
        self._placed = True
        return self.trajectory.merge(coefficients)


def metrics_of(returned: Any, name: str) -> dict[str, float]:
    """What a score returned, as metrics; the first one is the score.

    The mean of single outcomes is followed by its standard error, under its name and ``_stderr``.

    Args:
        returned: a number, single outcomes ``[n]``, or a mapping of names to either.
        name: of the score where it is no mapping.

    Raises:
        ObjectiveError: something is no number.
        MetricError: something is not finite.
    """
    entries = returned if isinstance(returned, Mapping) and returned else {name: returned}
    metrics: dict[str, float] = {}
    for entry, value in entries.items():
        key = f"{name}.loss" if entry == "loss" else str(entry)  # the loss is what is minimized
        found = outcomes(key, value)
        metrics[key] = float(found.mean())
        if len(found) > 1:
            metrics[f"{key}{STANDARD_ERROR}"] = float(found.std(ddof=1) / np.sqrt(len(found)))
    if broken := [f"{key} is {value}" for key, value in metrics.items() if not np.isfinite(value)]:
        raise MetricError(f"the score is not finite: {broken[0]}")
    return metrics


def outcomes(name: str, value: Any) -> Floats:
    """A number or single outcomes as ``[n]`` float64, n ≥ 1.

    Raises:
        ObjectiveError: it is neither.
    """
    plain = value.detach().cpu().double().numpy() if isinstance(value, Tensor) else value
    try:
        array = np.asarray(plain)
    except ValueError:  # lists of several lengths
        array = np.empty(0, dtype=object)
    if array.dtype.kind not in "biuf":
        raise ObjectiveError(f"score: {name} is {str(plain)[:80]!r}; expected a number, or single outcomes")
    if array.ndim > 1 or not array.size:
        raise ObjectiveError(f"score: {name} has the shape {list(array.shape)}; expected outcomes in one dimension")
    return np.atleast_1d(array)
