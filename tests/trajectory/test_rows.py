"""A row of coefficients for each group of tensors: merged and projected as if each group were a trajectory."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

import lcsc_opt
from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.study_spec import Rule
from lcsc_opt.coefficients.layer_groups import LayerGroups, TensorRows
from lcsc_opt.trajectory import Trajectory, merge
from tests.trajectory.test_project import dense, gradients_like
from tests.trajectory.trajectory_examples import COMBINED, STEPS, same_bits, state_dict

ROWS = np.array([[0.9, -0.4, 0.2, 0.1, 0.2], [0.0, 1.5, 0.0, -0.5, 0.0], [0.0, 0.0, 1.0, 0.0, 0.0]])
ROW_OF = {"weight": 0, "double": 0, "batches": 0, "bias": 1, "bfloat": 1, "scale": 2, "half": 2, "index": 2}


@pytest.fixture
def grouped(trajectory: Trajectory, small_tiles: None) -> Trajectory:
    rows_of = {name: TensorRows(row) for name, row in ROW_OF.items()}
    return trajectory.in_groups(LayerGroups(("first", "second", "third"), (1, 1, 1), rows_of, "layers"))


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


CHANNELS = {
    **{"conv.weight": (6, 4, 3, 3), "conv.bias": (6,), "up.weight": (6, 4, 2, 2), "up.bias": (4,), "norm.weight": (6,)},
    **{"norm.bias": (6,), "scale": (), "embedding": (10, 3), "half.weight": (7, 5)},
}


@pytest.mark.parametrize("columns", [None, 1, 7, 20])  # of a tile: all, a part of a channel, some channels
@pytest.mark.parametrize("rule", ["channels", {"channels": 4}, "layers"])
def test_channels_are_merged_and_projected_as_numpy_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: Rule, columns: int | None
) -> None:
    generator = torch.Generator().manual_seed(0)

    def numbers(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        dtype = torch.bfloat16 if name.startswith("half") else torch.float32
        return torch.randn(shape, generator=generator).to(dtype)

    checkpoints = [{name: numbers(name, shape) for name, shape in CHANNELS.items()} for _ in range(4)]
    with lcsc_opt.TrajectoryWriter(tmp_path / "t", every=1) as writer:
        for step, checkpoint in enumerate(checkpoints, 1):
            writer.append(step, checkpoint)
    if columns is not None:
        monkeypatch.setattr(merge, "columns_of", lambda *_, **__: columns)
    trajectory = Trajectory.open(tmp_path / "t").in_rows(rule)
    groups = trajectory.layer_groups
    assert groups is not None
    random = np.random.default_rng(0)
    coefficients = random.standard_normal((len(groups), 4))
    coefficients += (1 - coefficients.sum(axis=1, keepdims=True)) / 4
    gradients = {name: torch.randn(shape, generator=generator) for name, shape in CHANNELS.items()}
    merged = trajectory.merge(coefficients)
    expected = np.zeros_like(coefficients)
    for name, shape in CHANNELS.items():
        rows = groups.rows_of[name]
        along = [1] * len(shape)
        if rows.channels > 1:
            along[rows.axis] = -1
        combined = np.zeros(shape)
        for index, checkpoint in enumerate(checkpoints):
            weights = checkpoint[name].double().numpy()
            combined += coefficients[rows.of_channels(), index].reshape(along) * weights
            others = tuple(axis for axis in range(len(shape)) if axis != rows.axis or rows.channels == 1)
            products = (weights * gradients[name].numpy()).sum(axis=others)
            np.add.at(expected[:, index], rows.of_channels(), products)
        tolerance = 2e-2 if name.startswith("half") else 1e-5
        np.testing.assert_allclose(merged[name].double().numpy(), combined, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(trajectory.project(gradients), expected, rtol=0, atol=1e-4)


def test_the_closeness_of_a_row_is_that_of_its_weights_to_what_its_checkpoints_deviate(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in CHANNELS.items() if shape}
    steps = [
        {
            name: weight + (0.5 if name == "norm.bias" else 0.01) * torch.randn(weight.shape, generator=generator)
            for name, weight in base.items()
        }
        for _ in range(4)
    ]
    with lcsc_opt.TrajectoryWriter(tmp_path / "t", every=1) as writer:
        for step, checkpoint in enumerate(steps, 1):
            writer.append(step, checkpoint)
    trajectory = Trajectory.open(tmp_path / "t")
    groups = trajectory.in_rows("channels").layer_groups
    assert groups is not None
    found = trajectory.closeness(groups)
    for name in base:
        weights = np.stack([checkpoint[name].double().numpy().ravel() for checkpoint in steps])
        deviation = np.sqrt(weights.var(axis=0, ddof=1).mean())
        expected = np.sqrt(np.square(weights.mean(axis=0)).mean()) / deviation
        np.testing.assert_allclose(found[groups.rows_of[name].of_channels()], expected, rtol=1e-3)
    assert trajectory.closeness(None).shape == (1,)
