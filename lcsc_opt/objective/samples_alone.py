"""Checkpoints and their sampler without real images and metrics: models can be looked at, and nothing is scored."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lcsc_opt.base.errors import ObjectiveError, raised_as
from lcsc_opt.base.records import Candidate, Coefficients, Evaluation, Noise
from lcsc_opt.coefficients.profiles import is_saved
from lcsc_opt.objective.batch_sizes import BatchSizes
from lcsc_opt.objective.contract import Objective
from lcsc_opt.sampling import Sampler
from lcsc_opt.sampling.batch_norm import BatchNormStatistics
from lcsc_opt.trajectory import Trajectory
from lcsc_opt.trajectory.adapters import merged_or_base


class SamplesAlone(Objective):
    """Merges and samples as an objective over images does; evaluations are refused.

    Args:
        trajectory: K checkpoints.
        sampler: puts merged weights into the model and samples.
        batch_sizes: how many images are sampled at once.
        batch_norm: estimates the statistics of batch normalization again for each model; ``None`` merges them.
        device: where models are merged.
        real_images: some to look at beside samples, ``count -> [count, C, H, W]`` in [-1, 1]; ``None`` where there are
            none.
    """

    trajectory: Trajectory
    sampler: Sampler

    def __init__(
        self,
        trajectory: Trajectory,
        sampler: Sampler,
        *,
        batch_sizes: BatchSizes,
        batch_norm: BatchNormStatistics | None,
        device: torch.device,
        real_images: Callable[[int], Tensor | None] = lambda _count: None,
    ) -> None:
        self.trajectory = trajectory.on(device)
        self.sampler = sampler
        self._batch_sizes = batch_sizes
        self._batch_norm = batch_norm
        self._some_real_images = real_images

    def evaluate(self, candidate: Candidate) -> Evaluation:  # noqa: ARG002 - refused
        """Raise an error.

        Raises:
            ObjectiveError: always.
        """
        raise ObjectiveError("only checkpoints and their sampler were loaded, which give images and no score")

    def describe(self) -> dict[str, Any]:
        """The trajectory's hash, and the sampler."""
        return {"trajectory": self.trajectory.sha256, "sampler": self.sampler.describe()}

    def real_images(self, count: int) -> Tensor | None:
        """Some of those that searches compare with.

        Raises:
            MetricError: they cannot be read.
        """
        return self._some_real_images(count)

    @torch.no_grad()
    def images(self, coefficients: Coefficients, noise: Noise, count: int) -> Tensor:
        """The first ``count`` images of a group of noise as they are saved: ``[count, C, H, W]`` in [-1, 1].

        Coefficients that are all zero are the base model without a LoRA.
        """
        self.sampler.load(merged_or_base(self.trajectory, coefficients))
        if self._batch_norm is not None and not is_saved(coefficients):
            self._batch_norm.estimate()
        with raised_as(ObjectiveError, "sampling"):
            return self._batch_sizes.images(count, functools.partial(self.sampler.sample, noise))
