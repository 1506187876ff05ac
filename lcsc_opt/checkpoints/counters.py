"""The training step and the epoch that a file holds beside its weights; the weights are not read."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.folders import find_weights
from lcsc_opt.checkpoints.inventory import Inventory
from lcsc_opt.checkpoints.names import TORCH_SUFFIXES
from lcsc_opt.checkpoints.reading import read_metadata
from lcsc_opt.checkpoints.torch_files import TensorRef, map_tensors, read_content

_STEP_KEYS = ("global_step", "step", "steps", "iteration", "iterations", "iter", "it", "train_step", "batch_idx_train")
_EPOCH_KEYS = ("epoch", "current_epoch")
_STEP_OF_AI_TOOLKIT = re.compile(r'"step":\s*(?P<step>[0-9]{1,18})\b')  # {"step": 250, "epoch": 1}
_EXACT_DTYPES = ("torch.float32", "torch.float64", "torch.int")  # how the names of dtypes begin that round no step
_MAX_NUMBER = 10**18  # so many digits are also read from names


class Counters(NamedTuple):
    """The step and the epoch in a file, as far as it has them."""

    step: int | None = None
    epoch: int | None = None


def read_counters(path: Path) -> Counters:
    """The counters in a file, numbers of any type; none if it is damaged, since its name may tell them.

    Those of a folder are in the file of its weights, or in ``trainer_state.json`` of transformers. A file is read once,
    as long as it stays the same.
    """
    if path.is_dir():
        return _counters_of_folder(path)
    try:
        state = path.stat()
    except OSError:
        return Counters()
    if not stat.S_ISREG(state.st_mode):  # to read a pipe would wait for its writer
        return Counters()
    return _read_once(path.absolute(), state.st_size, state.st_mtime_ns)


def _counters_of_folder(folder: Path) -> Counters:
    """Those in the state of transformers, whose weights have none; else those in the file of the weights."""
    # there may be no such file, or another program's
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, RecursionError):
        state = json.loads((folder / "trainer_state.json").read_bytes())
        step = _first_number([state.get("global_step")], folder)
        epoch = _first_number([state.get("epoch")], folder)  # 1.5 in the middle of one, which counts as none
        if step is not None or epoch is not None:
            return Counters(step, epoch)
    with contextlib.suppress(TrajectoryError, OSError):
        weights = find_weights(folder, None).file
        if weights.is_file():
            return read_counters(weights)
    return Counters()


@functools.lru_cache(maxsize=10_000)
def _read_once(path: Path, _size: int, _changed_at: int) -> Counters:
    """The counters of a file; its size and its time are in the cache's key, so that a changed file is read again."""
    if not path.name.endswith(TORCH_SUFFIXES):
        return Counters(_step_in_metadata(path))
    with contextlib.suppress(Exception):  # a damaged file can raise anything
        entries = Inventory(read_content(path)).entries
        step = _first_number((entries.get(name) for name in _STEP_KEYS), path)
        return Counters(step, _first_number((entries.get(name) for name in _EPOCH_KEYS), path))
    return Counters()


def _step_in_metadata(path: Path) -> int | None:
    """The step in the header of a safetensors file; ``None`` for any other file."""
    metadata: Mapping[str, str] = {}
    with contextlib.suppress(TrajectoryError):  # the name of a damaged file may tell its step
        metadata = read_metadata(path)
    for name in ("step", "ss_steps"):  # the latter of kohya
        text = metadata.get(name, "")
        if text.isascii() and text.isdigit() and len(text) <= 18:
            return int(text)
    training_info = _STEP_OF_AI_TOOLKIT.search(metadata.get("training_info", ""))
    if training_info is None:
        return None
    return int(training_info["step"])


def _first_number(values: Iterable[Any], path: Path) -> int | None:
    """The first value that is a whole number from 0, whether an int, a float or a tensor in the file ``path``."""
    for value in values:
        number = value
        if isinstance(value, TensorRef) and value.shape == () and str(value.dtype).startswith(_EXACT_DTYPES):
            number = map_tensors(path, {"": value})[""].item()
        if type(number) is float and number.is_integer():
            number = int(number)
        # ``True`` is an instance of int, and no step
        if type(number) is int and 0 <= number < _MAX_NUMBER:
            return number
    return None
