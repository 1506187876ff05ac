"""The exact combination of LoRA products, Σ a_i ΔW_i with ΔW_i = alpha_i / r · up_i · down_i, as a LoRA again.

Combining the factors one by one, as the paper does, gives (Σ a_i up_i) (Σ a_i down_i), which holds products of factors
of different checkpoints. Here the changes of the weights themselves are combined, and factored again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.lora import LoraAlphas, LoraModule, check_factors, lora_modules
from lcsc_opt.coefficients.profiles import check_coefficients
from lcsc_opt.trajectory.disk.tiles import accumulator
from lcsc_opt.trajectory.lora import trajectory_alphas
from lcsc_opt.trajectory.merge.combining import StateDict
from lcsc_opt.trajectory.merge.merging import full_precision
from lcsc_opt.trajectory.store import Trajectory


@dataclasses.dataclass(frozen=True, eq=False)
class Refactored:
    """``up [out, R]`` and ``down [R, n]`` float64 with ``up @ down`` the sum; ``lost`` and ``total`` squared norms."""

    up: Tensor
    down: Tensor
    lost: float
    total: float


class LoraProducts:
    """A trajectory of LoRA checkpoints whose products are combined, with the interface of a trajectory.

    A merged LoRA has the names of the checkpoints, float32 factors (float64 where they are), and alpha = rank. The rank
    of a module is the same for all coefficients, so that one adapter takes every candidate.

    Args:
        trajectory: of a LoRA in any flavour.
        rank: of the merged LoRA, at most; ``None`` keeps the sum exact, with rank min(K · r, in, out).
        alphas: where the tensors do not hold them; ``None`` reads them beside the sources.
        device: where the sums are computed, in float64.

    Raises:
        TrajectoryError: not a LoRA of two factors a module, or alphas that are nowhere.
    """

    def __init__(
        self,
        trajectory: Trajectory,
        *,
        rank: int | None = None,
        alphas: LoraAlphas | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if rank is not None and rank < 1:
            raise TrajectoryError(f"rank: expected at least 1, got {rank}.")
        self.trajectory, self.rank = trajectory, rank
        self._modules = lora_modules(trajectory.names)
        self._shapes = {spec.name: spec.shape for spec in trajectory.tensors}
        self._dtypes = {spec.name: accumulator(spec.torch_dtype) for spec in trajectory.tensors}
        for module in self._modules:
            check_factors(module, self._shapes[module.down], self._shapes[module.up])
        self._scales = self._read_scales(trajectory_alphas(trajectory) if alphas is None else alphas)
        self._truncation_error = 0.0
        self._device = torch.device("cpu" if torch.device(device).type == "mps" else device)  # Apple's has no float64

    def __len__(self) -> int:
        return len(self.trajectory)

    @property
    def path(self) -> Path:
        """Of the trajectory."""
        return self.trajectory.path

    @property
    def steps(self) -> tuple[int, ...]:
        """The training step of each checkpoint, ``[K]``."""
        return self.trajectory.steps

    @property
    def sha256(self) -> str:
        """The identity of the trajectory, the rank and the alphas."""
        scales = [(module.name, self._scales[module.name].tolist()) for module in self._modules]
        described = [self.trajectory.sha256, "products", self.rank, scales]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()

    @property
    def touched(self) -> bool:
        """Whether the trajectory's files are others than those that were written."""
        return self.trajectory.touched

    def verify(self) -> None:
        """Compare the trajectory's bytes with their hashes.

        Raises:
            TrajectoryError: they are damaged.
        """
        self.trajectory.verify()

    @property
    def truncation_error(self) -> float:
        """Of the last merge: ‖Σ a_i ΔW_i − what it returned‖ / ‖Σ a_i ΔW_i‖ over all modules; 0 where rank is exact."""
        return self._truncation_error

    def merged_rank(self, module: LoraModule) -> int:
        """The rank that a merge gives to ``module``."""
        rank, columns = self._shapes[module.down][0], math.prod(self._shapes[module.down][1:])
        exact = min(len(self) * rank, columns, self._shapes[module.up][0])
        return exact if self.rank is None else min(self.rank, exact)

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def merge(self, coefficients: npt.ArrayLike | Tensor) -> StateDict:
        """The LoRA whose ΔW is Σ a_i ΔW_i, for coefficients ``[K]`` that sum to one.

        Below the exact rank it is the nearest one of its rank in the Frobenius norm (truncated SVD), module by module.

        Raises:
            CoefficientsError: as :meth:`Trajectory.merge`.
            TrajectoryError: a checkpoint was overwritten since opening.
        """
        row = check_coefficients(coefficients, len(self))
        merged: StateDict = {}
        lost = total = 0.0
        with torch.autocast("cpu", enabled=False), full_precision():
            for module in self._modules:
                downs, ups = self._stacks(module)
                result = refactor(downs, ups, row * self._scales[module.name], self.merged_rank(module))
                merged |= self._named(module, result)
                lost, total = lost + result.lost, total + result.total
        self._truncation_error = math.sqrt(lost / total) if total else 0.0
        return merged

    def gram(self) -> npt.NDArray[np.float64]:
        """Inner products of the centered ΔW_i: ``[K, K]`` float64, without forming one of them."""
        total = torch.zeros(len(self), len(self), dtype=torch.float64, device=self._device)
        for module in self._modules:
            downs, ups = self._stacks(module)
            scales = torch.from_numpy(self._scales[module.name]).to(self._device)
            total += scales[:, None] * product_gram(downs, ups) * scales[None, :]
        centered = total - total.mean(dim=0, keepdim=True)
        return (centered - centered.mean(dim=1, keepdim=True)).cpu().numpy()

    def _stacks(self, module: LoraModule) -> tuple[Tensor, Tensor]:
        """``downs [K, r, n]`` and ``ups [K, out, r]`` float64 of one module."""
        downs, ups = (self.trajectory.stacked(name).to(self._device).double() for name in (module.down, module.up))
        return downs.flatten(2), ups.flatten(2)

    def _read_scales(self, alphas: LoraAlphas) -> dict[str, npt.NDArray[np.float64]]:
        """Module → alpha / rank of each checkpoint, ``[K]``."""
        scales = {}
        for module in self._modules:
            rank = self._shapes[module.down][0]
            if module.alpha is None:
                values = np.full(len(self), alphas.of(module, rank))
            else:
                values = self.trajectory.stacked(module.alpha).double().numpy().reshape(len(self))
            scales[module.name] = values / rank
        return scales

    def _named(self, module: LoraModule, result: Refactored) -> StateDict:
        down, up = self._shapes[module.down], self._shapes[module.up]
        rank = len(result.down)
        named = {
            module.down: result.down.reshape(rank, *down[1:]).to("cpu", self._dtypes[module.down]),
            module.up: result.up.reshape(up[0], rank, *up[2:]).to("cpu", self._dtypes[module.up]),
        }
        if module.alpha is not None:
            named[module.alpha] = torch.tensor(float(rank))
        return named


