"""The metrics of one extractor's features: ``update`` with batches, ``merge`` with other parts, ``compute``.

FID, KID, the Inception Score, precision and recall are the numbers that torch-fidelity computes. FID is the distance of
``frechet.py``. The Inception Score is computed by torch-fidelity. KID uses its subsets, precision and recall its
neighbourhoods, but here they run where the networks do (``distances.py``), and distances inside the reference are
computed only once. The other metrics are those of ``distances.py``.
"""

from __future__ import annotations

from collections.abc import Set

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics.distances import (
    EACH,
    FIDELITY,
    NEIGHBOURHOOD,
    authentic_share,
    coverage,
    kernel_distance,
    kernel_distance_and_gradient,
    nearer_share,
    radii,
)
from lcsc_opt.metrics.extractors.base import full_precision
from lcsc_opt.metrics.extractors.published import torch_fidelity_module
from lcsc_opt.metrics.moments import Array, Moments
from lcsc_opt.metrics.names import OF_REFERENCE_FEATURES, Formula
from lcsc_opt.metrics.reference.reference import Reference

Features = npt.NDArray[np.float32] | npt.NDArray[np.float64]
FeatureState = tuple[Moments, Features | None, Features | None]
"""What some images gave: moments, features ``[n, D]``, logits ``[n, classes]``; what is not needed is missing. It can
be pickled, and merges with that of other images."""

# torch-fidelity's defaults, which published numbers are computed with.
SCORE_SPLITS = 10
SUBSET_SEED = 2020


