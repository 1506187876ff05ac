"""A row of coefficients for each group of tensors: merged and projected as if each group were a trajectory."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.coefficients.layer_groups import LayerGroups
from lcsc_opt.trajectory import Trajectory
from tests.trajectory.test_project import dense, gradients_like
from tests.trajectory.trajectory_examples import COMBINED, STEPS, same_bits, state_dict

ROWS = np.array([[0.9, -0.4, 0.2, 0.1, 0.2], [0.0, 1.5, 0.0, -0.5, 0.0], [0.0, 0.0, 1.0, 0.0, 0.0]])
ROW_OF = {"weight": 0, "double": 0, "batches": 0, "bias": 1, "bfloat": 1, "scale": 2, "half": 2, "index": 2}


@pytest.fixture
def grouped(trajectory: Trajectory, small_tiles: None) -> Trajectory:
    return trajectory.in_groups(LayerGroups(("first", "second", "third"), ROW_OF, "layers"))


@pytest.mark.parametrize("how", ["mapped", "streamed"])
def test_each_tensor_is_merged_with_the_row_of_its_group(grouped: Trajectory, how: str) -> None:
    placed = grouped.on("cpu", how=how)  # type: ignore[arg-type]
    merged = placed.merge(ROWS)
    alone = [grouped.in_rows(None).merge(row) for row in ROWS]
    assert set(merged) == set(state_dict(STEPS[0]))
    for name, row in ROW_OF.items():
        torch.testing.assert_close(merged[name], alone[row][name], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(placed.merge(ROWS[::-1])["weight"], alone[2]["weight"])


def test_equal_rows_have_the_bits_of_one(grouped: Trajectory) -> None:
    row = ROWS[0]
    alone = grouped.in_rows(None).merge(row)
    assert same_bits(grouped.merge(np.stack([row] * 3)), alone)
    assert same_bits(grouped.merge(row), alone)


def test_projections_are_those_of_each_group(grouped: Trajectory) -> None:
    gradients = gradients_like(state_dict(STEPS[0]), COMBINED, torch.float64)
    projections = pickle.loads(pickle.dumps(grouped)).project(gradients)
    for row, projected in enumerate(projections):
        gradients_of_row = {name: gradient for name, gradient in gradients.items() if ROW_OF[name] == row}
        np.testing.assert_allclose(projected, dense(gradients_of_row), rtol=0, atol=1e-5)
    np.testing.assert_allclose(projections.sum(axis=0), grouped.in_rows(None).project(gradients), rtol=0, atol=1e-5)


def test_rows_for_other_groups_are_refused(grouped: Trajectory, tmp_path: object) -> None:
    with pytest.raises(StudySpecError, match=r"shape \[2, 5\]; expected \[5\] or \[3, 5\]"):
        grouped.merge(ROWS[:2])
    with pytest.raises(StudySpecError, match=r"expected \[5\]"):
        grouped.in_rows(None).merge(ROWS)
