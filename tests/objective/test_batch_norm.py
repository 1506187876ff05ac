"""Networks with batch normalization: a signed combination of variances is no variance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

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


class Stored(nn.Module):
    """A normalization that is no class of torch's, as BigGAN's."""

    stored_mean: Tensor
    stored_var: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("stored_mean", torch.zeros(4))
        self.register_buffer("stored_var", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return functional.batch_norm(x, self.stored_mean, self.stored_var)


class Unread(nn.Module):
    """Keeps a mean and a variance as torch names them, and uses them by itself."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(4, 1, 1))
        self.register_buffer("running_var", torch.ones(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.running_mean) / self.running_var.sqrt()


def two_parts(kind: Callable[[], nn.Module] = lambda: nn.BatchNorm2d(4)) -> nn.Module:
    """Two normalizations; the first part is the same in all checkpoints of :func:`half_frozen`."""
    first, second = (nn.Sequential(nn.Conv2d(inputs, 4, 3, padding=1), kind()) for inputs in (1, 4))
    return nn.Sequential(first, second, nn.SiLU(), nn.Conv2d(4, 1, 3, padding=1))


def wide() -> nn.Module:
    return two_parts().double()


def scripted() -> nn.Module:
    return torch.jit.script(two_parts())


def traced() -> nn.Module:
    made: nn.Module = torch.jit.trace(two_parts().eval(), torch.zeros(2, 1, 8, 8))
    return made


def stored() -> nn.Module:
    return two_parts(Stored)


def unread() -> nn.Module:
    return two_parts(Unread)


def half_frozen(folder: Path, model: str) -> tuple[MergeSampleScore, Mapping[str, Tensor]]:
    """An objective of checkpoints whose first part was frozen, and the state dict of that."""
    frozen = {}
    for step in (1, 2, 3):
        torch.manual_seed(step)
        weights = globals()[model]().state_dict()
        for name, tensor in weights.items():
            if name.endswith("mean"):
                weights[name] = tensor + 0.3 * step
            if name.endswith("var"):
                weights[name] = tensor + step
        frozen = frozen or {name: tensor for name, tensor in weights.items() if name.startswith("0.")}
        save_file({**weights, **frozen}, folder / f"model{step}.safetensors")
    chosen = {"model": f"{OWN}:{model}", "sampler": f"{OWN}:sample", "image_shape": [1, 8, 8]}
    return build("torch_module.py", folder, checkpoints="model*.safetensors", **chosen), frozen


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


@pytest.mark.parametrize("model", ["two_parts", "wide", "scripted", "traced", "stored"])
def test_what_is_the_same_in_all_checkpoints_stays_and_all_else_is_estimated_in_every_form(
    workplace: Path, model: str
) -> None:
    made, frozen = half_frozen(workplace, model)
    found = made.statistics(SIGNED)
    state = made.sampler.weights.trained.state_dict()  # type: ignore[attr-defined]
    for name, tensor in frozen.items():
        assert torch.equal(state[name], tensor), name
    assert {name for name in found if name.endswith("mean")} == {
        name for name in state if name.startswith("1.") and name.endswith("mean")
    }
    merged = two_parts(Stored if model == "stored" else lambda: nn.BatchNorm2d(4)).eval()
    merged.to(next(iter(frozen.values())).dtype)
    merged.load_state_dict(made.trajectory.merge(SIGNED))
    noise = made.sampler.noise  # type: ignore[attr-defined]
    batches = [noise.batch(NOISE, first, first + BATCH) for first in range(0, IMAGES, BATCH)]
    with torch.no_grad():
        first = merged.get_submodule("0")(torch.cat(batches).to(next(iter(frozen.values())).dtype))
        seen = merged.get_submodule("1.0")(first).transpose(0, 1).flatten(1)
    for name, tensor in found.items():
        if name.endswith("mean"):
            torch.testing.assert_close(tensor, seen.mean(1), check_dtype=False, atol=1e-5, rtol=1e-5)
        if name.endswith("var"):
            torch.testing.assert_close(tensor, seen.var(1), check_dtype=False, atol=1e-5, rtol=1e-4)


def test_one_network_has_one_loss_eager_and_as_torchscript(workplace: Path) -> None:
    eager, _ = half_frozen(workplace, "two_parts")
    compiled, _ = half_frozen(workplace, "scripted")
    assert compiled(SIGNED) == pytest.approx(eager(SIGNED), rel=1e-4)
    assert compiled.why_no_gradient() == eager.why_no_gradient()
    assert "torch has no gradient in a batch normalization's 1.1.running_mean" in (eager.why_no_gradient() or "")


def test_statistics_that_no_normalization_of_torch_reads_are_combined_and_that_is_said(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, _ = half_frozen(workplace, "unread")
    found = made.statistics(SIGNED)
    said = "1.1.running_mean: no normalization of torch has read it, so it is combined like a weight"
    assert capsys.readouterr().err.count(said) == 1
    assert torch.equal(found["1.1.running_mean"], made.trajectory.merge(SIGNED)["1.1.running_mean"])
