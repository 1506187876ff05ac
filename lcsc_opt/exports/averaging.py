"""``lcsc_opt.average``: a usual average of checkpoints, without a search."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.paths import DEFAULT_FILES
from lcsc_opt.base.settings import excerpt
from lcsc_opt.exports.coefficients import EXPECTED, coefficients_named
from lcsc_opt.trajectory import Trajectory
from lcsc_opt.trajectory.cached import PackRequest, as_patterns
from lcsc_opt.trajectory.in_memory import by_step, check_state_dicts, listed, pack_state_dicts
from lcsc_opt.trajectory.packing import check_checkpoints, open_or_pack


def average(checkpoints: Any, kind: str = "uniform") -> dict[str, Tensor]:
    """The state dict of an average of checkpoints, on the CPU.

    >>> import torch, lcsc_opt
    >>> states = {100: {"weight": torch.zeros(2)}, 200: {"weight": torch.ones(2)}}
    >>> lcsc_opt.average(states)["weight"]
    tensor([0.5000, 0.5000])
    >>> lcsc_opt.average(states, "ema:0.99")["weight"]
    tensor([0.6340, 0.6340])

    Args:
        checkpoints: files, a pattern, a folder, a packed trajectory or ``hf://owner/name@step-*``; or state dicts, as
            ``{step: state_dict}`` or as a list.
        kind: ``uniform``; ``last:N``, that of the last N; ``step:N``, one checkpoint; ``ema:RATE``, a rate per training
            step; or ``power:WIDTH``, EDM2's.

    Raises:
        StudySpecError: another kind.
        TrajectoryError: the checkpoints cannot be read, or are of different models.
    """
    if not isinstance(kind, str):
        raise StudySpecError(f"kind: expected {EXPECTED}, got {excerpt(kind)}")
    coefficients_of = coefficients_named(kind)
    if coefficients_of is None:
        raise StudySpecError(f"{kind}: is a recipe; expected {EXPECTED}")
    with tempfile.TemporaryDirectory(prefix="lcsc-") as folder:
        trajectory, coefficients = coefficients_of(open_trajectory(checkpoints, Path(folder)))
        return trajectory.merge(coefficients)


def check_openable(checkpoints: Any, *, key: str | None = None, steps: Sequence[int] | None = None) -> None:
    """Refuse what :func:`open_trajectory` would refuse before it packs; of files only the first is read.

    Raises:
        TrajectoryError: the checkpoints cannot be read, or are fewer than two.
    """
    states = by_step(checkpoints)
    if states is None:
        patterns = as_patterns(checkpoints)
        check_checkpoints(PackRequest(patterns=patterns, folder=DEFAULT_FILES, key=key, steps=steps))
    else:
        check_state_dicts(states)


def open_trajectory(
    checkpoints: Any, folder: Path, *, key: str | None = None, steps: Sequence[int] | None = None
) -> Trajectory:
    """Open checkpoints as users name them, or state dicts in memory.

    Args:
        checkpoints: as for :func:`average`.
        folder: where they are packed, unless they are a packed trajectory.
        key: which state dict of each file.
        steps: the training step of each file, ``[K]``; ``None`` reads them from metadata, contents and names.

    Raises:
        TrajectoryError: the checkpoints cannot be read, or are of different models.
    """
    checkpoints = listed(checkpoints)
    states = by_step(checkpoints)
    if states is None:
        return open_or_pack(checkpoints, folder=folder, key=key, steps=steps)
    return Trajectory.open(pack_state_dicts(states, folder))
