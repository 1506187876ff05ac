"""Feature extractors that are trained here, in seconds: classifiers of small images, cached by their settings.

Inception's features say little about 8×8 images, and Inception must be downloaded. So the penultimate layer of a small
classifier of such images takes its place. The classifier is trained without augmentation: a network that has learned
to ignore noise and shifts would not see them in samples.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lcsc_opt.base.errors import MetricError
from lcsc_opt.base.files import write_atomically
from lcsc_opt.base.progress import progress
from lcsc_opt.base.reproducibility import derive_seed
from lcsc_opt.metrics.extractors.base import FeatureExtractor, extract
from lcsc_opt.metrics.extractors.network import weights_hash
from lcsc_opt.metrics.loss import View
from lcsc_opt.metrics.reference.reference import Reference
from lcsc_opt.metrics.statistics import FeatureStatistics, ReferenceStatistics
from lcsc_opt.training.networks import torch_threads

FORMAT = 3  # version of the cached file and of the recipe; raise it when either changes
HELD_OUT_FRACTION = 0.2
BATCH = 128
LEARNING_RATE = 1e-3
SECOND_SEED, SECOND_DIMENSION = 1, 48  # of the second network, which only held-out reports use


@dataclasses.dataclass(frozen=True)
class ClassifierRecipe:
    """What a trained classifier depends on, besides its images, and the constants above, which FORMAT covers.

    Attributes:
        name: of the images; the extractor and the cached file are named after it.
        image_shape: ``[C, H, W]``.
        strides: of the three convolutions.
        classes: how many there are.
        dimension: D, the number of features.
        epochs: passes over the 80 % of the images that are trained on.
        seed: of the split, the initial weights and the order of the batches.

    Raises:
        MetricError: ``dimension`` or ``epochs`` is below one.
    """

    name: str
    image_shape: tuple[int, int, int]
    strides: tuple[int, int, int]
    classes: int
    dimension: int
    epochs: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("dimension", "epochs"):
            if getattr(self, name) < 1:
                raise MetricError(f"{name}: expected at least 1, got {getattr(self, name)}")

    def as_json(self) -> str:
        """All settings as one line."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, sort_keys=True)

    @property
    def file_name(self) -> str:
        """The name of the cached file."""
        return f"{self.name}-network-{hashlib.sha256(self.as_json().encode()).hexdigest()[:16]}.safetensors"

    def generator(self, purpose: str) -> torch.Generator:
        """The random generator for one purpose."""
        return torch.Generator().manual_seed(derive_seed(self.seed, f"{self.name}-network", purpose))


