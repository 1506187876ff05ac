"""What an objective asks of the checkpoints that it merges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lcsc_opt.base.records import Coefficients


class Combinable(Protocol):
    """What candidates are merged from: a trajectory, or one whose LoRA products are combined."""

    @property
    def steps(self) -> tuple[int, ...]:
        """``[K]`` training steps."""
        ...

    @property
    def sha256(self) -> str:
        """The identity of what is combined, and how."""
        ...

    @property
    def touched(self) -> bool:
        """Whether the weights were written again since the identity was computed."""
        ...

    def verify(self) -> None:
        """Compare the weights with the hashes that the identity is made of; raises where they differ."""
        ...

    def merge(self, coefficients: npt.ArrayLike | Tensor) -> dict[str, Tensor]:
        """The combination for ``[K]`` coefficients that sum to one."""
        ...

    def gram(self) -> npt.NDArray[np.float64]:
        """``[K, K]`` inner products of the centered checkpoints."""
        ...


@runtime_checkable
class DifferentiableCombinable(Combinable, Protocol):
    """One whose merge is linear in the coefficients."""

    @property
    def varying(self) -> frozenset[str]:
        """The names of the tensors that are not the same in all checkpoints."""
        ...

    def project(self, gradients: Mapping[str, Tensor]) -> Coefficients:
        """The gradient in the merged tensors, by name → the gradient in the coefficients, ``[K]``."""
        ...
