"""The weak model of autoguidance, as a study file names it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.coefficients.plane import named_model
from lcsc_opt.objective.contract import Mergeable


def weak_weights(name: int | str, trajectory: Mergeable) -> Mapping[str, Tensor]:
    """Name → tensor of an earlier checkpoint, by its training step, or of an average, ``ema:RATE``.

    Raises:
        ObjectiveError: there is no such checkpoint, or the rate is none.
    """
    model = named_model(name, trajectory.steps)
    if model is None:
        first = trajectory.steps[0]
        last = trajectory.steps[-1]
        raise ObjectiveError(
            f"weak: expected ema:RATE, or the step of one of the checkpoints, {first} to {last}; got {name!r}"
        )
    coefficients, _ = model
    return trajectory.merge(coefficients)
