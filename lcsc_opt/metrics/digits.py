"""A feature extractor for 8×8 digits: a classifier of scikit-learn's bundled digits, trained in seconds.

Inception's features say little about 8×8 images. The penultimate layer of a network that can tell the digits
apart does for them what Inception does for photographs: FID in it falls when samples look more like digits. It is
trained without augmentation: a network taught to ignore noise and shifts would not see them in samples either.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lcsc_opt.errors import MetricError
from lcsc_opt.metrics._files import write_atomically
from lcsc_opt.metrics._network import weights_hash
from lcsc_opt.progress import progress
from lcsc_opt.seeds import derive_seed

FORMAT = 2  # of the cached file and of the recipe; raised whenever either changes
CLASSES = 10
HELD_OUT_FRACTION = 0.2
BATCH = 128
LEARNING_RATE = 1e-3


def digits_images() -> Tensor:
    """The 1,797 digits that scikit-learn bundles (UCI): ``[1797, 1, 8, 8]`` float32 in [−1, 1]."""
    images, _ = _load_digits()
    return images


def digits_labels() -> Tensor:
    """Which digit each of :func:`digits_images` is: ``[1797]`` int64, 0 to 9."""
    _, labels = _load_digits()
    return labels


class DigitsNetwork(nn.Module):
    """Three convolutions and a hidden layer of ``dimension`` features; SiLU is smooth and does not saturate.

    No layer looks at other images of the batch. Initialized from ``generator``: He normal weights, zero
    biases.
    """

    def __init__(self, dimension: int, generator: torch.Generator) -> None:
        super().__init__()
        # On the meta device the layers' own initialization draws nothing from torch's global generator.
        self.conv_1 = nn.Conv2d(1, 16, 3, padding=1, device="meta")
        self.conv_2 = nn.Conv2d(16, 32, 3, stride=2, padding=1, device="meta")
        self.conv_3 = nn.Conv2d(32, 64, 3, stride=2, padding=1, device="meta")
        self.hidden = nn.Linear(256, dimension, device="meta")
        self.head = nn.Linear(dimension, CLASSES, device="meta")
        self.to_empty(device="cpu")
        for parameter in self.parameters():
            _initialize(parameter, generator)

    def features(self, images: Tensor) -> Tensor:
        """``[B, 1, 8, 8]`` in [−1, 1] → ``[B, dimension]``."""
        x = F.silu(self.conv_1(images))  # [B, 16, 8, 8]
        x = F.silu(self.conv_2(x))  # [B, 32, 4, 4]
        x = F.silu(self.conv_3(x))  # [B, 64, 2, 2]
        return F.silu(self.hidden(x.flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """``[B, 1, 8, 8]`` in [−1, 1] → logits ``[B, 10]``."""
        logits: Tensor = self.head(self.features(images))
        return logits


class DigitsExtractor:
    """The hidden layer of a trained :class:`DigitsNetwork` as features, differentiable in the images.

    Attributes:
        held_out_accuracy: the fraction of digits that were not trained on and are classified rightly.
    """

    def __init__(self, network: DigitsNetwork, *, held_out_accuracy: float) -> None:
        self._network = network.eval().requires_grad_(False)
        self._name = f"digits-{network.hidden.out_features}-{weights_hash(network.state_dict())}"
        self.held_out_accuracy = held_out_accuracy

    @property
    def name(self) -> str:
        """``digits-<dimension>-<hash of the weights>``."""
        return self._name

    @property
    def dimension(self) -> int:
        """The number of features, D."""
        return self._network.hidden.out_features

    def to(self, device: torch.device | str) -> DigitsExtractor:
        """Move the network to ``device`` and return this extractor."""
        self._network.to(device)
        return self

    def __call__(self, images: Tensor) -> Tensor:
        """Features ``[B, D]`` of ``[B, 1, 8, 8]`` in [−1, 1].

        Raises MetricError for images of another shape.
        """
        return self._network.features(self._checked(images))

    def logits(self, images: Tensor) -> Tensor:
        """Logits ``[B, 10]`` of ``[B, 1, 8, 8]`` in [−1, 1].

        Raises MetricError for images of another shape.
        """
        logits: Tensor = self._network(self._checked(images))
        return logits

    def _checked(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1:] != (1, 8, 8):
            raise MetricError(f"images: expected [B, 1, 8, 8] for the digits, got the shape {list(images.shape)}")
        return images.to(self._network.hidden.weight)


def train_digits_network(*, seed: int, cache: Path, dimension: int = 64, epochs: int = 40) -> DigitsExtractor:
    """The extractor that these settings describe: read from ``cache``, or trained and written there.

    Training again gives the same weights on the same machine, whatever torch's number of threads; on another
    kind of processor they differ by rounding, and with them the extractor's name.

    Args:
        seed: of the split, the initial weights and the order of the batches.
        cache: a folder; it is created when it does not exist.
        dimension: D, the number of features.
        epochs: passes over the 80 % of the digits that are trained on.

    Raises MetricError when a setting is out of range, or when the cached file is broken or cannot be written.
    """
    recipe = _Recipe(seed, dimension, epochs)
    path = cache / recipe.file_name
    if path.exists():
        return _read(path, dimension)
    with _one_thread():
        network, accuracy = _train(recipe)
    metadata = {"held_out_accuracy": repr(accuracy), "settings": recipe.as_json()}
    write_atomically(path, save(network.state_dict(), metadata))
    return DigitsExtractor(network, held_out_accuracy=accuracy)


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """What a trained network depends on, besides the constants above, for which FORMAT stands."""

    seed: int
    dimension: int
    epochs: int

    def __post_init__(self) -> None:
        for name in ("dimension", "epochs"):
            if getattr(self, name) < 1:
                raise MetricError(f"{name}: expected at least 1, got {getattr(self, name)}")

    def as_json(self) -> str:
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, sort_keys=True)

    @property
    def file_name(self) -> str:
        return f"digits-network-{hashlib.sha256(self.as_json().encode()).hexdigest()[:16]}.safetensors"

    def generator(self, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(self.seed, "digits-network", purpose))


def _load_digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)  # [1797, 64], 0 to 16
    images = torch.from_numpy(np.asarray(pixels, dtype=np.float32) / 8 - 1)
    return images.reshape(-1, 1, 8, 8), torch.from_numpy(np.asarray(labels, dtype=np.int64))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """The layers are too small for a second thread to help, and sums would depend on how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _initialize(parameter: Tensor, generator: torch.Generator) -> None:
    if parameter.ndim > 1:
        nn.init.kaiming_normal_(parameter, nonlinearity="relu", generator=generator)
    else:
        nn.init.zeros_(parameter)


