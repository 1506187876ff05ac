"""The weak model of autoguidance, as a study file names it; and merges into a network and its weak model at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.records import Coefficients
from lcsc_opt.base.settings import FrozenModel
from lcsc_opt.coefficients.layer_groups import LayerGroups, Rule, network_rows
from lcsc_opt.coefficients.plane import named_model
from lcsc_opt.coefficients.profiles import check_coefficients
from lcsc_opt.objective.contract import Mergeable
from lcsc_opt.sampling import Sampler, load_weights
from lcsc_opt.sampling.base import SearchedWeak, searched_weak_of

_Value = TypeVar("_Value")


class WeakSearch(FrozenModel):
    """``weak: {search: ema:0.99}``: the coefficients of the weak model are searched, too.

    Attributes:
        search: the weak model that the search begins with, a checkpoint's step or ``ema:RATE``.
    """

    search: int | str


WeakSetting = int | str | WeakSearch
"""A checkpoint's step or ``ema:RATE``, for a weak model that stays as it is; or one that is searched."""


def with_weak_weights(
    network: nn.Module, setting: WeakSetting, trajectory: Mergeable
) -> tuple[nn.Module, Coefficients | None]:
    """A network, with the weights of an earlier checkpoint, named by its training step, or of an average, ``ema:RATE``.

    Args:
        network: one of its own, made like the network that is guided.
        setting: of the study file.
        trajectory: the checkpoints.

    Returns:
        The network; and its coefficients ``[K]`` if they are searched, else ``None``.

    Raises:
        ObjectiveError: there is no such checkpoint, that is no rate, or the checkpoints do not fit the network.
    """
    name = setting.search if isinstance(setting, WeakSearch) else setting
    model = named_model(name, trajectory.steps)
    if model is None:
        first = trajectory.steps[0]
        last = trajectory.steps[-1]
        raise ObjectiveError(
            f"weak: expected ema:RATE, or the step of one of the checkpoints, {first} to {last}; got {name!r}"
        )
    coefficients, _ = model
    load_weights(network, trajectory.merge(coefficients))
    if isinstance(setting, WeakSearch):
        return network, coefficients
    return network, None


def merged_for(sampler: Sampler, checkpoints: Mergeable) -> Mergeable:
    """What the weights of a sampler are merged from: the checkpoints, or a view of them if it has two models of them.

    Args:
        sampler: holds the model.
        checkpoints: of the network.
    """
    weak = searched_weak_of(sampler)
    return checkpoints if weak is None else WithWeakModel(checkpoints, weak)


class WithWeakModel:
    """Checkpoints that are merged twice, into a network and, with a row of coefficients of its own, its weak model.

    Coefficients are ``[S + 1, K]``, those of the weak model last. ``[K]`` are the network's; the weak model has its
    start then. A weak model with the coefficients of the merge before is not merged again.

    Args:
        checkpoints: of the network.
        weak: the weak model.
    """

    def __init__(self, checkpoints: Mergeable, weak: SearchedWeak) -> None:
        self._checkpoints = checkpoints
        self._one_row = checkpoints.in_rows(None)
        self._weak = weak
        self._prefixes = ("network.", f"{weak.name}.")
        self._last_weak: tuple[bytes, Mapping[str, Tensor]] = (b"", {})
        self.layer_groups = LayerGroups.with_weak_row(checkpoints.layer_groups, weak.start)

    @property
    def steps(self) -> tuple[int, ...]:
        """``[K]`` training steps."""
        return self._checkpoints.steps

    @property
    def sha256(self) -> str:
        """Identifies the checkpoints."""
        return self._checkpoints.sha256

    @property
    def touched(self) -> bool:
        """Whether the weights were written again after :attr:`sha256` was computed."""
        return self._checkpoints.touched

    @property
    def varying(self) -> frozenset[str]:
        """The names of the tensors that differ between checkpoints, in both models."""
        return frozenset(prefix + name for prefix in self._prefixes for name in self._checkpoints.varying)

    def in_rows(self, rule: Rule | None) -> WithWeakModel:
        """The same checkpoints, with the network's rows divided by a rule."""
        return WithWeakModel(self._checkpoints.in_rows(rule), self._weak)

    def verify(self) -> None:
        """Compare the weights with the hashes behind :attr:`sha256`."""
        self._checkpoints.verify()

    def merge(self, coefficients: npt.ArrayLike | Tensor) -> dict[str, Tensor]:
        """The tensors of both models, by their names in the module that holds them."""
        groups = self.layer_groups
        checked = check_coefficients(coefficients, len(self.steps), rows=len(groups))
        network = self._checkpoints.merge(network_rows(checked, groups.names))
        weak_row = groups.in_rows(checked)[-1]
        identity = weak_row.tobytes()
        last_identity, weak = self._last_weak
        if identity != last_identity:
            weak = self._one_row.merge(weak_row)
            self._last_weak = (identity, weak)
        network_prefix, weak_prefix = self._prefixes
        return {**_prefixed(network, network_prefix), **_prefixed(weak, weak_prefix)}

    def gram(self) -> npt.NDArray[np.float64]:
        """``[S + 1, K, K]``; the last ones are those of all weights, the sums of the network's groups."""
        network = self._checkpoints.gram().reshape(-1, len(self.steps), len(self.steps))
        return np.concatenate([network, network.sum(axis=0, keepdims=True)])

    def project(self, gradients: Mapping[str, Tensor]) -> Coefficients:
        """The gradient in the coefficients, ``[S + 1, K]``, from that in the tensors of both models."""
        network, weak = [_without_prefix(gradients, prefix) for prefix in self._prefixes]
        rows = (self._checkpoints.project(network), self._one_row.project(weak))
        return np.concatenate([np.atleast_2d(row) for row in rows])


def _prefixed(tensors: Mapping[str, _Value], prefix: str) -> dict[str, _Value]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _without_prefix(tensors: Mapping[str, _Value], prefix: str) -> dict[str, _Value]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
