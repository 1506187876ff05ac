"""The weak model of autoguidance, as a study file names it."""

from __future__ import annotations

from torch import nn

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.coefficients.plane import named_model
from lcsc_opt.objective.contract import Mergeable
from lcsc_opt.sampling import load_weights

WeakSetting = int | str
"""A checkpoint's step, or ``ema:RATE``."""


def with_weak_weights(network: nn.Module, name: WeakSetting, trajectory: Mergeable) -> nn.Module:
    """A network, with the weights of an earlier checkpoint, named by its training step, or of an average, ``ema:RATE``.

    Args:
        network: one of its own, made like the network that is guided.
        name: of the weak model.
        trajectory: the checkpoints.

    Raises:
        ObjectiveError: there is no such checkpoint, that is no rate, or the checkpoints do not fit the network.
    """
    model = named_model(name, trajectory.steps)
    if model is None:
        first = trajectory.steps[0]
        last = trajectory.steps[-1]
        raise ObjectiveError(
            f"weak: expected ema:RATE, or the step of one of the checkpoints, {first} to {last}; got {name!r}"
        )
    coefficients, _ = model
    load_weights(network, trajectory.merge(coefficients))
    return network
