from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from lcsc_opt.sampling import layout

Clock = Callable[[Any, float, float], list[int]]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Sets how long a sampler's networks take, for an image and in each layout. Gives the images of their calls."""

    def set_clock(sampler: Any, contiguous: float, channels_last: float) -> list[int]:
        now = 0.0
        batches: list[int] = []

        def take_time(network: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], _: object) -> None:
            nonlocal now
            weight = next(parameter for parameter in network.parameters() if parameter.ndim == 4)
            images = next(iter((*arguments, *keywords.values())))
            now += len(images) * (contiguous if weight.is_contiguous() else channels_last)
            batches.append(len(images))

        for network in sampler.networks_to_lay_out:
            network.register_forward_hook(take_time, with_kwargs=True)
        monkeypatch.setattr(layout, "time", SimpleNamespace(perf_counter=lambda: now))
        return batches

    return set_clock
