"""Rewards: functions that score single images, each as an extractor with one feature. Its mean is the metric."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lcsc_opt.base.errors import MetricError
from lcsc_opt.base.imports import has_parameter
from lcsc_opt.base.settings import excerpt


class Reward:
    """A function that scores images, as an extractor with one feature.

    Args:
        name: for messages and the fingerprint of a study.
        function: images ``[N, C, H, W]``, nominally in [−1, 1] and on their device as the sampler gives them → scores
            ``[N]``, higher is better. It also gets ``prompts``, a list of N texts, if it has a parameter of this name.
            Scores with a graph back to the images have a gradient.
        prompts: the prompts of the images, N texts.
    """

    dimension = 1

    def __init__(self, name: str, function: Callable[..., Any], prompts: Sequence[str] | None = None) -> None:
        self.name = name
        self.function = function
        self.prompts = prompts
        self._needs_prompts = has_parameter(function, "prompts")

    def about(self, prompts: Sequence[str] | None) -> Reward:
        """The same reward for images of these prompts."""
        return Reward(self.name, self.function, prompts)

    def __call__(self, images: Tensor) -> Tensor:
        """``[N, 1]`` scores of ``[N, C, H, W]``.

        Raises:
            MetricError: it asks for prompts and there are none, or returns no finite scores ``[N]``.
        """
        if not self._needs_prompts:
            result = self.function(images)
        elif self.prompts is not None:
            result = self.function(images, prompts=list(self.prompts))
        else:
            raise MetricError(f"reward {self.name}: it needs prompts, and the sampler has none")
        scores = self._checked(result, len(images))
        return scores[:, None].to(torch.promote_types(scores.dtype, torch.float32))

    def _checked(self, result: Any, count: int) -> Tensor:
        """The result of the function, a tensor, an array or a list, as finite scores ``[count]``."""
        try:
            scores = torch.as_tensor(result)
        except (TypeError, ValueError, RuntimeError) as error:
            raise MetricError(
                f"reward {self.name}: returned {excerpt(result)}, expected {count} scores, [{count}]"
            ) from error
        if scores.shape != (count,):
            raise MetricError(
                f"reward {self.name}: returned the shape {list(scores.shape)}, expected {count} scores, [{count}]"
            )
        if not bool(torch.isfinite(scores).all()):
            raise MetricError(f"reward {self.name}: returned a score that is not finite")
        return scores
