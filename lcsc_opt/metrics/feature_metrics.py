"""The metrics of one extractor's features: ``update`` with batches, ``merge`` with other parts, ``compute``.

FID, KID, the Inception Score, precision and recall are the numbers that torch-fidelity computes. Distances between
images are computed where the networks run, and what concerns the reference alone is computed once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Set

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lcsc_opt.base.errors import MetricError
from lcsc_opt.base.jackknife import FEWEST_IN_A_GROUP, GROUPS
from lcsc_opt.metrics.distances import (
    EACH,
    NEIGHBOURHOOD,
    SUBSET_SEED,
    kernel_distance,
    precise_and_covered,
)
from lcsc_opt.metrics.extrapolation import weighted_subsets
from lcsc_opt.metrics.frechet import Array, Moments
from lcsc_opt.metrics.leave_out import without_each_group
from lcsc_opt.metrics.names import (
    BIASED,
    OF_REFERENCE_FEATURES,
    PLAIN,
    TO_SHRUNK,
    TONES,
    Formula,
    need_real_features,
)
from lcsc_opt.metrics.reference.reference import Reference
from lcsc_opt.metrics.tones import tones

Features = npt.NDArray[np.float32] | npt.NDArray[np.float64]
FeatureState = tuple[Moments, Features | None, Features | None]
"""The state of some images: moments, features ``[n, D]``, logits ``[n, classes]``; moments that are not needed have the
count 0, and the others are ``None``. It can be pickled, and merges with that of further images."""

SCORE_SPLITS = 10  # torch-fidelity's default
MOST_KEPT = 2**29  # numbers: 2 GiB of float32


@dataclasses.dataclass(frozen=True)
class MetricPlan:
    """What will be computed of the images of one evaluation.

    Attributes:
        total: how many images there will be in all parts; 0 if that is not known, and features are kept.
        gradient: whether a gradient will be computed.
        unbiased: whether distances whose expected value depends on the number of images are extrapolated to infinitely
            many (:mod:`~lcsc_opt.metrics.extrapolation`).
        intervals: whether each group will be left out; where the features would take more than 2 GiB, and nothing else
            needs them, :meth:`FeatureMetrics.without_each_group` has no answer.
        device: where distances between features are computed.
    """

    total: int = 0
    gradient: bool = False
    unbiased: bool = False
    intervals: bool = False
    device: torch.device | str = "cpu"


class FeatureMetrics:
    """The metrics of one set of samples against the reference, each computed when it is first needed.

    If only FID is computed, and there are at least D images, features are reduced to their moments on their device,
    batch by batch. Otherwise they are kept: the gradient and metrics of single images need them, and fewer than D of
    them use less memory than a scatter.

    Args:
        reference: the real images.
        plan: what will be computed of the samples.
        formulas: what will be computed; by default all that needs features.
        target: the real images, shrunk; only for the distances of a loss to it.
    """

    def __init__(
        self,
        reference: Reference,
        plan: MetricPlan,
        formulas: Set[Formula] = OF_REFERENCE_FEATURES,
        target: Reference | None = None,
    ) -> None:
        self.reference = reference
        self._target = target
        self._plan = plan
        dimension = reference.extractor.dimension
        fewer_than_features = plan.total < dimension
        needs_rows = plan.gradient or plan.unbiased or fewer_than_features or need_real_features(formulas)
        self._adds_moments = not needs_rows
        self._keeps_rows = needs_rows or (plan.intervals and plan.total * dimension <= MOST_KEPT)
        self._moments = Moments()
        self._rows: list[Features] = []
        self._logits: list[Features] = []
        self._values: dict[Formula, float] = {}
        self._gradients: dict[Formula, Array] = {}

    def update(self, features: Tensor | None, logits: Tensor | None = None) -> None:
        """Add features ``[B, D]`` and logits ``[B, classes]`` of float32 or float64, whichever are needed."""
        if logits is not None:
            self._logits.append(logits.detach().cpu().numpy())
        if features is None:
            return
        if self._keeps_rows:
            self._rows.append(features.detach().cpu().numpy())
        if self._adds_moments:
            self._moments.update(features.detach())

    @property
    def state(self) -> FeatureState:
        """Everything that was added so far."""
        return self._moments, _joined(self._rows), _joined(self._logits)

    def merge(self, state: FeatureState) -> None:
        """Add the images of another part, in the order of all images: groups and subsets are drawn by their index."""
        moments, rows, logits = state
        self._moments = self._moments.merge(moments)
        if rows is not None:
            self._rows.append(rows)
        if logits is not None:
            self._logits.append(logits)

    def compute(self, formula: Formula) -> float:
        """The value of one metric, computed once. Raises MetricError if the features do not allow it."""
        if formula in self._values:
            return self._values[formula]
        if formula in ("precision", "recall"):  # both come from one matrix of distances
            precise, covered = precise_and_covered(self._samples(self._all_rows(), NEIGHBOURHOOD + 1), self.reference)
            self._values["precision"] = float(precise.double().mean())
            self._values["recall"] = float(covered.double().mean())
        else:
            self._values[formula] = self._computed(formula)
        return self._values[formula]

    def _computed(self, formula: Formula) -> float:
        """The value of one metric, without a look at those that are known."""
        if self._plan.unbiased and formula in BIASED:
            self.gradient(formula)  # which computes the value, too
            return self._values[formula]
        plain, real = self._compared(formula)
        match plain:
            case "fid":
                return self._frechet_distance(real)
            case "tones":
                return float(tones(self._samples(self._all_rows()), real))
            case "reward" | "held_out_reward" | "outside":  # the mean of the only feature
                if self._moments.count:
                    return float(self._moments.mean[0])
                return float(self._all_rows()[:, 0].mean(dtype=np.float64))
            case "kid":
                distance, _ = self._kernel_distance(self._all_rows())
                return distance
            case "is":
                return float(np.mean(scores_of_splits(self._all_logits())))
            case _:
                with torch.no_grad():
                    return float(self._distance(formula, self._samples(self._all_rows())))

    def _compared(self, formula: Formula) -> tuple[Formula, Reference]:
        """A distance to the real images that a search sees, and what takes their place: others, or a shrunk target."""
        if formula not in PLAIN:
            return formula, self.reference
        if formula not in TO_SHRUNK.values():
            return PLAIN[formula], self.reference.unseen
        assert self._target is not None  # only a loss of shrunk targets has such a distance
        return PLAIN[formula], self._target

    def _distance(self, formula: Formula, samples: Tensor) -> Tensor:
        """A distance of samples ``[N, D]`` that torch differentiates: tones, or the mean of that of single samples."""
        plain, real = self._compared(formula)
        if plain == TONES:
            return tones(samples, real)
        return EACH[formula](samples, self.reference).mean()

    def without_each_group(self, formula: Formula) -> Array | None:
        """``[2 G]``: a metric without each of ten groups of samples, then without each of ten of real images.

        Of the Inception Score, which has no real images, ``[G]``. ``None`` if there are fewer than 100 samples, or if
        their features were not kept.
        """
        parts = self._logits if formula == "is" else self._rows  # [] if they were not kept
        if sum(map(len, parts)) < GROUPS * FEWEST_IN_A_GROUP:
            return None
        if formula == "is":
            scores = scores_of_splits(self._all_logits())  # the score is their mean, so the splits serve as the groups
            means: Array = (scores.sum() - scores) / (len(scores) - 1)
            return means
        samples = torch.from_numpy(self._all_rows()).to(self._plan.device)
        plain, real = self._compared(formula)
        return without_each_group(plain, samples, real)

    def _frechet_distance(self, reference: Reference) -> float:
        """FID to these real images, from the moments where they were added, else from the features."""
        if self._moments.count:
            return reference.frechet.distance_from_moments(self._moments)
        return reference.frechet.distance_from_features(self._all_rows())

    def _all_logits(self) -> Features:
        """``[N, classes]``. Raises MetricError for fewer images than the Inception Score has parts."""
        logits = _joined(self._logits)
        if logits is None or len(logits) < SCORE_SPLITS:
            raise MetricError(f"the Inception Score needs the logits of at least {SCORE_SPLITS} images")
        return logits

    @torch.inference_mode(mode=False)  # a caller may be in inference mode, where nothing has a graph
    def gradient(self, formula: Formula) -> Array:
        """``[N, D]`` float64: the derivative in the features of a metric that is in ``DIFFERENTIABLE``.

        Call it before :meth:`compute`: then both share what they have in common. Raises MetricError as that does.
        """
        if formula in self._gradients:
            return self._gradients[formula]
        rows = self._all_rows()
        subsets = [(1.0, np.arange(len(rows)))]
        if self._plan.unbiased and formula in BIASED:
            subsets = weighted_subsets(len(rows))
        value = 0.0
        gradient = np.zeros(rows.shape)
        for weight, chosen in subsets:
            value_of_chosen, gradient_of_chosen = self._value_and_gradient(formula, rows[chosen])
            value += weight * value_of_chosen
            gradient[chosen] += weight * gradient_of_chosen
        self._values[formula] = value
        self._gradients[formula] = gradient
        return gradient

    def _value_and_gradient(self, formula: Formula, rows: Features) -> tuple[float, Array]:
        """A metric of the features ``[n, D]``, and its derivative in them."""
        plain, real = self._compared(formula)
        match plain:
            case "fid":
                return real.frechet.distance_and_gradient(rows)
            case "reward":
                return float(rows.mean(dtype=np.float64)), np.full(rows.shape, 1 / len(rows))
            case "kid":
                value, derivative = self._kernel_distance(rows, gradient=True)
                return value, derivative.cpu().numpy()
            case _:
                with torch.enable_grad():
                    leaf = self._samples(rows).clone().requires_grad_()
                    distance = self._distance(formula, leaf)
                    [derivative] = torch.autograd.grad(distance, leaf)
                return float(distance.detach()), derivative.cpu().double().numpy()

    def deviation(self, formula: Formula) -> float:
        """The standard deviation, over samples, of a metric that is a mean over samples: one of ``KEPT``."""
        if formula == "precision":  # whose samples count as 0 or 1
            share = self.compute(formula)
            return math.sqrt(share * (1 - share))
        if formula == "reward":
            return self._deviation_of_feature()
        with torch.no_grad():
            return float(EACH[formula](self._samples(self._all_rows()), self.reference).cpu().double().std())

    def _deviation_of_feature(self) -> float:
        """The standard deviation, over samples, of the only feature."""
        if not self._moments.count:
            return float(self._all_rows()[:, 0].std(dtype=np.float64, ddof=1))
        return math.sqrt(float(self._moments.covariance[0, 0]))

    def _samples(self, rows: Features, fewest: int = 1, fewest_real: int = NEIGHBOURHOOD + 1) -> Tensor:
        """The features ``[n, D]`` on the device where distances are computed, for metrics that compare with real ones.

        Raises MetricError for fewer than ``fewest`` samples, or ``fewest_real`` real images, which by default have
        three neighbours each.
        """
        if len(self.reference.known_features) < fewest_real:
            raise MetricError(f"this metric needs more than {fewest_real - 1} reference images")
        if len(rows) < fewest:
            raise MetricError(f"this metric needs at least {fewest} images, got {len(rows)}")
        return torch.from_numpy(rows).to(self._plan.device)

    def _kernel_distance(self, rows: Features, *, gradient: bool = False) -> tuple[float, Tensor]:
        """KID of the features ``[n, D]``, and its derivative in them, as of :func:`kernel_distance`."""
        samples = self._samples(rows, 2, 2)  # an unbiased estimate compares different images of a set
        real = self.reference.features_on(self._plan.device).to(samples.dtype)
        return kernel_distance(samples, real, gradient=gradient)

    def _all_rows(self) -> Features:
        """``[N, D]``: all kept features, joined once."""
        rows = _joined(self._rows)
        if rows is None:
            raise MetricError("no features were kept; give a MetricPlan that keeps them, with gradient or intervals")
        self._rows = [rows]
        return rows


def scores_of_splits(logits: Features) -> Array:
    """``[10]``: the Inception Score of torch-fidelity's ten parts of ``[N, classes]``; it reports their mean.

    The score is the exponential of the mutual information of images and classes (Salimans et al. 2016). It is computed
    in torch-fidelity's order, so that the last bits agree.
    """
    order = np.random.RandomState(SUBSET_SEED).permutation(len(logits))
    shuffled = torch.from_numpy(logits)[order].double()
    probabilities = shuffled.softmax(dim=1)
    log_probabilities = shuffled.log_softmax(dim=1)
    scores = []
    for split in range(SCORE_SPLITS):
        start = split * len(logits) // SCORE_SPLITS
        stop = (split + 1) * len(logits) // SCORE_SPLITS
        part = probabilities[start:stop]
        marginal = part.mean(dim=0, keepdim=True)
        information = (part * (log_probabilities[start:stop] - marginal.log())).sum(dim=1).mean()
        scores.append(float(information.exp()))
    return np.array(scores)


def _joined(arrays: list[Features]) -> Features | None:
    """The arrays, one after the other; ``None`` without any."""
    if not arrays:
        return None
    if len(arrays) == 1:
        return arrays[0]
    return np.concatenate(arrays, dtype=np.result_type(*arrays))  # as by default, but mypy knows it
