from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.records import SEARCH
from lcsc_opt.coefficients.profiles import ema_coefficients
from lcsc_opt.objective.merge_sample_score import MergeSampleScore
from lcsc_opt.sampling import ConsistencyFunction, ImageNoise
from lcsc_opt.training import images
from lcsc_opt.training.images import photographs_crops, second_photographs_view
from lcsc_opt.training.networks import PatchedUNet
from tests.objectives import trained_objectives


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def few_crops() -> tuple[torch.Tensor, torch.Tensor]:
    """Every eighth crop, and its part."""
    crops, parts = images._load_crops()
    return crops[::8].clone(), parts[::8].clone()


@pytest.fixture(autouse=True)
def use_cache(cache: Path, few_crops: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_load_crops", lambda: few_crops)
    module = trained_objectives.load("photographs")
    quick = functools.partial(module.train_photographs_network, epochs=1)
    for place in (module, images):
        monkeypatch.setattr(place, "train_photographs_network", quick)
    monkeypatch.setenv("LCSC_CACHE", str(cache))


@pytest.fixture
def objective() -> MergeSampleScore:
    return trained_objectives.build("photographs")


def test_it_is_an_objective(objective: MergeSampleScore) -> None:
    assert objective.steps == (2, 4, 6)
    assert objective.sampler.nfe == 1
    trained_objectives.check(objective)


def test_the_loss_is_fid_against_the_crops(objective: MergeSampleScore) -> None:
    trained_objectives.check_the_loss(objective, photographs_crops())


def test_another_network_of_crops_sees_what_is_reported(objective: MergeSampleScore, cache: Path) -> None:
    trained_objectives.check_the_cross_check(objective, second_photographs_view(cache))


def test_one_step_is_the_consistency_function_at_the_highest_noise(objective: MergeSampleScore) -> None:
    coefficients = ema_coefficients(objective.steps, 0.7)
    network = trained_objectives.load("photographs").network().eval()
    network.load_state_dict(objective.trajectory.merge(coefficients))
    noise = ImageNoise(0).batch(SEARCH, 0, 5, (3, 32, 32))
    with torch.no_grad():
        expected = ConsistencyFunction(network)(80 * noise, torch.full((5,), 80.0)).clamp(-1, 1)
    torch.testing.assert_close(objective.images(coefficients, SEARCH, 5), expected, rtol=0, atol=1e-5)


def test_the_batch_size_does_not_change_the_loss() -> None:
    coefficients = ema_coefficients((2, 4, 6), 0.7)
    losses = [trained_objectives.build("photographs", batch_size=size)(coefficients) for size in (7, 70)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_further_steps_sample_other_images(objective: MergeSampleScore) -> None:
    coefficients = ema_coefficients(objective.steps, 0.7)
    several = trained_objectives.build("photographs", nfe=3)
    assert several.sampler.nfe == 3
    assert not torch.equal(several.images(coefficients, SEARCH, 2), objective.images(coefficients, SEARCH, 2))


def test_the_network_sees_patches_as_channels() -> None:
    network = trained_objectives.load("photographs").network()
    assert isinstance(network, PatchedUNet)
    seen: list[torch.Size] = []
    network.unet.register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[0].shape))
    with torch.no_grad():
        assert network(torch.zeros(2, 3, 32, 32), torch.zeros(2)).shape == (2, 3, 32, 32)
    patch = network.patch
    assert seen == [(2, 3 * patch**2, 32 // patch, 32 // patch)]


@pytest.mark.parametrize("setting", [{"nfe": 0}, {"images": 64}, {"steps": 10}])
def test_settings_out_of_range_are_refused(setting: dict[str, int]) -> None:
    with pytest.raises(StudySpecError, match=f"objective.settings: {next(iter(setting))}"):
        trained_objectives.build("photographs", **setting)


def test_the_study_runs_it() -> None:
    trained_objectives.check_the_study("photographs")
