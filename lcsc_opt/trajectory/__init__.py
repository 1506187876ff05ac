"""Saved checkpoints of one training run: read, packed into one mapped file, and merged.

``formats`` reads what people have on disk, ``packing`` turns many files into one trajectory, ``writer``
makes one while a model trains, ``store`` opens it and merges. ``layout`` and ``manifest`` are the file
format; ``merging`` is the arithmetic.
"""

from lcsc_opt.trajectory.formats import Checkpoint, checkpoint_step, read_checkpoint
from lcsc_opt.trajectory.packing import pack
from lcsc_opt.trajectory.store import Trajectory
from lcsc_opt.trajectory.writer import TrajectoryWriter

__all__ = ["Checkpoint", "Trajectory", "TrajectoryWriter", "checkpoint_step", "pack", "read_checkpoint"]
