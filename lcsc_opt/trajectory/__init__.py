"""The K checkpoints of one training run in one file: packed, written while a model trains, and merged.

A trajectory is a matrix: the checkpoints are its rows, and its columns are the numbers of their tensors. The position
of a row in the file is its *slot*; rows may be in any order. ``layout`` places tensors in a row, ``manifest`` names the
rows, ``matrix`` writes them. ``trajectory`` opens the matrix; ``merge`` combines its rows at the speed of memory, from
where ``placement`` finds them: mapped, on a GPU, or streamed.
"""

from lcsc_opt.trajectory.packing import open_or_pack, pack
from lcsc_opt.trajectory.trajectory import Trajectory
from lcsc_opt.trajectory.writer import TrajectoryWriter

__all__ = ["Trajectory", "TrajectoryWriter", "open_or_pack", "pack"]
