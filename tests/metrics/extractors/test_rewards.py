"""Rewards: a user's function, and what it may not return."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics.extractors.rewards import Reward

PROMPTS = ["a cat", "two dogs, old"]


def images() -> Tensor:
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "returned None"),
        (torch.zeros(2, 1), r"the shape \[2, 1\], expected 2 scores"),
        ([1.0, float("nan")], "not finite"),
    ],
)
def test_what_is_no_score_of_each_image_is_refused(returned: Any, message: str) -> None:
    with pytest.raises(MetricError, match=f"^reward my:f: .*{message}"):
        Reward("my:f", lambda images: returned)(images())


def test_lists_are_scores_without_a_graph() -> None:
    found = Reward("my:f", lambda images, prompts: [len(one) for one in prompts]).about(PROMPTS)(images())
    assert found.tolist() == [[5.0], [13.0]]
    assert not found.requires_grad


def test_prompts_that_a_sampler_has_not_are_asked_for() -> None:
    with pytest.raises(MetricError, match="needs prompts, and the sampler has none"):
        Reward("my:f", lambda images, prompts: [len(one) for one in prompts])(images())