def _train(recipe: _Recipe) -> tuple[DigitsNetwork, float]:
    """The trained network and its accuracy on the held-out fifth."""
    images, labels = _load_digits()
    order = torch.randperm(len(images), generator=recipe.generator("split"))
    cut = math.ceil(len(images) * HELD_OUT_FRACTION)
    held_out, trained = order[:cut], order[cut:]
    network = DigitsNetwork(recipe.dimension, recipe.generator("weights"))
    _fit(network, images[trained], labels[trained], recipe)
    with torch.no_grad():
        right = network(images[held_out]).argmax(1) == labels[held_out]
    return network, float(right.double().mean())


def _fit(network: DigitsNetwork, images: Tensor, labels: Tensor, recipe: _Recipe) -> None:
    generator = recipe.generator("batches")
    batches = math.ceil(len(images) / BATCH)
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs * batches)
    with progress("training the digits extractor", recipe.epochs) as advance, torch.enable_grad():
        for _ in range(recipe.epochs):
            for batch in torch.split(torch.randperm(len(images), generator=generator), BATCH):
                loss = F.cross_entropy(network(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
            advance(note=f"loss {loss.item():.4f}")


def _read(path: Path, dimension: int) -> DigitsExtractor:
    network = DigitsNetwork(dimension, torch.Generator())
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            network.load_state_dict(weights)
            accuracy = float((file.metadata() or {})["held_out_accuracy"])
    except (OSError, SafetensorError, RuntimeError, KeyError, ValueError) as error:
        raise MetricError(f"{path}: is no cached digits network; delete it, and it is trained again") from error
    return DigitsExtractor(network, held_out_accuracy=accuracy)
