from __future__ import annotations

import torch
from torch import nn

from lcsc_opt.base.records import CHANNELS_LAST, CONTIGUOUS
from lcsc_opt.sampling.layout import has_layouts, lay_out
from tests.unet_examples import unet


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
            lay_out(network, layout)
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
