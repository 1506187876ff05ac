"""One set of samples against the reference: every metric by its name.

FID, KID, the Inception Score, precision and recall are the numbers that torch-fidelity computes. FID is the distance of
``frechet.py``. The Inception Score is computed by torch-fidelity. KID uses its subsets, precision and recall its
neighbourhoods, but here they run where the networks do (``distances.py``), and distances inside the reference are
computed only once. The other metrics are those of ``fidelity.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics.distances import (
    NEIGHBOURHOOD,
    authentic_share,
    coverage,
    kernel_distance,
    kernel_distance_and_gradient,
    nearer_share,
    radii,
)
from lcsc_opt.metrics.extractors.weights import torch_fidelity_module
from lcsc_opt.metrics.fidelity import FIDELITY, deviation, distance, distance_and_gradient
from lcsc_opt.metrics.names import Formula
from lcsc_opt.metrics.reference.reference import Reference
from lcsc_opt.metrics.statistics import Array, FeatureStatistics

Features = npt.NDArray[np.float32] | npt.NDArray[np.float64]
Samples = Features | FeatureStatistics

# torch-fidelity's defaults, which published numbers are computed with.
SCORE_SPLITS = 10
SUBSET_SEED = 2020


class Comparison:
    """The metrics of one set of samples, each computed when it is asked for.

    Args:
        samples: features ``[N, D]`` float32 (float64 where the extractor gives that); or their statistics, which are
            enough for FID, but not for a gradient.
        logits: ``[N, classes]`` float32, for the Inception Score.
        reference: the real images, for all other metrics.
        device: where distances between features are computed.
    """

    def __init__(
        self,
        samples: Samples | None,
        logits: Features | None,
        reference: Reference | None,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        self._samples, self._logits, self._reference, self._device = samples, logits, reference, device
        self._computed: dict[Formula, float] = {}
        self._differentiated: dict[Formula, tuple[float, Array]] = {}

    def compute(self, formula: Formula) -> float:
        """The value of one metric.

        Raises:
            MetricError: the features do not allow it.
        """
        if formula in self._differentiated:
            return self._differentiated[formula][0]
        if formula not in self._computed:
            self._computed[formula] = METRICS[formula](self)
        return self._computed[formula]

    def gradient(self, formula: Formula) -> Array:
        """``[N, D]`` float64: the derivative in the features of a metric that is in ``DIFFERENTIATED``.

        Call it before :meth:`compute`: then both share what they have in common.

        Raises:
            MetricError: the features do not allow it.
        """
        if formula not in self._differentiated:
            self._differentiated[formula] = DIFFERENTIATED[formula](self)
        return self._differentiated[formula][1]

    def fid(self) -> float:
        """Squared Fréchet distance to the reference (Heusel et al. 2017)."""
        return self._fid(self._required_reference)

    def fid_held_out(self) -> float:
        """Squared Fréchet distance to the held-out real images."""
        return self._fid(self._required_reference.unseen)

    def nearer_train(self) -> float:
        """The share of samples that are nearer to an image of the reference than to any held-out one.

        For samples that copy nothing this is the reference's share of all real images. Copies raise it.
        """
        samples, real = self._samples_and_real(1, needs="nearer_train needs some")
        other = self._required_reference.unseen.features_on(self._device).to(samples.dtype)
        return nearer_share(samples, real, other)

    def authenticity(self) -> float:
        """The share of samples that are no copies; see :func:`~lcsc_opt.metrics.distances.authentic_share`."""
        samples, real = self._samples_and_real(1, needs="authenticity needs some")
        apart = self._required_reference.once("nearest", self._device, lambda features: radii(features, 1))
        return authentic_share(samples, real, apart)

    def _fid(self, reference: Reference) -> float:
        if isinstance(self._samples, FeatureStatistics):
            return reference.frechet.distance_from_statistics(self._samples)
        return reference.frechet.distance_from_features(self._required_features)

    def fid_and_gradient(self) -> tuple[float, Array]:
        """:meth:`fid`, and its derivative in the features."""
        return self._required_reference.frechet.distance_and_gradient(self._required_features)

    def kid(self) -> float:
        """Mean over subsets of the squared MMD with a cubic kernel (Bińkowski et al. 2018); may be below zero."""
        return kernel_distance(*self._samples_and_real(2, needs="KID needs at least 2"), seed=SUBSET_SEED)

    def kid_and_gradient(self) -> tuple[float, Array]:
        """:meth:`kid`, and its derivative in the features."""
        samples, real = self._samples_and_real(2, needs="KID needs at least 2")
        value, gradient = kernel_distance_and_gradient(samples, real, seed=SUBSET_SEED)
        return value, gradient.cpu().numpy()

    def inception_score(self) -> float:
        """Mean over ten parts of the exponential of the mutual information (Salimans et al. 2016)."""
        if self._logits is None or len(self._logits) < SCORE_SPLITS:
            raise MetricError(f"the Inception Score needs the logits of at least {SCORE_SPLITS} images")
        metric = torch_fidelity_module("metric_isc")
        result = metric.isc_features_to_metric(torch.from_numpy(self._logits), SCORE_SPLITS, True, SUBSET_SEED)
        return float(result[metric.KEY_METRIC_ISC_MEAN])

    def precision(self) -> float:
        """The fraction of samples that lie among the real images."""
        return self._precision_and_recall[0]

    def recall(self) -> float:
        """The fraction of real images that lie among the samples."""
        return self._precision_and_recall[1]

    def distance(self, formula: Formula) -> float:
        """A metric of :data:`FIDELITY`."""
        return distance(formula, self._differentiable_samples(), self._required_reference)

    def distance_and_gradient(self, formula: Formula) -> tuple[float, Array]:
        """:meth:`distance`, and its derivative in the features."""
        value, gradient = distance_and_gradient(formula, self._differentiable_samples(), self._required_reference)
        return value, gradient.cpu().numpy()

    def deviation(self, formula: Formula) -> float:
        """The standard deviation, over samples, of a metric that is a mean over samples."""
        return deviation(formula, self._differentiable_samples(), self._required_reference)

    def _differentiable_samples(self) -> Tensor:
        if len(self._required_reference.features) <= NEIGHBOURHOOD:
            raise MetricError(f"this metric needs more than {NEIGHBOURHOOD} reference images")
        return torch.from_numpy(self._required_features).to(self._device)

    @cached_property
    def _precision_and_recall(self) -> tuple[float, float]:
        samples, real = self._samples_and_real(
            NEIGHBOURHOOD + 1, needs=f"precision and recall need more than {NEIGHBOURHOOD}"
        )
        real_radii = self._required_reference.radii(self._device)
        return coverage(samples, real, radii(samples), real_radii)

    def _samples_and_real(self, count: int, *, needs: str) -> tuple[Tensor, Tensor]:
        """Both sets of features where distances are computed, in the type of the samples."""
        if len(self._required_features) < count:
            raise MetricError(f"{needs} images")
        samples = torch.from_numpy(self._required_features).to(self._device)
        return samples, self._required_reference.features_on(self._device).to(samples.dtype)

    @property
    def _required_features(self) -> Features:
        if self._samples is None:
            raise MetricError("this comparison was made without features")
        if isinstance(self._samples, FeatureStatistics):
            raise MetricError("only the statistics of the features were kept; take them in with gradient=True")
        return self._samples

    @property
    def _required_reference(self) -> Reference:
        if self._reference is None:
            raise MetricError("this comparison was made without a reference")
        return self._reference


def _distance(formula: Formula) -> Callable[[Comparison], float]:
    return lambda comparison: comparison.distance(formula)


def _distance_and_gradient(formula: Formula) -> Callable[[Comparison], tuple[float, Array]]:
    return lambda comparison: comparison.distance_and_gradient(formula)


METRICS: Mapping[Formula, Callable[[Comparison], float]] = {
    "fid": Comparison.fid,
    "kid": Comparison.kid,
    "is": Comparison.inception_score,
    "precision": Comparison.precision,
    "recall": Comparison.recall,
    "authenticity": Comparison.authenticity,
    "fid_held_out": Comparison.fid_held_out,
    "nearer_train": Comparison.nearer_train,
    **{formula: _distance(formula) for formula in FIDELITY},
}
DIFFERENTIATED: Mapping[Formula, Callable[[Comparison], tuple[float, Array]]] = {
    "fid": Comparison.fid_and_gradient,
    "kid": Comparison.kid_and_gradient,
    **{formula: _distance_and_gradient(formula) for formula in FIDELITY},
}
