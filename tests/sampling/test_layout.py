from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import nn

from lcsc_opt.base.records import CHANNELS_LAST, CONTIGUOUS, Noise
from lcsc_opt.sampling.base import ModuleWeights
from lcsc_opt.sampling.layout import fastest_layout, has_layouts, lay_out
from tests.sampling.conftest import Clock
from tests.unet_examples import unet


class OneNetwork:
    """Samples by calls of a network, whose layout may be chosen."""

    recomputed = 0

    def __init__(self, network: nn.Module, nfe: int = 1) -> None:
        self.network = network
        self.nfe = nfe
        self.networks_to_lay_out = (network,)
        self.weights = ModuleWeights(network)

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        self.network.load_state_dict(dict(weights))

    def sample(self, noise: Noise, start: int, stop: int) -> torch.Tensor:
        images = torch.ones(stop - start, 3, 4, 4)
        for _ in range(self.nfe):
            output: torch.Tensor = self.network(images)
        return output

    def describe(self) -> dict[str, object]:
        return {}


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(
    ("contiguous", "channels_last", "expected"),
    [(0.1, 0.05, (CHANNELS_LAST, 0.5)), (0.1, 0.097, (CONTIGUOUS, 1.0)), (0.05, 0.1, (CONTIGUOUS, 1.0))],
)
def test_the_faster_layout_is_chosen_if_it_gains_enough(
    clock: Clock, gradient: bool, contiguous: float, channels_last: float, expected: tuple[str, float]
) -> None:
    sampler = OneNetwork(nn.Conv2d(3, 4, 3))
    clock(sampler, contiguous, channels_last)
    layout, relative = fastest_layout(sampler, trial_images=100, gradient=gradient)
    assert (layout, round(relative, 6)) == expected
    assert sampler.network.get_parameter("weight").is_contiguous()
    assert sampler.network.get_parameter("weight").grad is None


@pytest.mark.parametrize(("seconds", "is_said"), [(1.0, True), (0.02, False)])
def test_a_measurement_that_takes_long_is_said_before_it(
    clock: Clock, caplog: pytest.LogCaptureFixture, seconds: float, is_said: bool
) -> None:
    caplog.set_level("INFO", logger="lcsc_opt")
    sampler = OneNetwork(nn.Conv2d(3, 4, 3))
    clock(sampler, seconds, seconds)
    fastest_layout(sampler, trial_images=100, gradient=False)
    assert any("timing in which layout" in message for message in caplog.messages) == is_said


def test_short_trials_are_not_worth_the_measurement(clock: Clock) -> None:
    sampler = OneNetwork(nn.Conv2d(3, 4, 3))
    batches = clock(sampler, 0.01, 0.001)
    assert fastest_layout(sampler, trial_images=20, gradient=False) == (CONTIGUOUS, 1.0)
    assert set(batches) == {1}


@pytest.mark.parametrize("gradient", [False, True])
def test_many_steps_are_timed_by_a_call_with_several_images(clock: Clock, gradient: bool) -> None:
    """Fifty steps of one image, and then as many calls as of one step."""
    sampler = OneNetwork(nn.Conv2d(3, 4, 3), nfe=50)
    batches = clock(sampler, 0.01, 0.005)
    assert fastest_layout(sampler, trial_images=100, gradient=gradient)[0] == CHANNELS_LAST
    assert batches[:50] == [1] * 50
    assert len(batches) <= 80
    assert batches[-1] > 1


@pytest.mark.parametrize("by_keyword", [False, True])
def test_what_goes_with_the_images_is_repeated_with_them(by_keyword: bool, clock: Clock) -> None:
    """However a sampler calls its network: some pipelines name every argument."""

    class Conditioned(nn.Conv2d):
        def forward(self, images: torch.Tensor, *, conditions: Mapping[str, torch.Tensor]) -> torch.Tensor:
            assert {len(condition) for condition in conditions.values()} == {len(images)}
            return super().forward(images)

    class WithConditions(OneNetwork):
        def sample(self, noise: Noise, start: int, stop: int) -> torch.Tensor:
            count = stop - start
            conditions = {"labels": torch.zeros(count), "text": torch.zeros(count, 7, 5)}
            images = torch.ones(count, 3, 4, 4)
            if by_keyword:
                output: torch.Tensor = self.network(images=images, conditions=conditions)
            else:
                output = self.network(images, conditions=conditions)
            return output

    sampler = WithConditions(Conditioned(3, 4, 3))
    batches = clock(sampler, 0.01, 0.01)
    fastest_layout(sampler, trial_images=100, gradient=False)
    assert max(batches) > 1


def test_a_layout_in_which_images_are_others_is_not_chosen(clock: Clock) -> None:
    class Bound(nn.Conv2d):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            scale = 2.0 if self.weight.is_contiguous(memory_format=torch.channels_last) else 1.0
            return scale * super().forward(images)

    sampler = OneNetwork(Bound(3, 4, 3))
    clock(sampler, 0.1, 0.05)
    assert fastest_layout(sampler, trial_images=100, gradient=False) == (CONTIGUOUS, 1.0)


def test_convolutions_and_what_they_give_lie_as_they_are_told_and_stay_the_same_tensors() -> None:
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([1, 50, 999])
    network = unet(channels=3)
    tensors = dict(network.named_parameters())
    seen: list[bool] = []
    network.conv_in.register_forward_hook(
        lambda module, inputs, output: seen.extend(
            tensor.is_contiguous(memory_format=torch.channels_last) for tensor in (module.weight, output)
        )
    )
    with torch.inference_mode():
        expected = network(images, times).sample
        for layout in (CHANNELS_LAST, CONTIGUOUS):
            lay_out([OneNetwork(network)], layout)
            torch.testing.assert_close(network(images, times).sample, expected)
    assert seen == [False, False, True, True, False, False]
    assert all(tensors[name] is parameter for name, parameter in network.named_parameters())
    network(images, times).sample.sum().backward()  # also after a layout that was given in inference mode


def test_there_is_a_choice_where_convolutions_are_contiguous_and_not_compiled() -> None:
    assert has_layouts(unet())
    assert not has_layouts(nn.Linear(2, 2))
    of_its_author = unet().to(memory_format=torch.channels_last)
    assert not has_layouts(of_its_author)
    compiled = unet()
    compiled.compile(backend="eager")
    assert not has_layouts(compiled)
