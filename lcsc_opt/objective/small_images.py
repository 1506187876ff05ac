"""Objectives whose models are trained here, on small images, when a study first needs them.

``objectives/digits.py``, ``digits_ddpm.py``, ``characters.py``, ``photographs.py`` and ``trained.py`` use this. The
networks whose features score the images are trained here, too. ``letters.py`` comes with all of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lcsc_opt.base import accelerator
from lcsc_opt.base.descent import descend, torch_threads
from lcsc_opt.base.errors import MetricError, TrainingError
from lcsc_opt.base.files import only_process, remove
from lcsc_opt.base.paths import cache_directory
from lcsc_opt.base.reproducibility import derive_seed
from lcsc_opt.checkpoints.finding import Selection
from lcsc_opt.metrics import FeatureExtractor, MetricSuite, Reference
from lcsc_opt.metrics.bundled_images import FORMATS, Bundled, bundled_images
from lcsc_opt.metrics.extractors.bundled import feature_network
from lcsc_opt.metrics.extractors.pixels import Thumbnails, pixel_reference
from lcsc_opt.metrics.extractors.rewards import find_reward
from lcsc_opt.metrics.from_settings import ScoreSettings
from lcsc_opt.metrics.loss import parse_kept, parse_loss
from lcsc_opt.metrics.names import CROSS_CHECK, INCEPTION, OUTSIDE, PIXELS, THUMBNAILS, MetricName
from lcsc_opt.objective.merge_sample_score import MergeSampleScore
from lcsc_opt.objective.settings import Positive
from lcsc_opt.objective.weak import WeakSetting, with_weak_weights
from lcsc_opt.sampling import (
    Autoguidance,
    ClassLabels,
    ConsistencyFunction,
    ConsistencySampler,
    DiffusersSampler,
    ImageNoise,
    Sampler,
    build_scheduler,
)
from lcsc_opt.training.networks import initialize
from lcsc_opt.training.recipes import Batch, TrainingRecipe
from lcsc_opt.training.recipes.consistency import ConsistencyRecipe
from lcsc_opt.trajectory import Trajectory, TrajectoryWriter

_DROPPED_LABELS = 0.1  # share of a batch, as of Ho and Salimans 2022
THREADS = 2  # two threads trained the weights of the README's numbers; another number trains other weights


class SmallSettings(ScoreSettings):
    """Settings of an objective whose model makes bundled images.

    Attributes:
        select: which of the checkpoints are combined.
        noise_seed: the seed of all sampling noise.
        data: ``half`` trains on half of the images, and leaves the other half for held-out reports; ``thirds`` trains
            on a third, searches with another, and leaves the last for reports.
        images: images per evaluation; more than 64, so that the covariance of 64 features has full rank.
        batch_size: images at once.
        nfe: model calls per image.
    """

    select: Selection = Selection()
    noise_seed: Annotated[int, Field(ge=0)] = 0
    data: Literal["all", "half", "thirds"] = "all"
    images: Annotated[int, Field(ge=65)] = 1000
    batch_size: Positive = 500
    nfe: Annotated[int, Field(ge=1, le=100)] = 1

    def check(self) -> None:
        """Refuse metrics that cannot be computed.

        Raises:
            MetricError: a metric is unknown, needs another network, or cannot be kept.
        """
        loss = parse_loss(self.loss, unguarded=self.unguarded)
        reported = MetricName.parse_all(self.held_out_metrics or ())
        metrics = [*loss, *MetricName.parse_all(self.metrics), *reported]
        if self.keep is not None:
            metrics.append(parse_kept(self.keep, loss))
        for metric in metrics:
            if metric.extractor not in (INCEPTION, PIXELS, THUMBNAILS, OUTSIDE, *self.rewards):
                raise MetricError(f"{metric}: these images have features of one network only; leave out what follows @")
        for reward in self.rewards.values():
            find_reward(reward)

    def parts(self, dataset: Bundled) -> tuple[Tensor, Tensor, Tensor | None]:
        """Images ``[n, C, H, W]``: to train on, to compare with in searches, and for held-out reports only."""
        return self.split(bundled_images(dataset)[0])

    def split(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """All images of a dataset, or their classes, in the three parts of :meth:`parts`."""
        if self.data == "all":
            return images, images, None
        if self.data == "half":
            return images[::2], images[::2], images[1::2]
        return images[::3], images[1::3], images[2::3]

    def objective(self, dataset: Bundled, trajectory: Trajectory, sampler: Sampler) -> MergeSampleScore:
        """Merge the selected checkpoints, sample, and score by the networks of ``dataset``."""
        device = accelerator.find("auto")  # where the sampler is, too
        if self.select.given:
            chosen = self.select.choose(trajectory.steps)
            trajectory = Trajectory.open(trajectory.path, steps=[trajectory.steps[index] for index in chosen])
        return MergeSampleScore(
            trajectory,
            sampler,
            self._metric_suite(dataset, device),
            images=self.images,
            batch_size=self.batch_size,
            device=device,
        )

    def _metric_suite(self, dataset: Bundled, device: torch.device) -> MetricSuite:
        """The metrics, by the networks of ``dataset`` and the user's rewards."""
        _, searched_images, held_out_images = self.parts(dataset)

        def reference(extractor: FeatureExtractor) -> Reference:
            searched = Reference.of_images(extractor, searched_images)
            if held_out_images is None:
                return searched
            return dataclasses.replace(searched, held_out=Reference.of_images(extractor, held_out_images))

        loss_reference = reference(feature_network(dataset).to(device))
        references = {INCEPTION: loss_reference, PIXELS: pixel_reference(reference(Thumbnails()))}
        for name, setting in self.rewards.items():
            references[name] = Reference(find_reward(setting))

        def report_references() -> dict[str, Reference]:
            references_of_reports = {CROSS_CHECK: reference(feature_network(dataset, second=True).to(device))}
            if self.adds_default_metrics:
                references_of_reports[INCEPTION] = loss_reference
            return references_of_reports

        return MetricSuite(
            references,
            loss=self.loss,
            metrics=self.metrics,
            held_out_metrics=self.held_out_metrics or (),
            keep=self.keep,
            report_references=report_references if self.adds_cross_check else None,
        )


