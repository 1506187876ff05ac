"""The name of a user's own extractor follows its weights, wherever the extractor holds them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lcsc_opt.metrics.extractors.own import own_extractor


class Holder:
    name, dimension = "own", 4

    def __init__(self, **held: Any) -> None:
        vars(self).update(held)

    def __call__(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :4]


class Network(nn.Module):
    name, dimension = "own", 2

    def __init__(self, hidden: Any = None) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.norm.hidden = hidden


@dataclasses.dataclass(slots=True)
class Slotted:
    network: nn.Module
    name: str = "own"
    dimension: int = 4

    def __call__(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :4]


def linear(value: float) -> nn.Linear:
    network = nn.Linear(2, 2)
    nn.init.constant_(network.weight, value)
    nn.init.zeros_(network.bias)
    return network


def name_of(made: Any) -> str:
    return own_extractor(made, {}).name


@pytest.mark.parametrize(
    "made",
    [
        lambda value: Holder(network=linear(value)),
        lambda value: Holder(mean=np.full(3, value)),
        lambda value: Holder(networks=[linear(0), linear(value)]),
        lambda value: Holder(weights={"first": torch.tensor(value), 2: torch.ones(1)}),
        lambda value: Holder(pipeline=SimpleNamespace(parts=({"net": linear(value)},))),
        lambda value: Network(hidden=[linear(value)]),
        lambda value: Network(hidden=torch.tensor([value])),
        lambda value: Slotted(linear(value)),
    ],
)
def test_other_weights_are_another_name(made: Callable[[float], Any]) -> None:
    assert name_of(made(1.0)) == name_of(made(1.0))
    assert name_of(made(1.0)) != name_of(made(2.0))


def test_names_that_studies_know_stay_the_same() -> None:
    """They are in the fingerprints of studies, which would not continue with another one."""
    held = Holder(net=nn.BatchNorm1d(2), shift=torch.arange(3.0), table=np.arange(4, dtype=np.int64), label="text")
    assert name_of(held) == "own-55e2b4fbc58486b3"
    assert name_of(Network()) == "own-660ffe5bc7cfc43f"
    network = nn.Sequential(linear(1.0), nn.ReLU())
    assert name_of(Holder(net=torch.fx.symbolic_trace(network))) == name_of(Holder(net=network))


def test_what_holds_itself_or_a_whole_library_ends() -> None:
    holder = Holder(library=torch, kind=nn.Linear, function=linear, ids={object(): torch.ones(2)})
    holder.itself, holder.all = holder, [holder]
    assert name_of(holder) == name_of(Holder(ids={object(): torch.ones(2)}))
