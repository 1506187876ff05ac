"""The K checkpoints of one training run in one file: packed, written while a model trains, and merged.

``packing`` makes a trajectory from files, ``writer`` makes one while a model trains. ``store`` opens it and merges.
``disk`` is the layout of rows in the files. ``merge`` merges at the speed of memory, on a CPU or a GPU;
``exact_merge`` merges with the same bits on every machine. ``lora`` is for low-rank adapters, ``inspection`` looks for
faults.

The K checkpoints are the rows of one matrix, and its columns are the numbers of their tensors. The position of a row in
the file is its *slot*; rows may be in any order. The pieces of the matrix have three names:

- a *segment*: the columns of neighbouring tensors of one dtype, in all rows. A merge goes from segment to segment;
- a *block*: up to ``BLOCK_COLUMNS`` columns of one tensor, in a group of ``BLOCK_ROWS`` rows. A file of differences
  stores a block together; in it, the numbers of one row share a scale;
- a *tile*: the columns of a segment that one product combines, few enough for a processor's cache.
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
