"""The K checkpoints of one training run in one mapped store: packed, written while a model trains, and merged.

``packing`` makes a trajectory of files, ``writer`` one while a model trains. ``store`` opens it and merges.
``disk`` is how rows lie in the files, ``merge`` how they are combined at the speed of memory, on a CPU or a GPU;
``recombination`` does it bit for bit on any machine. ``lora`` is for low-rank adapters, ``inspection`` looks for
what is wrong.
"""

from lcsc_opt.checkpoints import Checkpoint, checkpoint_step, read_checkpoint
from lcsc_opt.checkpoints.finding import Selection, find_checkpoints
from lcsc_opt.trajectory.opening import open_or_pack
from lcsc_opt.trajectory.packing import pack
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
