"""The contract of a checkpoint format."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints import checkpoint_step, read_checkpoint
from lcsc_opt.testing.requiring import require

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
        require(found == step, f"{path}: its step is read as {found}, expected {step}")
    if path.is_file():
        with tempfile.TemporaryDirectory() as folder:
            for share in CUTS:
                _check_cut(path, Path(folder) / path.name, share, tensors, key)


def _compare(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    apart = sorted(found.keys() ^ expected.keys())
    require(not apart, f"other tensors than were saved: {', '.join(apart[:3])}")
    for name, tensor in expected.items():
        read = found[name]
        require(
            (read.dtype, read.shape) == (tensor.dtype, tensor.shape),
            f"{name}: read as {read.dtype} {list(read.shape)}, saved as {tensor.dtype} {list(tensor.shape)}",
        )
        bits = (one.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for one in (read, tensor))
        require(torch.equal(*bits), f"{name}: other numbers than were saved")


def _check_cut(path: Path, cut: Path, share: float, tensors: Mapping[str, Tensor], key: str | None) -> None:
    content = path.read_bytes()
    cut.write_bytes(content[: int(share * len(content))])
    try:
        _compare(read_checkpoint(cut, key=key).tensors, tensors)  # a cut may remove only padding
    except TrajectoryError as error:
        require(str(cut) in str(error), f"a truncated file is refused without its name: {error}")
    except AssertionError as error:
        raise AssertionError(f"{share:.1%} of the file are read as if they were all: {error}") from error
    except Exception as error:
        raise AssertionError(
            f"the first {share:.1%} of the file raise {type(error).__name__}, expected a TrajectoryError"
        ) from error
