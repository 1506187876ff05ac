from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from lcsc_opt.base.errors import StudySpecError, TrajectoryError
from lcsc_opt.base.records import SEARCH
from lcsc_opt.coefficients.profiles import ema_coefficients
from lcsc_opt.objective.merge_sample_score import MergeSampleScore
from lcsc_opt.sampling import DiffusersSampler, ImageNoise
from lcsc_opt.sampling.schedulers import without_deprecations
from lcsc_opt.training.images import digits_images, second_digits_view
from tests.objectives import trained_objectives


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def use_cache(cache: Path, networks_train_briefly: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LCSC_CACHE", str(cache))


@pytest.fixture
def objective() -> MergeSampleScore:
    return trained_objectives.build("digits_ddpm", nfe=7)


def test_it_is_an_objective(objective: MergeSampleScore) -> None:
    assert objective.steps == (2, 4, 6)
    assert objective.sampler.nfe == 7
    trained_objectives.check(objective)


def test_the_loss_is_fid_against_all_digits(objective: MergeSampleScore) -> None:
    trained_objectives.check_the_loss(objective, digits_images())


@pytest.mark.parametrize("name", ["digits_ddpm", "digits"])
def test_another_network_of_digits_sees_what_is_reported(name: str, cache: Path) -> None:
    trained_objectives.check_the_cross_check(trained_objectives.build(name), second_digits_view(cache))


def test_images_are_those_of_diffusers_own_solver(objective: MergeSampleScore) -> None:
    coefficients = ema_coefficients(objective.steps, 0.7)
    network = trained_objectives.load("digits_ddpm").network().eval()
    network.load_state_dict(objective.trajectory.merge(coefficients))
    expected = sample(network, ImageNoise(0).batch(SEARCH, 0, 9, (1, 8, 8)))
    torch.testing.assert_close(objective.images(coefficients, SEARCH, 9), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def sample(network: torch.nn.Module, x: Tensor) -> Tensor:
    scheduler = DPMSolverMultistepScheduler(num_train_timesteps=1000, beta_schedule="linear")  # DPM-Solver++ by default
    with without_deprecations():
        scheduler.set_timesteps(7)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t).sample, t, x).prev_sample
    return x.clamp(-1, 1)


def test_the_batch_size_does_not_change_the_loss() -> None:
    coefficients = ema_coefficients((2, 4, 6), 0.7)
    losses = [trained_objectives.build("digits_ddpm", batch_size=size)(coefficients) for size in (7, 70)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_ten_steps_of_the_solver_are_the_default() -> None:
    sampler = trained_objectives.build("digits_ddpm").sampler
    assert isinstance(sampler, DiffusersSampler)
    assert sampler.nfe == 10
    assert sampler.describe()["sampler"] == "DPMSolverMultistepScheduler"


@pytest.mark.parametrize("change", [{"training_seed": 1}, {"training_steps": 8}, {"checkpoint_every": 3}])
def test_other_training_is_another_trajectory(objective: MergeSampleScore, change: dict[str, int]) -> None:
    other = trained_objectives.build("digits_ddpm", **change)
    assert other.trajectory.path != objective.trajectory.path
    assert other.describe() != objective.describe()


def test_some_of_the_checkpoints_are_combined_without_another_training(objective: MergeSampleScore) -> None:
    some = trained_objectives.build("digits_ddpm", nfe=7, select={"interval": 4})
    assert some.steps == (2, 6)
    assert some.trajectory.path == objective.trajectory.path
    assert some.describe() != objective.describe()
    assert some([0.25, 0.75]) == pytest.approx(objective([0.25, 0.0, 0.75]), rel=1e-6)


@pytest.mark.parametrize("name", ["digits", "digits_ddpm", "photographs"])
def test_a_selection_that_leaves_nothing_is_refused_before_anything_is_trained(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LCSC_CACHE", str(tmp_path / "empty"))
    with pytest.raises(TrajectoryError, match="window 1 leaves 1 of 3 checkpoints"):
        trained_objectives.build(name, select={"window": 1})
    assert not (tmp_path / "empty").exists()


@pytest.mark.parametrize("setting", [{"nfe": 1}, {"images": 64}, {"steps": 10}])
def test_settings_out_of_range_are_refused(setting: dict[str, int]) -> None:
    with pytest.raises(StudySpecError, match=f"objective.settings: {next(iter(setting))}"):
        trained_objectives.build("digits_ddpm", **setting)


def test_the_study_runs_it() -> None:
    trained_objectives.check_the_study("digits_ddpm")
