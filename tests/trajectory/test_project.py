"""The gradient in the coefficients against a dense matrix and against finite differences of a merge."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lcsc_opt.trajectory import Trajectory
from tests.trajectory.trajectory_examples import COMBINED, STEPS, make_trajectory, state_dict

K = len(STEPS)


def gradients_like(tensors: dict[str, Tensor], names: tuple[str, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)
    return {name: torch.randn(tensors[name].shape, generator=generator, dtype=dtype) / 20 for name in names}


def dense(gradients: dict[str, Tensor]) -> np.ndarray:
    """The same with one float64 matrix of all checkpoints."""
    rows = [torch.cat([state_dict(step)[name].double().reshape(-1) for name in gradients]) for step in STEPS]
    return (torch.stack(rows) @ torch.cat([gradient.double().reshape(-1) for gradient in gradients.values()])).numpy()


@pytest.mark.parametrize("names", [COMBINED, ("weight",), ("double",), ("scale", "half")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_matrix_of_checkpoints_times_the_gradient(
    trajectory: Trajectory, names: tuple[str, ...], dtype: torch.dtype
) -> None:
    gradients = gradients_like(state_dict(STEPS[0]), names, dtype)
    projected = trajectory.project(gradients)
    assert projected.dtype == np.float64
    assert projected.shape == (K,)
    tolerance = 1e-14 if names == ("double",) else 3e-6
    np.testing.assert_allclose(projected, dense(gradients), rtol=0, atol=tolerance)


def test_what_a_merge_does_not_combine_counts_as_zero(trajectory: Trajectory) -> None:
    state = state_dict(STEPS[0])
    copied = {name: torch.ones(state[name].shape) for name in ("constant", "batches", "flags", "index", "nothing")}
    assert trajectory.project(copied).tolist() == [0.0] * K
    assert trajectory.project({}).tolist() == [0.0] * K
    gradients = gradients_like(state, COMBINED, torch.float32)
    assert np.array_equal(trajectory.project(gradients | copied), trajectory.project(gradients))


@pytest.mark.parametrize("rows", [700, 200_000], ids=["one tile", "two tiles"])
def test_blocks_and_free_slots_change_nothing(tmp_path: Path, rows: int) -> None:
    weights = torch.arange(3.0 * rows).view(rows, 3) / rows
    trajectory = make_trajectory(tmp_path / "run", weights=lambda step: {"weight": step + weights}, keep_last=3)
    gradient = torch.randn(rows, 3, generator=torch.Generator().manual_seed(0))
    expected = [float((trajectory.checkpoint(i)["weight"].double() * gradient.double()).sum()) for i in range(3)]
    added = 200 * float(gradient.abs().sum())  # 200 steps apart; processors differ in how they round sums
    np.testing.assert_allclose(trajectory.project({"weight": gradient}), expected, rtol=0, atol=1e-7 * added)


def test_what_checkpoints_have_in_common_costs_no_digits(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    common = 1 + torch.rand(100_000, generator=generator)
    rows = [common + 1e-4 * torch.randn(100_000, generator=generator) for _ in range(4)]
    trajectory = make_trajectory(tmp_path / "close", range(4), weights=lambda step: {"weight": rows[step]})
    gradient = torch.rand(100_000, generator=generator)
    projected = trajectory.project({"weight": gradient})
    exact = np.array([float(row.double() @ gradient.double()) for row in rows])
    np.testing.assert_allclose(projected - projected.mean(), exact - exact.mean(), rtol=2e-5)


def test_it_works_where_callers_disable_gradients_or_asked_for_inference(trajectory: Trajectory) -> None:
    gradients = gradients_like(state_dict(STEPS[0]), COMBINED, torch.float32)
    expected = trajectory.project(gradients)
    with torch.inference_mode():
        assert np.array_equal(trajectory.project(gradients), expected)
    assert np.array_equal(trajectory.project({n: g.requires_grad_() for n, g in gradients.items()}), expected)