class TrainedSettings(SmallSettings):
    """Settings of an objective whose model is trained here.

    Attributes:
        training_steps: length of the training.
        checkpoint_every: training steps between two checkpoints.
        training_seed: the seed of weights, batches and noise of the training.
    """

    training_steps: Annotated[int, Field(ge=2)] = 1000
    checkpoint_every: Positive = 5
    training_seed: Annotated[int, Field(ge=0)] = 0

    def check(self) -> None:
        """Refuse metrics that cannot be computed, and a selection of too few checkpoints, before any training.

        Raises:
            MetricError: a metric is unknown, needs another network, or cannot be kept.
            TrainingError: the training leaves fewer than two checkpoints.
            TrajectoryError: fewer than two of them are selected.
        """
        super().check()
        check_length(self.training_steps, self.checkpoint_every)
        self.select.choose(range(self.checkpoint_every, self.training_steps + 1, self.checkpoint_every))


def check_length(training_steps: int, checkpoint_every: int) -> None:
    """Refuse a training that leaves fewer than two checkpoints.

    Raises:
        TrainingError: it does.
    """
    if training_steps < 2 * checkpoint_every:
        raise TrainingError(
            f"checkpoint_every: one checkpoint every {checkpoint_every} steps is fewer than two of {training_steps} "
            f"training_steps; at most {training_steps // 2} leaves two"
        )


@dataclasses.dataclass(frozen=True)
class Guidance:
    """How a model that is told classes is guided.

    Attributes:
        scale: 1 is none.
        low, high: classifier-free guidance acts between these shares of the training's timesteps.
        weak: a checkpoint's step or ``ema:RATE``, for autoguidance in place of classifier-free guidance.
    """

    scale: float = 1.0
    low: float = 0.0
    high: float = 1.0
    weak: WeakSetting | None = None


NO_GUIDANCE = Guidance()