class ClassifierNetwork(nn.Module):
    """Three convolutions and a hidden layer of features; SiLU is smooth and does not saturate.

    No layer mixes images of a batch. Initialized from ``generator``: He normal weights, zero biases.
    """

    def __init__(self, recipe: ClassifierRecipe, generator: torch.Generator) -> None:
        super().__init__()
        channels, height, width = recipe.image_shape
        first, second, third = recipe.strides
        shrunk = first * second * third
        # On the meta device the layers' own initialization draws nothing from torch's global generator.
        self.conv_1 = nn.Conv2d(channels, 16, 3, stride=first, padding=1, device="meta")
        self.conv_2 = nn.Conv2d(16, 32, 3, stride=second, padding=1, device="meta")
        self.conv_3 = nn.Conv2d(32, 64, 3, stride=third, padding=1, device="meta")
        self.hidden = nn.Linear(64 * (height // shrunk) * (width // shrunk), recipe.dimension, device="meta")
        self.head = nn.Linear(recipe.dimension, recipe.classes, device="meta")
        self.to_empty(device="cpu")
        for parameter in self.parameters():
            _initialize(parameter, generator)

    def features(self, images: Tensor) -> Tensor:
        """``[B, C, H, W]`` in [−1, 1] → ``[B, D]``."""
        x = F.silu(self.conv_1(images))
        x = F.silu(self.conv_2(x))
        x = F.silu(self.conv_3(x))
        return F.silu(self.hidden(x.flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """``[B, C, H, W]`` in [−1, 1] → logits ``[B, classes]``."""
        logits: Tensor = self.head(self.features(images))
        return logits


class ClassifierExtractor:
    """The hidden layer of a trained :class:`ClassifierNetwork` as features, differentiable in the images.

    Attributes:
        held_out_accuracy: the fraction of the images not trained on that are classified correctly.
    """

    def __init__(self, recipe: ClassifierRecipe, network: ClassifierNetwork, *, held_out_accuracy: float) -> None:
        self._recipe = recipe
        self._network = network.eval().requires_grad_(False)
        self._name = f"{recipe.name}-{recipe.dimension}-{weights_hash(network.state_dict())}"
        self.held_out_accuracy = held_out_accuracy

    @property
    def name(self) -> str:
        """``<images>-<dimension>-<hash of the weights>``."""
        return self._name

    @property
    def dimension(self) -> int:
        """The number of features, D."""
        return self._recipe.dimension

    def to(self, device: torch.device | str) -> ClassifierExtractor:
        """Move the network to ``device`` and return this extractor."""
        self._network.to(device)
        return self

    def __call__(self, images: Tensor) -> Tensor:
        """Features ``[B, D]`` of ``[B, C, H, W]`` in [−1, 1].

        Raises:
            MetricError: for images of another shape.
        """
        return self._network.features(self._checked(images))

    def logits(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of ``[B, C, H, W]`` in [−1, 1].

        Raises:
            MetricError: for images of another shape.
        """
        logits: Tensor = self._network(self._checked(images))
        return logits

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``[B, D]`` and logits ``[B, classes]`` of ``[B, C, H, W]`` in [−1, 1], from one pass.

        Raises:
            MetricError: for images of another shape.
        """
        features = self._network.features(self._checked(images))
        return features, self._network.head(features)

    def _checked(self, images: Tensor) -> Tensor:
        if tuple(images.shape[1:]) != self._recipe.image_shape:
            expected = ", ".join(str(size) for size in self._recipe.image_shape)
            raise MetricError(
                f"images: expected [B, {expected}] for {self._recipe.name}, got the shape {list(images.shape)}"
            )
        return images.to(self._network.hidden.weight)


def train_classifier(
    recipe: ClassifierRecipe, data: Callable[[], tuple[Tensor, Tensor]], *, cache: Path
) -> ClassifierExtractor:
    """The extractor that ``recipe`` describes: read from ``cache``, or trained and written there.

    On the same machine, training again gives the same weights with any number of torch's threads. On another kind of
    processor the weights differ by rounding, so the extractor's name differs, too.

    Args:
        recipe: settings.
        data: gives the images ``[n, C, H, W]`` in [−1, 1] and their classes ``[n]``.
        cache: a folder; it is created when it does not exist.

    Raises:
        MetricError: the cached file is broken or cannot be written.
    """
    path = cache / recipe.file_name
    if path.exists():
        return _read(path, recipe)
    with torch_threads(1):  # small layers gain nothing from more
        network, accuracy = _train(recipe, *data())
    metadata = {"held_out_accuracy": repr(accuracy), "settings": recipe.as_json()}
    write_atomically(path, save(network.state_dict(), metadata), error=MetricError)
    return ClassifierExtractor(recipe, network, held_out_accuracy=accuracy)


def view_of(extractor: FeatureExtractor, images: Tensor) -> View:
    """An extractor together with its features of the real ``images`` ``[n, C, H, W]``."""
    features = extract(extractor, images, batch_size=500)
    statistics = ReferenceStatistics.from_statistics(FeatureStatistics.from_features(features), extractor.name)
    return View(extractor, Reference(statistics, statistics.sha256, features.astype(np.float32)))


def _initialize(parameter: Tensor, generator: torch.Generator) -> None:
    if parameter.ndim > 1:
        nn.init.kaiming_normal_(parameter, nonlinearity="relu", generator=generator)
    else:
        nn.init.zeros_(parameter)


def _train(recipe: ClassifierRecipe, images: Tensor, classes: Tensor) -> tuple[ClassifierNetwork, float]:
    """The trained network and its accuracy on the held-out fifth."""
    order = torch.randperm(len(images), generator=recipe.generator("split"))
    cut = math.ceil(len(images) * HELD_OUT_FRACTION)
    held_out, trained = order[:cut], order[cut:]
    network = ClassifierNetwork(recipe, recipe.generator("weights"))
    _fit(network, images[trained], classes[trained], recipe)
    with torch.no_grad():
        right = network(images[held_out]).argmax(1) == classes[held_out]
    return network, float(right.double().mean())


def _fit(network: ClassifierNetwork, images: Tensor, classes: Tensor, recipe: ClassifierRecipe) -> None:
    generator = recipe.generator("batches")
    batches = math.ceil(len(images) / BATCH)
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs * batches)
    with progress(f"training the {recipe.name} extractor", recipe.epochs) as advance, torch.enable_grad():
        for _ in range(recipe.epochs):
            for batch in torch.split(torch.randperm(len(images), generator=generator), BATCH):
                loss = F.cross_entropy(network(images[batch]), classes[batch])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
            advance(note=f"loss {loss.item():.4f}")


def _read(path: Path, recipe: ClassifierRecipe) -> ClassifierExtractor:
    network = ClassifierNetwork(recipe, torch.Generator())
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            network.load_state_dict(weights)
            accuracy = float((file.metadata() or {})["held_out_accuracy"])
    except (OSError, SafetensorError, RuntimeError, KeyError, ValueError) as error:
        raise MetricError(f"{path}: is no cached {recipe.name} network; delete it, and it is trained again") from error
    return ClassifierExtractor(recipe, network, held_out_accuracy=accuracy)
