"""The objective that scores merged weights by a function: accuracy, perplexity, a loss with its gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lcsc_opt.base.records import HELD_OUT, SELECTION, Candidate, Coefficients, Evaluation
from lcsc_opt.coefficients.profiles import is_saved
from lcsc_opt.objective.contract import OF_MACHINE, Objective, Role, Samples, stop_if_told
from lcsc_opt.objective.gradient import in_coefficients
from lcsc_opt.objective.network_scorer import NetworkScorer
from lcsc_opt.objective.scorer import Draw
from lcsc_opt.objective.stopwatch import Stopwatch
from lcsc_opt.trajectory import Trajectory
from lcsc_opt.trajectory.trajectory import describe_renaming


class WeightScore(Objective):
    """The score of the merged weights, and its gradient in the coefficients if the scorer has one.

    Args:
        trajectory: K checkpoints.
        scorer: weights → metrics.
        maximize: whether a higher score is better; the loss is then the score times −1.
        size: the number of items of an evaluation of a search; ``None`` leaves it to the score.
    """

    trajectory: Trajectory

    def __init__(
        self,
        trajectory: Trajectory,
        scorer: NetworkScorer,
        *,
        maximize: bool = False,
        size: int | None = None,
    ) -> None:
        self.trajectory = trajectory
        self.scorer = scorer
        self.maximizes = maximize
        self._sign = -1.0 if maximize else 1.0
        self._size = size
        self.samples = Samples(per_evaluation=size or 0, per_report=size)  # reports have as many items as a search
        self._on_device = False  # the first merge moves the trajectory there
        self.is_random = scorer.repeats > 1  # nobody averages repetitions of a score that gives the same number

    def why_no_gradient(self) -> str | None:
        """Why gradients are unavailable, or ``None``. This may call the score once, with few items."""
        return self.scorer.why_no_gradient(self.trajectory.varying, self._size)

    def why_nothing_held_out(self) -> str | None:
        """A score without a draw measures searches and reports on the same data."""
        if self.scorer.has_data_of_reports:
            return None
        return "the score has no argument draw, so its data are always those of the search"

    def evaluate(self, candidate: Candidate) -> Evaluation:
        """Merge, and call the score.

        Raises:
            MetricError: the score is not finite.
            ObjectiveError: it is no number; or a gradient is asked for and it has no graph.
            Exception: whatever the score raises.
        """
        watch = Stopwatch()
        draw = Draw.of(candidate.noise, candidate.images or self._size)  # items count as images
        with watch.timing("merge"):
            weights = self._merged(candidate.coefficients)
        stop_if_told()
        varying = None
        if candidate.gradient:
            varying = self.trajectory.varying
        coefficient_gradient = None
        with watch.timing("metric"):
            measured, weight_gradients = self.scorer.measure(
                weights, draw, varying, as_saved=is_saved(candidate.coefficients)
            )
            if candidate.gradient:
                gradient = in_coefficients(weight_gradients, self.trajectory, candidate.coefficients)
                coefficient_gradient = self._sign * gradient
        name, score = next(iter(measured.metrics.items()))  # the first metric is the score
        without_groups: dict[str, list[float]] = {}
        if candidate.noise.group in (SELECTION.group, HELD_OUT.group):  # which have errors; searches need none
            without_groups |= measured.without_groups
            if name in without_groups:
                without_groups["loss"] = [self._sign * value for value in without_groups[name]]
        return Evaluation(
            self._sign * score,
            measured.metrics,
            watch.cost(images=draw.size or 0),
            gradient=coefficient_gradient,
            without_groups=without_groups,
        )

    def statistics(self, coefficients: Coefficients) -> Mapping[str, Tensor]:
        """Statistics of batch normalization, if the scorer estimates them again."""
        if is_saved(coefficients):
            return {}
        return self.scorer.statistics(self._merged(coefficients))

    def describe(self) -> dict[str, Any]:
        """The trajectory's hash, the scorer's settings, and the number of items."""
        return {
            "trajectory": self.trajectory.sha256,
            **describe_renaming(self.trajectory),
            "size": self._size,
            **self.scorer.describe(),
        }

    def describe_reports(self) -> dict[str, Any]:
        """The name of the held-out function."""
        return self.scorer.describe_reports()

    def role_of(self, setting: tuple[str, ...]) -> Role:
        """The held-out function and the trainer's average are only for reports; a model's folder is described."""
        if setting == ("model",) and self.scorer.describes_model:
            return "none"
        if setting[0] in ("held_out", "trainer_ema"):
            return "asked"
        return "none" if setting[-1] in OF_MACHINE else super().role_of(setting)

    def _merged(self, coefficients: Coefficients) -> dict[str, Tensor]:
        """The merged weights, on the scorer's device if the trajectory can be merged there."""
        if not self._on_device:
            self.trajectory = self.trajectory.on(self.scorer.device)
        self._on_device = True
        return self.trajectory.merge(coefficients)
