"""The settings of objectives whose models make bundled images, which networks that ship score.

``objectives/mnist.py`` and ``trained.py`` have them.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from lcsc_opt.base import accelerator
from lcsc_opt.base.errors import MetricError
from lcsc_opt.base.settings import AlsoSettings, Count
from lcsc_opt.checkpoints.finding import Selection
from lcsc_opt.metrics import FeatureExtractor, MetricSuite, Reference
from lcsc_opt.metrics.bundled_images import Bundled, bundled_images
from lcsc_opt.metrics.extractors.bundled import feature_network
from lcsc_opt.metrics.extractors.named_rewards import find_reward
from lcsc_opt.metrics.extractors.pixels import Thumbnails, pixel_reference
from lcsc_opt.metrics.from_settings import ScoreSettings
from lcsc_opt.metrics.names import CROSS_CHECK, INCEPTION, OUTSIDE, PIXELS, THUMBNAILS, TONES
from lcsc_opt.metrics.tones import Tones
from lcsc_opt.objective.merge_sample_score import MergeSampleScore
from lcsc_opt.sampling import Sampler
from lcsc_opt.trajectory import Trajectory

ALL = slice(None)


class SmallSettings(ScoreSettings, AlsoSettings):
    """Settings of an objective whose model makes bundled images.

    Attributes:
        select: which of the checkpoints are combined.
        noise_seed: the seed of all sampling noise.
        images: images per evaluation; more than 64, so that the covariance of 64 features has full rank.
        batch_size: images at once; by default 500 on the CPU, and on a device as many as its memory holds.
    """

    select: Selection = Selection()
    noise_seed: Annotated[int, Field(ge=0)] = 0
    images: Annotated[int, Field(ge=65)] = 1000
    batch_size: Count | None = None

    def check_metrics(self) -> None:
        """Refuse metrics that cannot be computed.

        Raises:
            MetricError: a metric is unknown, needs another network, or cannot be kept.
        """
        for metric in self.suite_metrics(self.parsed_loss()).reported:
            if metric.extractor not in (INCEPTION, PIXELS, THUMBNAILS, TONES, OUTSIDE, *self.rewards):
                raise MetricError(f"{metric}: these images have features of one network only; leave out what follows @")
        for reward in self.rewards.values():
            find_reward(reward)

    def objective(
        self,
        dataset: Bundled,
        trajectory: Trajectory,
        sampler: Sampler,
        *,
        searched: slice = ALL,
        held_out: slice | None = None,
        also: Sampler | None = None,
    ) -> MergeSampleScore:
        """Merge the selected checkpoints, sample, and score by the networks of ``dataset``.

        Args:
            dataset: the real images.
            trajectory: all checkpoints.
            sampler: from the settings' noise.
            searched: the real images that searches compare with.
            held_out: those for reports only; ``None`` if there are none.
            also: samples from the same model in another way, for reports.
        """
        images, _labels = bundled_images(dataset)
        shown = images[searched if held_out is None else held_out]  # beside samples, in a report
        device = accelerator.find("auto")  # where the sampler is, too
        if self.select.given:
            trajectory = Trajectory.open(trajectory.path, steps=self.select.chosen(trajectory.steps))
        return MergeSampleScore(
            trajectory,
            sampler,
            self._metric_suite(dataset, device, searched, held_out),
            images=self.images,
            batch_size=self.batch_size,
            device=device,
            also=also,
            real_images=lambda count: shown[:count],
        )

    def _metric_suite(
        self, dataset: Bundled, device: torch.device, searched: slice, held_out: slice | None
    ) -> MetricSuite:
        """The metrics, by the networks of ``dataset`` and the user's rewards.

        What only reports need is made when the first report asks for it.
        """
        images, _labels = bundled_images(dataset)

        def reference(extractor: FeatureExtractor) -> Reference:
            built = Reference.of_images(extractor, images[searched])
            if held_out is None:
                return built
            return built.with_unseen(Reference.of_images(extractor, images[held_out]))

        metrics = self.suite_metrics(self.parsed_loss())
        loss_reference = reference(feature_network(dataset).to(device))
        references = {INCEPTION: loss_reference, PIXELS: pixel_reference(reference(Thumbnails()))}
        if any(metric.extractor == TONES for metric in metrics.reported):
            references[TONES] = reference(Tones())
        for name, setting in self.rewards.items():
            references[name] = Reference(find_reward(setting)(device))

        def report_references() -> dict[str, Reference]:
            built = {}
            if metrics.adds_cross_check:
                built[CROSS_CHECK] = reference(feature_network(dataset, second=True).to(device))
            if metrics.adds_defaults:
                built[INCEPTION] = loss_reference
            return built

        return MetricSuite(
            references,
            metrics,
            report_references=report_references,
            real_images=lambda count: images[searched][:count],
        )