class FeatureMetrics:
    """The metrics of one set of samples against the reference, each computed when it is asked for.

    If FID alone is wanted, and there are at least D images, features are reduced to their moments on their device,
    batch by batch. Else they are kept: the gradient and metrics of single images need them, and fewer than D of them
    take less memory than a scatter.

    Args:
        reference: the real images.
        formulas: what will be computed; all by default.
        total: how many images there will be in all parts; unknown by default.
        gradient: whether a gradient will be computed.
        device: where distances between features are computed.
    """

    def __init__(
        self,
        reference: Reference,
        formulas: Set[Formula] = OF_REFERENCE_FEATURES,
        *,
        total: int = 0,
        gradient: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.reference, self._device = reference, device
        few = total < reference.extractor.dimension
        self._keeps = gradient or few or bool(formulas & OF_REFERENCE_FEATURES)
        self._moments = Moments()
        self._rows: list[Features] = []
        self._logits: list[Features] = []
        self._values: dict[Formula, float] = {}
        self._gradients: dict[Formula, Array] = {}

    def update(self, features: Tensor | None, logits: Tensor | None = None) -> None:
        """Add features ``[B, D]`` and logits ``[B, classes]``, whichever are needed."""
        if logits is not None:
            self._logits.append(full_precision(logits.detach()).cpu().numpy())
        if features is not None and self._keeps:
            self._rows.append(full_precision(features.detach()).cpu().numpy())
        elif features is not None:
            self._moments.update(full_precision(features.detach()))

    @property
    def state(self) -> FeatureState:
        """Everything that was added so far."""
        return self._moments, _joined(self._rows), _joined(self._logits)

    def merge(self, state: FeatureState) -> None:
        """Add the images of another part, in the order of all images."""
        moments, rows, logits = state
        self._moments = self._moments.merge(moments)
        self._rows += [] if rows is None else [rows]
        self._logits += [] if logits is None else [logits]

    def compute(self, formula: Formula) -> float:
        """The value of one metric.

        Raises:
            MetricError: the features do not allow it.
        """
        if formula in ("precision", "recall") and formula not in self._values:
            samples, real = self._samples_and_real(NEIGHBOURHOOD + 1)
            real_radii = self.reference.radii(self._device)
            both = coverage(samples, real, radii(samples), real_radii)
            self._values["precision"], self._values["recall"] = both
        if formula not in self._values:
            self._values[formula] = self._computed(formula)
        return self._values[formula]

    def _computed(self, formula: Formula) -> float:
        match formula:
            case "fid":
                return self._fid(self.reference)
            case "fid_held_out":
                return self._fid(self.reference.unseen)
            case "kid":
                return kernel_distance(*self._samples_and_real(2), seed=SUBSET_SEED)
            case "is":
                return self._inception_score()
            case "nearer_train":
                samples, real = self._samples_and_real(1)
                return nearer_share(samples, real, self.reference.unseen.features_on(self._device).to(samples.dtype))
            case "authenticity":
                apart = self.reference.once("nearest", self._device, lambda features: radii(features, 1))
                return authentic_share(*self._samples_and_real(1), apart)
            case _:
                with torch.no_grad():
                    return float(FIDELITY[formula](self._samples(), self.reference))

    @torch.inference_mode(mode=False)
    def gradient(self, formula: Formula) -> Array:
        """``[N, D]`` float64: the derivative in the features of a metric that is in ``DIFFERENTIABLE``.

        Call it before :meth:`compute`: then both share what they have in common.

        Raises:
            MetricError: the features do not allow it.
        """
        if formula in self._gradients:
            return self._gradients[formula]
        match formula:
            case "fid":
                value, gradient = self.reference.frechet.distance_and_gradient(self._kept())
            case "kid":
                value, tensor = kernel_distance_and_gradient(*self._samples_and_real(2), seed=SUBSET_SEED)
                gradient = tensor.cpu().numpy()
            case _:
                with torch.enable_grad():
                    leaf = self._samples().detach().clone().requires_grad_()
                    found = FIDELITY[formula](leaf, self.reference)
                    [tensor] = torch.autograd.grad(found, leaf)
                value, gradient = float(found.detach()), tensor.double().cpu().numpy()
        self._values[formula], self._gradients[formula] = value, gradient
        return gradient

    def deviation(self, formula: Formula) -> float:
        """The standard deviation, over samples, of a metric that is a mean over samples."""
        with torch.no_grad():
            return float(EACH[formula](self._samples(), self.reference).double().std())

    def _fid(self, reference: Reference) -> float:
        """Squared Fréchet distance (Heusel et al. 2017)."""
        if self._moments.count:
            return reference.frechet.distance_from_moments(self._moments)
        return reference.frechet.distance_from_features(self._kept())

    def _inception_score(self) -> float:
        """Mean over ten parts of the exponential of the mutual information (Salimans et al. 2016)."""
        logits = _joined(self._logits)
        if logits is None or len(logits) < SCORE_SPLITS:
            raise MetricError(f"the Inception Score needs the logits of at least {SCORE_SPLITS} images")
        metric = torch_fidelity_module("metric_isc")
        result = metric.isc_features_to_metric(torch.from_numpy(logits), SCORE_SPLITS, True, SUBSET_SEED)
        return float(result[metric.KEY_METRIC_ISC_MEAN])

    def _samples(self) -> Tensor:
        if len(self.reference.known_features) <= NEIGHBOURHOOD:
            raise MetricError(f"this metric needs more than {NEIGHBOURHOOD} reference images")
        return torch.from_numpy(self._kept()).to(self._device)

    def _samples_and_real(self, fewest: int) -> tuple[Tensor, Tensor]:
        """Both sets of features where distances are computed, in the type of the samples."""
        samples = torch.from_numpy(self._kept()).to(self._device)
        if len(samples) < fewest:
            raise MetricError(f"this metric needs at least {fewest} images, got {len(samples)}")
        return samples, self.reference.features_on(self._device).to(samples.dtype)

    def _kept(self) -> Features:
        self._rows = [] if not self._rows else [_joined(self._rows)]  # type: ignore[list-item]
        if not self._rows:
            raise MetricError("no features were kept; make this with gradient=True")
        return self._rows[0]


def _joined(arrays: list[Features]) -> Features | None:
    if len(arrays) < 2:
        return arrays[0] if arrays else None
    return np.concatenate(arrays, dtype=np.result_type(*arrays))
