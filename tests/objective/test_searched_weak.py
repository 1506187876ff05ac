"""A weak model whose coefficients are searched: its row is merged, and has a gradient, beside those of the network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.records import Candidate, Coefficients
from lcsc_opt.coefficients.layer_groups import NETWORK, WEAK, LayerGroups, network_rows
from lcsc_opt.coefficients.profiles import ema_coefficients
from lcsc_opt.coefficients.spaces import AffineSpace, ConvexSpace, SpaceWithWeakRow
from lcsc_opt.objective.weak import WithWeakModel
from lcsc_opt.optimizers.parametrization import coefficient_array, point_of
from lcsc_opt.sampling import Autoguidance, DiffusersSampler, EdmDenoiser, ImageNoise, RawOutput, build_scheduler
from lcsc_opt.sampling.base import SearchedWeak
from lcsc_opt.sampling.batch_norm import BatchNormStatistics
from lcsc_opt.trajectory import Trajectory
from tests.objective.test_objective_gradient import EMA, STEPS, build, trajectory
from tests.sampling.test_gradient_sampling import CPU, SHAPE, Smooth, diffusers, heun

__all__ = ["trajectory"]  # a fixture

START = np.eye(len(STEPS))[1]
OTHER = ema_coefficients(STEPS, 0.9)
ROWS = {"first": "first.*", "rest": ["last.*", "classes.*"]}


def autoguided(weak: nn.Module, start: Coefficients | None) -> Any:
    module = Autoguidance(Smooth(seed=8).double(), weak, guidance=1.8, weak_start=start)
    return diffusers(module, "ddim", trained=module.trained, calls=2)


def guided_heun(weak: nn.Module, start: Coefficients | None) -> Any:
    return heun(Smooth(seed=8).double(), guide=weak, guidance=1.8, guide_start=start)


def guided_dpm(weak: nn.Module, start: Coefficients | None) -> Any:
    denoiser = EdmDenoiser(Smooth(seed=8).double(), guide=weak, guidance=1.8, guide_start=start)
    scheduler = build_scheduler(None, {"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_max": 3.0})
    return DiffusersSampler(
        RawOutput(denoiser, sigma_data=0.5),
        scheduler,
        steps=3,
        image_shape=SHAPE,
        noise=ImageNoise(0),
        settings=CPU,
        trained=denoiser.trained,
        calls=2,
    )


SAMPLERS = {"DDIM": autoguided, "Heun": guided_heun, "DPM-Solver++": guided_dpm}


def searched(trajectory: Trajectory, name: str = "DDIM") -> Any:
    """The objective; the weights that its weak model is made with are none of the trajectory's."""
    return build(trajectory, SAMPLERS[name](Smooth(seed=9).double(), START))


def fixed(trajectory: Trajectory, weak: Coefficients, name: str = "DDIM") -> Any:
    network = Smooth().double()
    network.load_state_dict(trajectory.merge(weak))
    return build(trajectory, SAMPLERS[name](network, None))


@pytest.mark.parametrize("name", SAMPLERS)
def test_it_samples_as_with_these_weak_weights_that_stay(trajectory: Trajectory, name: str) -> None:
    objective = searched(trajectory, name)
    assert objective(np.stack([EMA, OTHER])) == fixed(trajectory, OTHER, name)(EMA)
    assert objective(EMA) == fixed(trajectory, START, name)(EMA)  # an average is of the network alone
    assert objective(EMA) != fixed(trajectory, OTHER, name)(EMA)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("rule", [None, ROWS])
def test_the_gradient_of_each_row_is_the_finite_difference(trajectory: Trajectory, name: str, rule: Any) -> None:
    objective = searched(trajectory, name)
    objective.merge_in_rows(rule)
    groups = objective.layer_groups
    assert groups.names == (NETWORK, WEAK) if rule is None else ("first", "rest", WEAK)
    rows = groups.in_rows(EMA)
    found = objective.evaluate(Candidate(rows), gradient=True).gradient
    assert found.shape == rows.shape
    direction = np.random.default_rng(3).normal(size=len(STEPS))
    direction -= direction.mean()
    for row in range(len(rows)):
        moved = np.zeros_like(rows)
        moved[row] = 1e-5 * direction
        slope = (objective(rows + moved) - objective(rows - moved)) / 2e-5
        assert found[row] @ direction == pytest.approx(slope, rel=1e-5)
        assert abs(slope) > 1e-3
    of_average = objective.evaluate(Candidate(EMA), gradient=True).gradient
    slope = (objective(EMA + 1e-5 * direction) - objective(EMA - 1e-5 * direction)) / 2e-5
    assert of_average @ direction == pytest.approx(slope, rel=1e-5)


