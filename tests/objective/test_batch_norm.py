"""Networks with batch normalization: a signed combination of variances is no variance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lcsc_opt import load_study
from lcsc_opt.base.records import SEARCH, Candidate
from lcsc_opt.cli import run as lcsc
from lcsc_opt.objective.merge_sample_score import MergeSampleScore
from lcsc_opt.sampling.batch_norm import BATCH, IMAGES, NOISE
from tests.objectives.image_objectives import build, settings

SIGNED = np.array([-2.0, 1.0, 2.0])
OWN = "tests.objective.test_batch_norm"


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 1, 3, padding=1))


def plain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 1, 3, padding=1))


def sample(model: nn.Module, noise: Tensor) -> Tensor:
    return torch.tanh(model(noise))


def objective(folder: Path, model: str = "network", **changes: object) -> MergeSampleScore:
    made = {"network": network, "plain": plain}[model]
    for step in (1, 2, 3):
        torch.manual_seed(step)
        weights = made().state_dict()
        if "1.running_var" in weights:
            weights["1.running_var"] = torch.full((4,), float(4 - step))  # which the coefficients make -6 + 2 + 2
            weights["1.running_mean"] += step
        save_file(weights, folder / f"model{step}.safetensors")
    usual = {"checkpoints": "model*.safetensors", "model": f"{OWN}:{model}", "sampler": f"{OWN}:sample"}
    return build("torch_module.py", folder, **{**usual, "image_shape": [1, 8, 8], **changes})


def test_statistics_are_estimated_again_and_that_is_said(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    estimating = objective(workplace)
    assert "1.running_mean: statistics of batch normalization are estimated again" in capsys.readouterr().err
    assert np.isfinite(estimating.evaluate(Candidate(SIGNED)).loss)


def test_they_are_the_mean_and_the_variance_of_all_that_the_merged_network_sees(workplace: Path) -> None:
    """Torch's ``update_bn`` averages the variances of batches, and leaves out the variance between them."""
    estimating = objective(workplace)
    found = estimating.statistics(SIGNED)
    merged = network()
    merged.load_state_dict(estimating.trajectory.merge(SIGNED))
    noise = estimating.sampler.noise  # type: ignore[attr-defined]
    batches = [noise.batch(NOISE, first, first + BATCH) for first in range(0, IMAGES, BATCH)]
    with torch.no_grad():
        seen = merged.get_submodule("0")(torch.cat(batches)).transpose(0, 1).flatten(1)
    assert set(found) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    torch.testing.assert_close(found["1.running_mean"], seen.mean(1))
    torch.testing.assert_close(found["1.running_var"], seen.var(1))
    assert int(found["1.num_batches_tracked"]) == IMAGES // BATCH


@pytest.mark.parametrize(
    "coefficients", [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [[0.0, 1.0, 0.0]] * 3], ids=["last", "first", "rows"]
)
def test_what_was_saved_keeps_its_own(workplace: Path, coefficients: list[Any]) -> None:
    made = objective(workplace)
    if isinstance(coefficients[0], list):
        made.merge_in_rows("layers")
    chosen = np.array(coefficients)
    assert made.statistics(chosen) == {}
    made.images(chosen, SEARCH, 4)
    saved = load_file(workplace / f"model{1 + int(np.atleast_2d(chosen)[0].argmax())}.safetensors")
    state = made.sampler.weights.trained.state_dict()  # type: ignore[attr-defined]
    assert all(torch.equal(state[name], tensor) for name, tensor in saved.items())


def test_the_same_candidate_has_the_same_loss_whatever_was_there_before_and_however_large_batches_are(
    workplace: Path,
) -> None:
    first, other = objective(workplace), objective(workplace, batch_size=7)
    expected = first(SIGNED)
    first([1.0, 0.0, 0.0])
    assert first(SIGNED) == expected
    assert other(SIGNED) == pytest.approx(expected, rel=1e-4)


def test_they_are_combined_as_weights_if_the_user_says_so(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merging = objective(workplace, batch_norm="merged")
    assert "are estimated again" not in capsys.readouterr().err
    half = np.array([0.5, 0.5, 0.0])
    merging.images(half, SEARCH, 4)
    state = merging.sampler.weights.trained.state_dict()  # type: ignore[attr-defined]
    torch.testing.assert_close(state["1.running_var"], torch.full((4,), 2.5))
    assert merging.describe() != objective(workplace).describe()


def test_networks_without_it_cost_nothing(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    without = objective(workplace, "plain")
    assert without.describe()["batch_norm"] is None
    assert without.statistics(SIGNED) == {}
    assert "batch normalization" not in capsys.readouterr().err


def test_an_export_has_the_statistics_that_were_searched_with_and_so_has_what_its_recipe_makes(workplace: Path) -> None:
    objective(workplace)
    model = {"model": f"{OWN}:network", "sampler": f"{OWN}:sample", "image_shape": [1, 8, 8]}
    chosen = settings(workplace, checkpoints="model*.safetensors", **model)
    study = {"name": "bn", "objective": {"file": "torch_module.py", "settings": chosen}, "budget": {"evaluations": 8}}
    Path("bn.yaml").write_text(yaml.safe_dump({**study, "optimizers": [{"LCSC": {"mutation": 1.0}}]}))
    assert lcsc(["run", "bn.yaml"]) == 0
    found = load_study("bn/LCSC/0")
    assert all(row["state"] == "COMPLETE" for row in found.trials)
    assert lcsc(["export", "bn/LCSC/0", "-o", "best.safetensors"]) == 0
    exported = load_file("best.safetensors")
    searched, merged = found.objective.statistics(found.coefficients), found.merge()
    assert searched.keys() < exported.keys() == merged.keys()
    for name, value in exported.items():
        torch.testing.assert_close(merged[name], value)
        torch.testing.assert_close(searched.get(name, value), value)
    assert lcsc(["apply", "best.safetensors", "model*.safetensors", "-o", "again.safetensors"]) == 0
    again = load_file("again.safetensors")
    assert again.keys() == exported.keys()
    for name, value in exported.items():
        assert torch.equal(again[name], value), name
