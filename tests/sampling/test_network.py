from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.sampling import NetworkSettings, load_weights
from lcsc_opt.sampling.network import PreparedNetwork, unshared

IMAGES = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("dtype", "tolerance"), [("bf16", 0.03), ("fp16", 0.004)])
def test_half_precision_is_close_and_not_equal(dtype: Any, tolerance: float) -> None:
    exact, half = (
        PreparedNetwork(_Small(0), NetworkSettings(device="cpu", dtype=some))(IMAGES) for some in ("fp32", dtype)
    )
    assert half.dtype == torch.float32
    assert 1e-5 < float(((half - exact).norm() / exact.norm()).detach()) < tolerance


class _Small(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 1)
        nn.init.normal_(self.layer.weight, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.layer.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x)) * x


@pytest.mark.parametrize("best", ["cpu", "cuda", "mps"])
def test_auto_takes_the_best_device_there_is(set_devices: Any, best: str) -> None:
    set_devices(*([f"{best}:0"] if best != "cpu" else []))
    assert NetworkSettings().torch_device() == torch.device(best)


@pytest.mark.parametrize(("device", "gpus"), [("cuda", 0), ("cuda:2", 2), ("gpu", 0), ("cuda:x", 1), ("meta", 0)])
def test_a_device_that_is_not_there_is_refused(set_devices: Any, device: str, gpus: int) -> None:
    set_devices(*(f"cuda:{index}" for index in range(gpus)))
    with pytest.raises(ObjectiveError, match=f"device: {device} is not available; expected auto or one of cpu"):
        NetworkSettings(device=device).torch_device()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("layer.bias"), "a checkpoint lacks 'layer.bias';"),
        (lambda w: w.update(a=torch.ones(1), b=torch.ones(1)), "has also 'a' and 1 more;"),
        (lambda w: w.update({"layer.bias": torch.ones(2)}), r"has 'layer.bias' as \[2\] and not \[1\];"),
    ],
)
def test_weights_that_do_not_fit_are_named_and_nothing_is_loaded(change: Any, message: str) -> None:
    network = PreparedNetwork(_Small(0), NetworkSettings(device="cpu"))
    weights = _Small(1).state_dict()
    change(weights)
    with pytest.raises(ObjectiveError, match=f"do not fit the network: .*{message}"):
        load_weights(network.trained, weights)
    assert torch.equal(network.module.layer.weight, _Small(0).layer.weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, None), lambda x: SimpleNamespace(sample=x)])
def test_outputs_are_unwrapped(wrap: Any) -> None:
    module = _Small(0)
    module.forward = lambda x: wrap(2 * x)  # type: ignore[method-assign]
    network = PreparedNetwork(module, NetworkSettings(device="cpu"))
    assert torch.equal(network(IMAGES), 2 * IMAGES)


class _Averaging(torch.nn.Module):
    """Keeps averages, and puts them in by eval(), as wrappers of flow matching's examples do."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Linear(2, 1, bias=False)
        self.average = torch.nn.Parameter(torch.zeros(1, 2), requires_grad=False)

    def train(self, mode: bool = True) -> _Averaging:
        if self.training and not mode:
            self.model.weight.data.copy_(self.average)
        return super().train(mode)


def test_averages_that_eval_puts_in_are_those_of_the_weights_that_are_loaded() -> None:
    network = PreparedNetwork(_Averaging())
    for value in (3.0, 5.0):
        network.load({"model.weight": torch.ones(1, 2), "average": torch.full((1, 2), value)})
        assert network.module.model.weight.tolist() == [[value, value]]
    assert "eval() of the network puts other weights" in str(network.weights.why_no_gradient(["model.weight"]))
    plain = PreparedNetwork(torch.nn.Linear(2, 1))
    plain.load({"weight": torch.ones(1, 2), "bias": torch.ones(1)})
    assert plain.weights.why_no_gradient(["weight"]) is None


class _OfItsOwnMode(nn.Module):
    """As networks that keep a part of them in evaluation mode while they train."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.drop = nn.Dropout(0.5)

    def train(self, mode: bool = True) -> _OfItsOwnMode:
        super().train(mode)
        return self

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.drop(self.linear(x))
        return output


def _adapted() -> nn.Module:
    peft = pytest.importorskip("peft")
    adapted: nn.Module = peft.get_peft_model(_OfItsOwnMode(), peft.LoraConfig(r=2, target_modules=["linear"]))
    return adapted


@pytest.mark.parametrize("make", [_OfItsOwnMode, _adapted, lambda: nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))])
def test_every_kind_of_network_is_in_evaluation_mode_after_it_got_its_weights(make: Any) -> None:
    network = PreparedNetwork(make(), NetworkSettings(device="cpu"))
    weights = {name: tensor.detach().clone() for name, tensor in network.weights.state.items()}
    for _ in range(2):
        network.load(weights)
        assert not any(module.training for module in network.module.modules())
        network.module.train()  # as a user's function may leave it


def test_a_network_that_somebody_else_holds_is_copied() -> None:
    held = nn.Linear(2, 2)
    holders: dict[str, Any] = {"net": held}
    assert unshared(holders["net"]) is not held
    assert torch.equal(unshared(held).state_dict()["weight"], held.weight)
    fresh = nn.Linear(2, 2)
    assert unshared(fresh) is fresh


def _with_a_bound_weight(backbone: nn.Linear) -> nn.Module:
    network = nn.Linear(2, 2)
    network.weight = backbone.weight
    return network


@pytest.mark.parametrize(
    "build",
    [
        lambda backbone: nn.Sequential(backbone, nn.Linear(2, 2)),
        lambda backbone: nn.ModuleDict({"in": nn.Sequential(nn.Sequential(backbone))}),
        _with_a_bound_weight,
    ],
)
def test_a_network_of_which_somebody_else_holds_a_part_is_copied(build: Callable[[nn.Module], nn.Module]) -> None:
    backbone = nn.Linear(2, 2)
    before = backbone.weight.detach().clone()
    network = PreparedNetwork(unshared(build(backbone)), NetworkSettings(device="cpu"))
    network.load({name: torch.zeros_like(tensor) for name, tensor in network.weights.state.items()})
    assert torch.equal(backbone.weight, before)
    assert backbone.training


def test_a_network_that_nobody_else_holds_is_not_copied() -> None:
    tied = nn.Linear(2, 2)
    fresh = nn.Sequential(tied, nn.BatchNorm1d(2), nn.Sequential(nn.Conv2d(1, 1, 1)), tied)
    del tied
    assert unshared(fresh) is fresh


class WithOptimizer(nn.Linear):
    """As tianshou's algorithms: its state dict has the states of its optimizers, and it asks for them again."""

    def state_dict(self, *args: Any, **keywords: Any) -> Any:
        return {**super().state_dict(*args, **keywords), "_optimizers": [{"lr": 0.1}]}

    def load_state_dict(self, state_dict: Any, *args: Any, **keywords: Any) -> Any:
        state_dict = dict(state_dict)
        assert state_dict.pop("_optimizers") == [{"lr": 0.1}]
        return super().load_state_dict(state_dict, *args, **keywords)


def test_a_network_whose_state_dict_holds_more_than_tensors_is_loaded() -> None:
    network = WithOptimizer(2, 1)
    load_weights(network, {"weight": torch.ones(1, 2), "bias": torch.zeros(1)})
    assert network.weight.tolist() == [[1.0, 1.0]]
    with pytest.raises(ObjectiveError, match="lacks 'bias'"):
        load_weights(network, {"weight": torch.ones(1, 2)})
