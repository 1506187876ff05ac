"""Saved checkpoints of one training run: found, read, packed into one mapped file, and merged.

``formats`` reads what people have on disk, ``finding`` and ``selection`` say which files, ``packing`` turns them
into one trajectory, ``writer`` makes one while a model trains (``staging`` copies the weights, ``saving`` writes rows),
``store`` opens it and merges, ``inspection`` looks for what is wrong with one. ``layout`` and ``manifest`` are the file
format; ``merging`` is the arithmetic; ``lora`` and ``recombination`` are for low-rank adapters.
"""

from lcsc_opt.checkpoints import Checkpoint, checkpoint_step, read_checkpoint
from lcsc_opt.checkpoints.finding import Selection, find_checkpoints
from lcsc_opt.trajectory.packing import open_or_pack, pack
from lcsc_opt.trajectory.store import Trajectory
from lcsc_opt.trajectory.writer import TrajectoryWriter

__all__ = [
    "Checkpoint",
    "Selection",
    "Trajectory",
    "TrajectoryWriter",
    "checkpoint_step",
    "find_checkpoints",
    "open_or_pack",
    "pack",
    "read_checkpoint",
]
