"""The K checkpoints of one training run in one file: packed, written while a model trains, and merged.

A trajectory is a matrix: the checkpoints are its rows, and its columns are the numbers of their tensors. The position
of a row in the file is its *slot*; rows may be in any order.

* Storing: ``layout`` places tensors in a row, ``matrix`` writes rows, ``manifest`` names them; ``writer`` and
  ``callbacks`` are for training loops.
* Reading: ``trajectory`` opens the matrix; ``placement`` finds its columns (mapped, on a GPU, or streamed), ``tiles``
  divides them, and ``merge`` combines them at the speed of memory.
* Packing: ``sources`` finds files by their steps, ``filling`` writes them as rows, ``continuing`` opens the checkpoints
  that a study began with; ``packing`` is what the other rooms call.
"""

from lcsc_opt.trajectory.packing import pack
from lcsc_opt.trajectory.trajectory import Trajectory
from lcsc_opt.trajectory.writer import TrajectoryWriter

__all__ = ["Trajectory", "TrajectoryWriter", "pack"]
