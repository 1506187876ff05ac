"""The contract of samplers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from lcsc_opt.base.records import Noise


class Sampler(Protocol):
    """A model, and a way to sample images from it."""

    @property
    def nfe(self) -> int:
        """Number of function evaluations: model calls per image."""
        ...

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Put merged weights, name → tensor, into the model; names and shapes must match it."""
        ...

    def sample(self, noise: Noise, start: int, stop: int) -> Tensor:
        """Images ``start`` to ``stop`` of a group of noise: ``[stop - start, C, H, W]``, in [-1, 1].

        An image depends only on its index, the group and the weights, not on the other images of a call.
        """
        ...

    def describe(self) -> dict[str, object]:
        """Every setting that changes the images, for the study's fingerprint."""
        ...
