"""Operations by part, against what the layers of a known network take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lcsc_opt.base.study_file import read_study_file
from lcsc_opt.coefficients.profiles import ema_coefficients
from lcsc_opt.diagnostics.profiling.work import operations_per_image
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.loading import load_objective
from tests.diagnostics.profiling.profiled_study import OPERATIONS, SIDE, WIDTH, write_image_study


def load(folder: Path) -> Objective:
    spec = read_study_file(write_image_study(folder))
    return load_objective(spec.objective, beside=folder)


def test_sampling_is_made_of_the_networks_layers(workplace: Path) -> None:
    objective = load(workplace)
    counted = operations_per_image(objective, ema_coefficients(objective.steps, 0.9), gradient=False)
    assert counted["sample"] == OPERATIONS
    assert "features" not in counted  # means are no matrix products


def test_a_gradient_goes_back_through_the_layers(workplace: Path) -> None:
    objective = load(workplace)
    counted = operations_per_image(objective, ema_coefficients(objective.steps, 0.9), gradient=True)
    one = 2 * SIDE**2 * WIDTH * 9  # operations of a layer
    kept, others = 6, 10  # of 16 images in batches of 10 the last ones keep their graph, the others are sampled again
    forward = (kept + 2 * others) * 2 * one
    backward = (kept + others) * 3 * one  # for weights, and for inputs of all layers but the first
    assert counted["sample"] * (kept + others) == pytest.approx(forward + backward)
    assert torch.is_grad_enabled()
