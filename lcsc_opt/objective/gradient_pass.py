"""The gradient of the loss in the coefficients, in two passes over the images of a candidate."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lcsc_opt.base.errors import MetricError
from lcsc_opt.base.records import Candidate, Coefficients, Cost
from lcsc_opt.metrics.image_metrics import ImageMetrics
from lcsc_opt.objective.batch_sizes import BatchSizes
from lcsc_opt.objective.contract import stop_if_told
from lcsc_opt.objective.gradient import WeightGradient, in_coefficients
from lcsc_opt.objective.image_stages import FeatureGradients, ImageStages
from lcsc_opt.objective.stopwatch import Stopwatch
from lcsc_opt.sampling import DifferentiableSampler
from lcsc_opt.trajectory import Trajectory


class GradientPass:
    """Both passes over the images ``[first, last)`` of one candidate, and the graph between them.

    The first pass samples all images without a graph; their features give the gradient of the loss in the features. The
    second pass samples the images again with a graph, batch by batch, and leads that gradient back to the weights.
    Memory does not depend on the number of images. The last batch of the first pass already has a graph
    (:meth:`sample_last_batch`), which is kept, so the second pass begins with that batch and need not sample it again.

    While it is open, the model's weights require gradients and must not be replaced.

    Args:
        stages: the model with the candidate's merged weights, and the metrics.
        trajectory: what the weights were merged from.
        candidate: whose gradient is computed.
        first: the index of the first image.
        last: the index after the last image.
    """

    def __init__(
        self,
        stages: ImageStages,
        trajectory: Trajectory,
        candidate: Candidate,
        first: int,
        last: int,
    ) -> None:
        assert isinstance(stages.sampler, DifferentiableSampler)  # why_no_gradient has refused all others
        self._stages = stages
        self._sampler: DifferentiableSampler = stages.sampler
        self._trajectory = trajectory
        self._candidate = candidate
        self._first = first
        self._last = last
        self._last_batch: Tensor | None = None
        self._total = WeightGradient(self._sampler.weights.differentiable(trajectory.varying))

    def close(self) -> None:
        """Free the graph, and make the weights ordinary tensors again."""
        self._last_batch = None
        self._total.close()

    def is_of(self, candidate: Candidate, first: int, last: int) -> bool:
        """Whether this is the pass over these images of this candidate, or of a copy from another process."""
        if (first, last, candidate.noise) != (self._first, self._last, self._candidate.noise):
            return False
        # to the last bit, as the kept graph is only of these
        return candidate.coefficients.tobytes() == self._candidate.coefficients.tobytes()

    @torch.inference_mode(mode=False)  # whatever mode the caller is in
    @torch.enable_grad()
    def sample_last_batch(self, metrics: ImageMetrics, start: int, watch: Stopwatch) -> None:
        """Finish the first pass: sample the images ``[start, last)``, and keep their graph."""
        noise = self._candidate.noise
        with watch.timing("sample"):
            images = self._stages.sample_with_graph(noise, start, self._last)
        with watch.timing("features"):
            # without the graph: the second pass computes features again, once the loss's gradient in them is known
            self._stages.add_features(metrics, images.detach(), noise, start)
        self._last_batch = images

    @torch.inference_mode(mode=False)
    @torch.enable_grad()
    def product(
        self, feature_gradients: FeatureGradients, batch_sizes: BatchSizes, watch: Stopwatch
    ) -> tuple[Coefficients, Cost]:
        """Make the second pass, beginning with the last batch, whose graph may be there already.

        Args:
            feature_gradients: extractor's name → the derivative of the loss in the features of all these images.
            batch_sizes: the number of images with a graph at once.
            watch: measures the stages.

        Returns:
            What these images contribute to the gradient in the coefficients, and the cost.

        Raises:
            MetricError: the gradient is not finite.
        """
        stop_if_told()
        if self._last_batch is not None:
            start_of_last = self._last - len(self._last_batch)
            sampled_again = start_of_last - self._first
            self._add(self._last_batch, start_of_last, feature_gradients, watch)
        else:
            # in the same order as with a kept batch, so that sums have the same rounding
            start_of_last = batch_sizes.start_of_last(self._first, self._last)
            sampled_again = self._last - self._first
            self._sample_and_add(start_of_last, self._last, feature_gradients, watch)
        for start, stop in batch_sizes.batches_with_graph(self._first, start_of_last):
            self._sample_and_add(start, stop, feature_gradients, watch)
        with watch.timing("merge"):
            product = in_coefficients(self._total.sums, self._trajectory, self._candidate.coefficients)
        if not np.isfinite(product).all():
            raise MetricError("the gradient is not finite")

        images = self._last - self._first
        forward_calls = sampled_again * self._sampler.nfe + images * self._sampler.recomputed
        backward_calls = 2 * images * self._sampler.nfe  # one costs about two forward calls
        return product, watch.cost(model_calls=forward_calls + backward_calls)

    def _sample_and_add(
        self,
        start: int,
        stop: int,
        feature_gradients: FeatureGradients,
        watch: Stopwatch,
    ) -> None:
        """Sample the images ``[start, stop)`` with a graph, and :meth:`_add` them. The graph is freed afterwards."""
        stop_if_told()
        with watch.timing("sample"):
            images = self._stages.sample_with_graph(self._candidate.noise, start, stop)
        self._add(images, start, feature_gradients, watch)

    def _add(
        self,
        images: Tensor,
        start: int,
        feature_gradients: FeatureGradients,
        watch: Stopwatch,
    ) -> None:
        """Lead the gradient in the features of ``images``, the first of which is ``start``, back to the weights.

        Row 0 of ``feature_gradients`` belongs to image ``self._first``.
        """
        first_row = start - self._first
        rows = {
            name: torch.from_numpy(gradient[first_row : first_row + len(images)])
            for name, gradient in feature_gradients.items()
        }
        with watch.timing("features"):
            image_gradient = self._stages.image_gradient(images, self._candidate.noise, start, rows)
        with watch.timing("sample"):
            self._total.add(images, image_gradient)