def product_gram(downs: Tensor, ups: Tensor) -> Tensor:
    """``[K, K]`` inner products of ups[i] @ downs[i]: the traces of (upᵢᵀ upⱼ) (downⱼ downᵢᵀ).

    Args:
        downs: ``[K, r, n]`` float64.
        ups: ``[K, out, r]`` float64.
    """
    right = downs.flatten(0, 1)  # [K r, n]
    left = ups.permute(1, 0, 2).flatten(1)  # [out, K r]
    rows = [
        ((up.t() @ left) * (down @ right.t())).sum(dim=0).view(len(downs), -1).sum(dim=1)
        for up, down in zip(ups, downs, strict=True)
    ]
    return torch.stack(rows)


def refactor(downs: Tensor, ups: Tensor, weights: npt.NDArray[np.float64], rank: int) -> Refactored:
    """Factors of Σ w_i ups[i] @ downs[i], without forming it where the factors are smaller than it is.

    With the factors side by side, L = [w_1 ups_1 … w_K ups_K] and R = [downs_1; …; downs_K], the sum is L R.

    Args:
        downs: ``[K, r, n]`` float64.
        ups: ``[K, out, r]`` float64.
        weights: ``[K]``.
        rank: of the result; a sum of a lower one is filled up with zeros.
    """
    used = np.flatnonzero(weights)
    scaled = ups[used] * torch.from_numpy(weights[used]).to(ups.device)[:, None, None]
    left = scaled.permute(1, 0, 2).flatten(1)  # [out, k r]
    right = downs[used].flatten(0, 1)  # [k r, n]
    if right.shape[1] <= left.shape[0]:
        up, down, lost, total = _shrink(left, right, rank)
    else:  # the same of the transposed sum
        right, left, lost, total = _shrink(right.t(), left.t(), rank)
        up, down = left.t(), right.t()
    balance, missing = _balance(up, down), rank - len(down)
    up, down = functional.pad(up / balance, (0, missing)), functional.pad(down * balance, (0, 0, 0, missing))
    return Refactored(up, down, lost, total)


def _shrink(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """``left [o, m] @ right [m, n]``, n ≤ o, with at most ``rank`` columns and rows between, and the squared norms.

    With orthonormal rows on the right, the eigenvectors of the left side's Gram matrix are the right singular vectors
    of the product.
    """
    left, right = _orthonormal(left, right)
    if len(right) <= rank:
        return left, right, 0.0, float(left.square().sum())
    values, vectors = torch.linalg.eigh(left.t() @ left)
    kept = vectors[:, -rank:]
    return left @ kept, kept.t() @ right, float(values[:-rank].clamp(min=0).sum()), float(values.sum())


def _orthonormal(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with orthonormal rows on the right, at most n of them.

    QR of rightᵀ = Q T gives (left Tᵀ) Qᵀ. Where right has n rows or more, the product itself is the smaller left side.
    """
    rows, columns = right.shape
    if rows >= columns:
        return left @ right, torch.eye(columns, dtype=right.dtype, device=right.device)
    q, t = torch.linalg.qr(right.t())
    return left @ t.t(), q.t()


def _balance(up: Tensor, down: Tensor) -> float:
    """A power of two that makes ``up / balance`` and ``down * balance`` about as large, for narrow dtypes."""
    ratio = float(up.norm() / down.norm())
    return 2.0 ** round(math.log2(ratio) / 2) if ratio > 0 else 1.0