@dataclasses.dataclass(frozen=True)
class SmallModel:
    """A network, and a recipe that trains it in minutes on a CPU, in this process and without Accelerate.

    Attributes:
        name: the name of the trajectory's file in the cache.
        dataset: what it is trained on.
        recipe: its loss and settings; the optimizer is RAdam for all.
        image_shape: ``[C, H, W]``.
        architecture: names the network in the cache; change it with the network.
        network: makes the network.
        spacing: ratio of the noise levels of a consistency model that is sampled in several steps.
        classes: how many classes its images have, if the network is told them. It then has one class more, the last,
            which stands for no class in a part of the training, so that guidance has something to lead away from.
        threads: threads of the training; ``None`` is :data:`THREADS`. A single thread hardly waits on a busy machine.
    """

    name: str
    dataset: Bundled
    recipe: TrainingRecipe
    image_shape: tuple[int, int, int]
    architecture: str
    network: Callable[[], nn.Module]
    spacing: float = 0.2
    classes: int | None = None
    threads: int | None = None

    def build(self, settings: TrainedSettings, guidance: Guidance = NO_GUIDANCE) -> MergeSampleScore:
        """The objective; the trajectory and the feature network come from the cache, or are trained first.

        Args:
            settings: the model is trained with these.
            guidance: of a model that is told classes.
        """
        settings.check()
        trajectory = self.trajectory(settings)
        return settings.objective(self.dataset, trajectory, self.sampler(settings, guidance, trajectory))

    def sampler(
        self, settings: SmallSettings, guidance: Guidance = NO_GUIDANCE, trajectory: Trajectory | None = None
    ) -> Sampler:
        """The sampler of the recipe, from the settings' noise; a weak model is one of the trajectory."""
        network = self.network()
        recipe = self.recipe
        noise = ImageNoise(settings.noise_seed)
        if isinstance(recipe, ConsistencyRecipe):
            function = ConsistencyFunction(network, sigma_data=recipe.sigma_data, sigma_min=recipe.sigma_min)
            sigmas = [recipe.sigma_max * self.spacing**step for step in range(settings.nfe)]
            return ConsistencySampler(function, image_shape=self.image_shape, sigmas=sigmas, noise=noise)
        scheduler = build_scheduler(None, recipe.scheduler())
        module = network
        labels = None
        if guidance.weak is not None:
            assert trajectory is not None
            weak = with_weak_weights(self.network(), guidance.weak, trajectory)
            module = Autoguidance(network, weak, guidance=guidance.scale)
        if self.classes is not None:
            null_label = self.classes
            labels = ClassLabels.choose(
                "balanced", classes=self.classes + 1, noise=noise, guidance=(guidance.scale, null_label)
            )
            if guidance.weak is not None:
                labels = ClassLabels(self.classes, "balanced", noise=noise)
        return DiffusersSampler(
            module,
            scheduler,
            steps=settings.nfe,
            image_shape=self.image_shape,
            noise=noise,
            labels=labels,
            trained=network,
            calls=getattr(module, "calls", 1),
            guidance_interval=(guidance.low, guidance.high),
        )

    def trajectory(self, settings: TrainedSettings) -> Trajectory:
        """The trajectory from the cache, trained first if it does not exist.

        Raises:
            TrainingError: the training diverged.
            TrajectoryError: the cache cannot be written.
        """
        path = self._path(settings)
        if not path.exists():
            with only_process(path, busy=f"{path}: another process is training it; waiting"):
                if not path.exists():
                    self._train(settings, path)
        return Trajectory.open(path)

    def _path(self, settings: TrainedSettings) -> Path:
        """Where the trajectory is in the cache: its name is a hash of all that changes the training."""
        described = {
            **self.recipe.model_dump(),
            "steps": settings.training_steps,
            "checkpoint_every": settings.checkpoint_every,
            "seed": settings.training_seed,
        }
        if self.dataset != "digits":
            described["images"] = FORMATS[self.dataset]
        # versions: raise them when the same settings would train another model
        version = 1 if self.recipe.kind == "consistency" else "diffusion 1"
        text = json.dumps([version, self.architecture, described], sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        if settings.data != "all":
            key = f"{key}-{settings.data}"
        return cache_directory() / f"{self.name}-{key}.trajectory"

    def _train(self, settings: TrainedSettings, path: Path) -> None:
        """Train, and leave the trajectory at ``path``; a training that was interrupted begins again."""
        images, _, _ = settings.parts(self.dataset)
        classes, _, _ = settings.split(bundled_images(self.dataset)[1])
        network = self.network()
        generator = torch.Generator().manual_seed(derive_seed(settings.training_seed, "training"))
        initialize(network, generator)
        optimizer = torch.optim.RAdam(network.train().parameters(), lr=self.recipe.learning_rate)
        steps = settings.training_steps

        def loss(step: int) -> Tensor:
            chosen = torch.randint(len(images), (self.recipe.batch_size,), generator=generator)
            labels = self._told_labels(classes[chosen], generator)
            return self.recipe.loss(Batch(images[chosen], step, steps, network, network, generator, labels=labels))

        partial = path.with_name(f"{path.name}.partial")
        remove(partial)
        with torch_threads(self.threads or THREADS), TrajectoryWriter(partial) as writer:

            def save(step: int) -> None:
                if step % settings.checkpoint_every == 0:
                    writer.append(step, network)

            descend(loss, optimizer, steps=steps, description=f"training {self.name}", after=save)
        partial.replace(path)

    def _told_labels(self, classes: Tensor, generator: torch.Generator) -> Tensor | None:
        """The classes ``[N]`` that the network is told in one step, some of them replaced by the last one."""
        if self.classes is None:
            return None
        is_dropped = torch.rand(len(classes), generator=generator) < _DROPPED_LABELS
        return torch.where(is_dropped, self.classes, classes.long())