def test_the_weak_model_is_merged_again_only_when_its_row_changes(trajectory: Trajectory) -> None:
    merged: list[Coefficients] = []

    class Counted(Trajectory):
        def __init__(self) -> None:
            self.__dict__.update(trajectory.__dict__)

        def in_rows(self, rule: Any) -> Any:
            return self

        def merge(self, coefficients: Any) -> dict[str, Tensor]:
            merged.append(coefficients)
            return trajectory.merge(coefficients)

    view = WithWeakModel(Counted(), SearchedWeak("weak", START))
    for candidate, weak_merges in ((EMA, 1), (OTHER, 0), (np.stack([EMA, OTHER]), 1), (np.stack([START, OTHER]), 0)):
        merged.clear()
        weights = view.merge(candidate)
        assert len(merged) == 1 + weak_merges
        weak = START if candidate.ndim == 1 else candidate[-1]
        assert torch.equal(weights["weak.first.weight"], trajectory.merge(weak)["first.weight"])
        assert torch.equal(
            weights["network.first.weight"], trajectory.merge(np.atleast_2d(candidate)[0])["first.weight"]
        )


@pytest.mark.parametrize("rule", [None, ROWS])
def test_distances_of_the_weak_row_are_between_whole_models(trajectory: Trajectory, rule: Any) -> None:
    objective = searched(trajectory)
    objective.merge_in_rows(rule)
    gram = objective.gram()
    expected = trajectory.gram()
    np.testing.assert_allclose(gram[-1], expected, rtol=1e-9)
    np.testing.assert_allclose(network_rows(gram, objective.layer_groups.names).reshape(-1, 5, 5).sum(0), expected)


def test_a_study_sees_whether_the_weak_model_is_searched(trajectory: Trajectory) -> None:
    objective = searched(trajectory)
    same_start = fixed(trajectory, START).sampler._network.module
    stays = Autoguidance(Smooth(seed=8).double(), same_start.weak, guidance=1.8)
    moves = Autoguidance(Smooth(seed=8).double(), same_start.weak, guidance=1.8, weak_start=START)
    assert stays.config != moves.config
    assert objective.describe()["sampler"]["network"] == "Smooth"
    assert objective.sampler.network is objective.sampler._network.module.network
    assert objective.describe()["trajectory"] == trajectory.sha256


@pytest.mark.parametrize("space_class", [AffineSpace, ConvexSpace])
def test_averages_that_an_optimizer_begins_with_leave_the_weak_model_at_its_start(space_class: Any) -> None:
    groups = LayerGroups.with_weak_row(None, START)
    space = SpaceWithWeakRow(space_class(STEPS, groups.in_rows(EMA)), groups)
    np.testing.assert_allclose(space.to_coefficients(np.zeros(space.shape)), [EMA, START], atol=1e-15)
    expected = np.stack([OTHER, START])
    np.testing.assert_allclose(space.to_coefficients(space.to_free(OTHER)), expected, atol=1e-12)
    np.testing.assert_array_equal(point_of(coefficient_array(space), OTHER), expected)


def test_statistics_of_batch_normalization_are_refused(trajectory: Trajectory) -> None:
    sampler = autoguided(Smooth(seed=9).double(), START)
    statistics = BatchNormStatistics.of_samples(sampler)
    with pytest.raises(ObjectiveError, match=r"weak: the statistics of batch normalization .* which is not searched"):
        build(trajectory, sampler, batch_norm=statistics)


def test_a_module_of_a_user_may_have_an_attribute_of_this_name(trajectory: Trajectory) -> None:
    network = Smooth().double()
    network.searched = {"a": "b"}  # type: ignore[assignment]
    weights: Mapping[str, Any] = trajectory.merge(EMA)
    diffusers(network, "ddim").load(weights)
    assert torch.equal(network.first.weight, weights["first.weight"])
