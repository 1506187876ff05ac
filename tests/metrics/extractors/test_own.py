"""The name of a user's own extractor follows the weights in its attributes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.metrics.examples import found


class Counting(nn.Module):
    """A module with state that is no tensor, as some quantized layers have."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(value))

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}


class Holder:
    name, dimension = "own", 4

    def __init__(self, **held: Any) -> None:
        vars(self).update(held)

    def __call__(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :4]


def linear(value: float) -> nn.Linear:
    network = nn.Linear(2, 2)
    nn.init.constant_(network.weight, value)
    nn.init.zeros_(network.bias)
    return network


def name_of(made: Any) -> str:
    return str(found(made).name)


@pytest.mark.parametrize(
    "made",
    [
        lambda value: Holder(network=linear(value)),
        lambda value: Holder(network=Counting(value)),
        lambda value: Holder(mean=np.full(3, value)),
        lambda value: Holder(scale=torch.tensor(value)),
        lambda value: Holder(networks=[linear(1.0), linear(value)]),
        lambda value: Holder(scales={"blue": torch.tensor(value)}),
    ],
)
def test_other_weights_are_another_name(made: Callable[[float], Any]) -> None:
    assert name_of(made(1.0)) == name_of(made(1.0))
    assert name_of(made(1.0)) != name_of(made(2.0))


def read_only(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    array.setflags(write=False)
    return array


@pytest.mark.parametrize(
    "array",
    [
        np.array(["cat", "dog"]),
        np.array([None, 1], dtype=object),
        np.arange(3.0)[::-1],
        np.arange(3, dtype=">f4"),
        read_only(np.arange(3.0)),
    ],
)
def test_any_array_may_be_an_attribute(array: np.ndarray[Any, Any]) -> None:
    assert name_of(Holder(array=array)) == name_of(Holder(array=array.copy()))


def test_what_the_extractor_offers_is_offered() -> None:
    def both(images: Tensor) -> tuple[Tensor, Tensor]:
        return images.flatten(1)[:, :4], images.flatten(1)[:, :2]

    wrapped = found(Holder(features_and_logits=both, graph_bytes=3, in_words="mine"))
    assert wrapped.features_and_logits(torch.ones(1, 1, 2, 2))[1].shape == (1, 2)
    assert (vars(wrapped)["graph_bytes"], vars(wrapped)["in_words"]) == (3, "mine")
    assert not hasattr(found(Holder()), "features_and_logits")
