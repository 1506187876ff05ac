"""The contract of a checkpoint format."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.reading import checkpoint_step, read_checkpoint

CUTS = (0.0, 0.1, 0.5, 0.9, 0.999)  # shares of the file that are left after a cut


def check_checkpoint(
    path: Path, tensors: Mapping[str, Tensor], *, key: str | None = None, step: int | None = None
) -> None:
    """Read a checkpoint, whole and truncated.

    * The state dict comes back by name, dtype and shape, bit for bit.
    * The training step is found, if one is expected.
    * A truncated file is refused with a :class:`~lcsc_opt.base.errors.TrajectoryError` that names it, with no other
      error, and never gives fewer or other weights.

    Args:
        path: a file, or a folder.
        tensors: what was saved in it.
        key: which state dict of the file; ``None`` finds it.
        step: the step that the path, the metadata or the content give; ``None`` expects nothing.

    Raises:
        AssertionError: one of these is not kept.
        TrajectoryError: the checkpoint cannot be read at all.
    """
    _compare(read_checkpoint(path, key=key).tensors, tensors)
    if step is not None:
        found = checkpoint_step(path)
        if found != step:
            raise AssertionError(f"{path}: its step is read as {found}, expected {step}")
    if path.is_file():
        _check_truncated(path, tensors, key)


def _compare(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    if found.keys() != expected.keys():
        apart = sorted(found.keys() ^ expected.keys())
        raise AssertionError(f"other tensors than were saved: {', '.join(apart[:3])}")
    for name, tensor in expected.items():
        read = found[name]
        if (read.dtype, read.shape) != (tensor.dtype, tensor.shape):
            raise AssertionError(
                f"{name}: read as {read.dtype} {list(read.shape)}, saved as {tensor.dtype} {list(tensor.shape)}"
            )
        bits = (one.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for one in (read, tensor))
        if not torch.equal(*bits):
            raise AssertionError(f"{name}: other numbers than were saved")


def _check_truncated(path: Path, tensors: Mapping[str, Tensor], key: str | None) -> None:
    content = path.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        cut = Path(folder) / path.name
        for share in CUTS:
            cut.write_bytes(content[: int(share * len(content))])
            try:
                _compare(read_checkpoint(cut, key=key).tensors, tensors)  # a cut may remove only padding
            except TrajectoryError as error:
                if str(cut) not in str(error):
                    raise AssertionError(f"a truncated file is refused without its name: {error}") from error
            except AssertionError as error:
                raise AssertionError(f"{share:.1%} of the file are read as if they were all: {error}") from error
            except Exception as error:
                raise AssertionError(
                    f"the first {share:.1%} of the file raise {type(error).__name__}, expected a TrajectoryError"
                ) from error
