"""The settings that all objectives over images share: checkpoints in, numbers out, and how the model is run."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from lcsc_opt.base.paths import BuildContext
from lcsc_opt.base.progress import notice
from lcsc_opt.base.settings import Count
from lcsc_opt.checkpoints.finding import Selection, as_patterns
from lcsc_opt.coefficients.profiles import last_alone
from lcsc_opt.metrics import MetricSuite
from lcsc_opt.metrics.from_settings import ReferenceScoreSettings, ScoreSources
from lcsc_opt.objective.batch_sizes import AUTO, BatchSizes, Size, images_at_once
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.merge_sample_score import DEFAULT_IMAGES, MergeSampleScore
from lcsc_opt.objective.samples_alone import SamplesAlone
from lcsc_opt.sampling import ClassLabels, DifferentiableSampler, ImageNoise, Sampler
from lcsc_opt.sampling.batch_norm import BatchNormStatistics
from lcsc_opt.sampling.network import NetworkSettings
from lcsc_opt.trajectory import Trajectory
from lcsc_opt.trajectory.adapters import open_with_base, requests_of_adapters
from lcsc_opt.trajectory.packing import open_request
from lcsc_opt.trajectory.sources import PackRequest

BatchSize = Count | Literal["auto"]
REFERENCE_BATCH_SIZE = 250  # with batch_size: auto; reference images go through the extractor only once


class CheckpointSettings(NetworkSettings):
    """The settings of every objective that merges checkpoints: which ones, and how the network is run.

    Attributes:
        checkpoints: a packed trajectory; or files, globs or a folder of checkpoints, which are packed once.
        select: which of the checkpoints are combined.
        key: which state dict of each file; by default raw weights before their average.
        trainer_ema: the average that the trainer kept itself, for reports: a file, or a key of the last checkpoint. One
            that lies beside the raw weights in the last checkpoint is packed with them, and needs no key.
        steps: the training step of each checkpoint, where names and contents do not tell it.
        stored: how they are packed, as by ``lcsc trajectory pack --stored``: ``exact`` (the default), or rounded to
            ``float16`` or ``bfloat16``.
        strength: of LoRAs, whether combinations have a strength of their own: ``space: {strength: true}`` of a study
            file. Then each folder or glob of ``checkpoints`` is an adapter of its own.
    """

    checkpoints: Annotated[str | list[str], Field(min_length=1)]
    select: Selection = Selection()
    key: str | None = None
    steps: list[int] | None = None
    trainer_ema: str | None = None
    stored: Literal["exact", "float16", "bfloat16"] | None = None
    strength: bool = False

    @property
    def merges_statistics(self) -> bool:
        """Whether the statistics of batch normalization are merged like weights, and not estimated for each merge."""
        return False

    def trajectory(self, context: BuildContext) -> Trajectory:
        """Open the packed trajectory, or pack the checkpoints into the folder beside the database.

        A study that continues opens the checkpoints that it was begun with.

        Raises:
            TrajectoryError: there are no checkpoints that can be merged.
        """
        if self.strength:
            opened = open_with_base(requests_of_adapters(self.pack_request(context)))
        else:
            opened = open_request(self.pack_request(context))
        if self.trainer_ema is not None:
            path = context.path(self.trainer_ema)
            opened.trainer_ema_at = path if path.exists() else self.trainer_ema
        return opened

    def pack_request(self, context: BuildContext) -> PackRequest:
        """Which checkpoints, and how they are packed."""
        return PackRequest(
            patterns=self.checkpoint_paths(context),
            folder=context.files,
            key=self.key,
            selection=self.select,
            steps=self.steps,
            dtype=self.stored,
            study_checkpoints=context.checkpoints,
        )

    def checkpoint_paths(self, context: BuildContext) -> list[Path]:
        """The files, folders and globs of ``checkpoints``."""
        return [context.path(str(pattern)) for pattern in as_patterns(self.checkpoints)]


class ImageObjectiveSettings(CheckpointSettings, ReferenceScoreSettings):
    """The settings of every objective over images; a subclass adds those of its model and sampler.

    Attributes:
        images: the number of images in an evaluation of a search.
        noise_seed: the seed of all sampling noise.
        batch_size: images at once; by default 500 on the CPU, of a pipeline as many as have 2**21 pixels if these are
            fewer (8 of 512 × 512), and ``auto`` on a device: as many as half of its free memory holds, and half as
            many whenever memory runs out.
        gradient_batch_size: images at once in a backward pass, which needs as much memory as training does. The default
            is ``batch_size``; with ``auto`` it follows the memory, too.
        batch_norm: ``estimated`` (the default) passes images through each combination, from which it gets statistics of
            its own; ``merged`` combines the checkpoints' statistics as weights.
    """

    images: Annotated[int, Field(ge=2)] = DEFAULT_IMAGES
    noise_seed: Annotated[int, Field(ge=0)] = 0
    batch_size: BatchSize | None = None
    gradient_batch_size: Count | None = None
    batch_norm: Literal["estimated", "merged"] = "estimated"

    @property
    def merges_statistics(self) -> bool:
        """Whether the setting ``batch_norm`` says so."""
        return self.batch_norm == "merged"

    def check(self, context: BuildContext) -> None:
        """Refuse what needs no weights and no images to be seen, before checkpoints are packed.

        Raises:
            MetricError, ObjectiveError: a reference, weights of an extractor or a device are missing.
        """
        self.torch_device()
        if not context.samples_alone:
            ScoreSources(self, context).check()

    def noise(self, shape: Sequence[int], labels: ClassLabels | None = None) -> ImageNoise:
        """All sampling noise, of which that of one image has this shape, and the classes of the images."""
        return ImageNoise(self.noise_seed, shape, labels)

    def scores(self, context: BuildContext, batch_size: Size) -> MetricSuite:
        """The metrics and their extractors; loading them may download weights or read the reference images.

        ``batch_size`` is how many images are sampled at once.

        Raises:
            MetricError: an unknown metric, weights or a reference that cannot be used.
        """
        if batch_size == AUTO:
            batch_size = REFERENCE_BATCH_SIZE
        return ScoreSources(self, context, device=self.torch_device(), batch_size=batch_size).suite()

    def objective(
        self,
        sampler: Sampler,
        trajectory: Trajectory,
        context: BuildContext,
        *,
        also: Sampler | None = None,
    ) -> Objective:
        """Build the objective. Load the last checkpoint into the model, so that a misfit fails now.

        Where samples alone are asked for, it has no metrics.

        Args:
            sampler: of searches.
            trajectory: the checkpoints.
            context: of the study file.
            also: samples from the same model in another way, for reports.

        Raises:
            ObjectiveError: the checkpoints do not fit the model.
        """
        if isinstance(sampler, DifferentiableSampler):
            trajectory = trajectory.fitting(sampler.weights.state)
        image_size = getattr(sampler, "image_size", None)  # of a pipeline
        batch_size = images_at_once(self.batch_size, self.torch_device(), image_size=image_size)
        sampler.load(trajectory.merge(last_alone(len(trajectory.steps))))
        batch_norm = self._estimated_statistics(sampler, trajectory)
        if context.samples_alone:
            sizes = BatchSizes(batch_size, with_graph=None, images=self.images, device=self.torch_device())
            return SamplesAlone(
                trajectory,
                sampler,
                batch_sizes=sizes,
                batch_norm=batch_norm,
                device=self.torch_device(),
                real_images=functools.partial(self._real_images, context),
            )
        return MergeSampleScore(
            trajectory,
            sampler,
            self.scores(context, batch_size),
            images=self.images,
            batch_size=batch_size,
            gradient_batch_size=self.gradient_batch_size,
            device=self.torch_device(),
            batch_norm=batch_norm,
            also=also,
            real_images=functools.partial(self._real_images, context),
        )

    def _real_images(self, context: BuildContext, count: int) -> Tensor | None:
        """Some real images of the reference; ``None`` where it is not given, or has none."""
        if self.reference is None:
            return None
        return ScoreSources(self, context).real_images(count)

    def _estimated_statistics(self, sampler: Sampler, trajectory: Trajectory) -> BatchNormStatistics | None:
        """What estimates the statistics of batch normalization for each merge, as a notice says.

        ``None`` where they are merged, are the same in all checkpoints, or belong to a network that the sampler hides.
        """
        if self.merges_statistics or not isinstance(sampler, DifferentiableSampler):
            return None
        estimator = BatchNormStatistics.of_samples(sampler, trajectory.varying)
        if not estimator.statistics:
            return None
        first = estimator.statistics[0].mean
        notice(
            f"{first}: statistics of batch normalization are estimated again for each combination "
            "(batch_norm: merged in the objective's settings combines them)"
        )
        return estimator
