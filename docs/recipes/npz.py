"""Reads a checkpoint out of an ``.npz`` file. The recipe "Add a checkpoint format" of CONTRIBUTING.md."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.pickles import MALFORMED


def read_npz(path: Path) -> dict[str, Tensor]:
    """Tensors by name.

    Raises:
        TrajectoryError: a bad file; the text follows the path in the error's line.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: torch.from_numpy(file[name]) for name in file.files}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise TrajectoryError(MALFORMED) from error
