"""Batch normalization of extractors is folded into convolutions where that changes rounding alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from lcsc_opt.metrics.extractors.base import image_gradient
from lcsc_opt.metrics.extractors.folding import fold
from tests.metrics.examples import found


class Block(nn.Module):
    """As networks have them: what comes in is added to what convolution and normalization make of it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.second = nn.BatchNorm2d(channels)  # the order of definition is not that of calls
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.second(self.first(x)))


class TakesTheConvolutionToo(Block):
    def forward(self, x: Tensor) -> Tensor:
        convolved = self.first(x)
        return convolved + torch.relu(self.second(convolved))


class NormalizesOthersToo(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(self.first(x))) + self.second(x)


class Extractor:
    name, dimension = "own", 8

    def __init__(self, block: type[Block] = Block) -> None:
        generator = torch.Generator().manual_seed(0)
        self.network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), block(8), block(8))
        for module in self.network.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                    assert tensor is not None
                    tensor.data.uniform_(0.5, 1.5, generator=generator)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.network.eval().requires_grad_(False)

    def __call__(self, images: Tensor) -> Tensor:
        weight = next(self.network.parameters())
        features: Tensor = self.network(images.to(weight)).mean((2, 3))
        return features

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self(images), self(images)[:, :4]


class CannotBeCopied(Extractor):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("it holds a file")


def images() -> Tensor:
    return 2 * torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(1)) - 1


def normalizations(extractor: Any) -> int:
    """How many of them run."""
    ran = []

    def note(module: nn.Module, *_: Any) -> None:
        if isinstance(module, nn.BatchNorm2d):
            ran.append(module)

    with register_module_forward_hook(note):
        extractor(images())
    return len(ran)


def assert_close(value: Tensor, expected: Tensor) -> None:
    assert float((value - expected).abs().max()) <= 1e-6 * float(expected.abs().max())


def test_normalization_after_a_convolution_is_folded_and_features_and_gradients_agree() -> None:
    plain = Extractor()
    extractor = found(Extractor())
    name = extractor.name
    assert_close(extractor(images()), plain(images()))
    assert normalizations(extractor) == 0
    assert extractor.name == name
    direction = torch.randn(4, 8, generator=torch.Generator().manual_seed(2))
    gradient = image_gradient(extractor, images(), direction)
    assert_close(gradient, image_gradient(plain, images(), direction))


def test_logits_come_from_the_folded_network_too() -> None:
    extractor = found(Extractor())
    _, logits = extractor.features_and_logits(images())
    assert_close(logits, Extractor()(images())[:, :4])
    assert normalizations(extractor) == 0


def test_the_object_that_the_user_made_stays_as_it_is() -> None:
    made = Extractor()
    before = copy.deepcopy(made.network.state_dict())
    found(made)(images())
    after = made.network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_an_extractor_that_is_first_called_in_inference_mode_has_a_gradient_later() -> None:
    extractor = found(Extractor())
    with torch.inference_mode():
        extractor(images())
    assert image_gradient(extractor, images(), torch.ones(4, 8)).abs().max() > 0


def in_training(made: Extractor) -> Extractor:
    for module in made.network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
            module.momentum = 0.0
    return made


def in_half_precision(made: Extractor) -> Extractor:
    made.network.bfloat16()
    return made


@pytest.mark.parametrize(
    "made",
    [
        Extractor(NormalizesOthersToo),
        Extractor(TakesTheConvolutionToo),
        CannotBeCopied(),
        in_training(Extractor()),
        in_half_precision(Extractor()),
    ],
    ids=["normalizes others too", "takes the convolution too", "cannot be copied", "in training", "in half precision"],
)
def test_where_a_fold_would_change_features_nothing_is_folded(made: Extractor) -> None:
    expected = made(images())
    extractor = found(made)
    torch.testing.assert_close(extractor(images()), expected, rtol=1e-5, atol=1e-6)
    assert normalizations(extractor) > 0


def test_weights_in_half_precision_are_not_rounded_again() -> None:
    made = in_half_precision(Extractor())
    assert not fold([made.network], lambda: made(images()))
    made.network.float()
    assert fold([made.network], lambda: made(images()))
