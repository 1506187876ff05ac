"""The K checkpoints of one training run in one file: packed, written while a model trains, and merged.

``packing`` makes a trajectory of files, ``writer`` one while a model trains. ``store`` opens it and merges.
``disk`` is how rows lie in the files, ``merge`` how they are merged at the speed of memory, on a CPU or a GPU;
``exact_merge`` merges bit for bit alike on every machine. ``lora`` is for low-rank adapters, ``inspection`` looks for
what is wrong.

The K checkpoints are the rows of one matrix, and its columns are the numbers of their tensors. The number of a row in
the file is its *slot*: rows lie there in any order. The pieces of the matrix have three names:

- a *segment*: the columns of neighbouring tensors of one dtype, in all rows; what a merge goes through;
- a *block*: up to ``BLOCK_COLUMNS`` columns of one tensor, in a group of ``BLOCK_ROWS`` rows: what lies together in a
  file of differences, where the numbers that a row has in a block share a scale;
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
