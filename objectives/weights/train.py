"""Trains the model of ``objectives/letters.py``, and writes what ships with it into this folder.

    python objectives/weights/train.py

Half an hour on one core: 20,000 steps, of which the checkpoints of the last 8,000 are shipped, one in 500, in float16,
and for each kind of bundled images the two networks whose features score them. Needs ``[train]``.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from lcsc_opt.base.catalog import load_file
from lcsc_opt.metrics.extractors.bundled import SETTINGS, ship_feature_network
from lcsc_opt.objective.small_images import TrainedSettings
from lcsc_opt.trajectory import TrajectoryWriter

HERE = Path(__file__).parent
STEPS = 20_000
EVERY = 500
SHIPPED = 16


def main() -> None:
    """Train into the cache, then round what ships."""
    letters = load_file(HERE.parent / "letters.py")
    settings = TrainedSettings(data="thirds", training_steps=STEPS, checkpoint_every=EVERY)
    trained = letters.MODEL.trajectory(settings)
    shipped = HERE / "letters.trajectory"
    shutil.rmtree(shipped, ignore_errors=True)
    with TrajectoryWriter(shipped, dtype="float16") as writer:
        for index in range(len(trained) - SHIPPED, len(trained)):
            writer.append(trained.steps[index], trained.checkpoint(index))
    for name in SETTINGS:
        for second in (False, True):
            ship_feature_network(name, second=second)


if __name__ == "__main__":
    main()
