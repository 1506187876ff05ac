"""Trains the model of ``objectives/letters.py``, and writes what ships with it into this folder.

    python objectives/weights/train.py

Half an hour on one core: 20,000 steps, of which the checkpoints of the last 8,000 are shipped, one in 500, in float16,
and for each kind of bundled images the two networks whose features score them. Needs ``[train]``.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from lcsc_opt.base.catalog import load_file
from lcsc_opt.base.descent import descend, torch_threads
from lcsc_opt.base.reproducibility import derive_seed
from lcsc_opt.metrics.bundled_images import bundled_images
from lcsc_opt.metrics.extractors.bundled import SETTINGS, ship_feature_network
from lcsc_opt.training.networks import initialize
from lcsc_opt.training.recipes import Batch
from lcsc_opt.trajectory import TrajectoryWriter

HERE = Path(__file__).parent
STEPS = 20_000
EVERY = 500
SHIPPED = 16


def main() -> None:
    """Train, keep the last checkpoints, and ship the networks of features."""
    shipped = HERE / "letters.trajectory"
    shutil.rmtree(shipped, ignore_errors=True)
    train(shipped)
    for name in SETTINGS:
        for second in (False, True):
            ship_feature_network(name, second=second)


def train(shipped: Path) -> None:
    """Train on a third of the letters; the trajectory has the last checkpoints, in float16."""
    letters = load_file(HERE.parent / "letters.py")
    images = bundled_images("characters")[0][letters.TRAINED_ON]
    network = letters.network()
    generator = torch.Generator().manual_seed(derive_seed(0, "training"))
    initialize(network, generator)
    optimizer = torch.optim.RAdam(network.train().parameters(), lr=letters.RECIPE.learning_rate)

    def loss(step: int) -> Tensor:
        chosen = torch.randint(len(images), (letters.RECIPE.batch_size,), generator=generator)
        batch: Tensor = letters.RECIPE.loss(Batch(images[chosen], step, STEPS, network, network, generator))
        return batch

    with torch_threads(1), TrajectoryWriter(shipped, dtype="float16") as writer:

        def save(step: int) -> None:
            if step % EVERY == 0 and step > STEPS - SHIPPED * EVERY:
                writer.append(step, network)

        descend(loss, optimizer, steps=STEPS, description="training letters", after=save)


if __name__ == "__main__":
    main()
