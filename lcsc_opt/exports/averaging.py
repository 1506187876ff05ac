"""``lcsc_opt.average``: a usual average of checkpoints, without a search."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.paths import cache_directory
from lcsc_opt.base.records import Coefficients
from lcsc_opt.exports.coefficients import coefficients_named
from lcsc_opt.trajectory import Trajectory
from lcsc_opt.trajectory.in_memory import by_step, pack_state_dicts
from lcsc_opt.trajectory.packing import open_or_pack


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
        kind: ``uniform``; ``last:N``, that of the last N; ``ema:RATE``, a rate per training step; or ``power:WIDTH``,
            EDM2's.

    Raises:
        StudySpecError: another kind.
        TrajectoryError: the checkpoints cannot be read, or are of different models.
    """
    coefficients_of = None
    many: int | None = None
    name, _, text = kind.partition(":")
    if name in ("ema", "power"):
        coefficients_of = coefficients_named(kind)
    elif name == "last" and text.isdigit() and int(text) > 0:
        many = int(text)
    elif kind != "uniform":
        raise StudySpecError(f"{kind}: expected uniform, last:N, ema:RATE or power:WIDTH")
    states = by_step(checkpoints)
    if states is None:
        trajectory = open_or_pack(checkpoints, cache=cache_directory())
    else:
        trajectory = Trajectory.open(pack_state_dicts(states, cache_directory()))
    if coefficients_of is not None:
        trajectory, coefficients = coefficients_of(trajectory)
    else:
        coefficients = _uniform(len(trajectory.steps), many)
    return trajectory.merge(coefficients)


def _uniform(checkpoints: int, last: int | None) -> Coefficients:
    """``[K]``, those of the uniform average of the last ones; of all by default."""
    many = checkpoints if last is None else min(last, checkpoints)
    coefficients = np.zeros(checkpoints)
    coefficients[-many:] = 1 / many
    return coefficients
