"""Consistency training: its parts against their equations. What all recipes share is tested in test_running.py."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from lcsc_opt.sampling import ConsistencyFunction, noise_levels
from lcsc_opt.training import consistency
from lcsc_opt.training.consistency import (
    ConsistencyTraining,
    consistency_loss,
    discretization,
    interval_probabilities,
    pseudo_huber,
    train_consistency,
)
from lcsc_opt.training.networks import initialize
from tests.training.training_examples import IMAGES, TINY_CONSISTENCY, ToyNetwork

# the curriculum of noise levels


@pytest.mark.parametrize(
    ("steps", "first", "last"), [(4000, 10, 160), (400_000, 10, 1280), (20, 10, 40), (1000, 2, 150), (90, 10, 35)]
)
def test_the_discretization_is_the_papers(steps: int, first: int, last: int) -> None:
    training = ConsistencyTraining(steps=steps, first_discretization=first, last_discretization=last)
    stage = math.floor(steps / (math.log2(math.floor(last / first)) + 1))  # K' of Song & Dhariwal 2023, Table 1
    for step in {0, 1, stage - 1, stage, 2 * stage, steps // 2, steps - 1}:
        levels = min(first * 2 ** (step // stage), last) + 1
        assert discretization(step, training) == levels - 1


def test_the_discretization_doubles_from_first_to_last() -> None:
    training = ConsistencyTraining()
    counts = [discretization(step, training) for step in range(training.steps)]
    assert sorted(set(counts)) == [10, 20, 40, 80, 160]
    assert counts == sorted(counts)
    assert [counts.count(count) for count in (10, 20, 40, 80, 160)] == [800] * 5


@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 40))
def test_the_last_discretization_is_reached_however_short_the_run(first: int, steps: int, factor: int) -> None:
    last = first * 2 ** (factor % 4)
    training = ConsistencyTraining(steps=steps, first_discretization=first, last_discretization=last)
    counts = [discretization(step, training) for step in range(steps)]
    assert counts[0] == first
    assert counts[-1] == min(last, first * 2 ** (steps - 1))


# which noise levels are trained


@given(st.integers(1, 300), st.floats(-3, 1), st.floats(0.3, 3), st.floats(1, 100))
def test_interval_probabilities_are_lognormal(count: int, mean: float, std: float, sigma_max: float) -> None:
    training = ConsistencyTraining(noise_mean=mean, noise_std=std, sigma_max=sigma_max)
    levels = noise_levels(count + 1, sigma_min=training.sigma_min, sigma_max=sigma_max)
    found = interval_probabilities(levels, training)
    below = stats.lognorm.cdf(levels.numpy(), s=std, scale=math.exp(mean))
    assert found.shape == (count,)
    assert found.tolist() == pytest.approx((below[1:] - below[:-1]).tolist(), abs=1e-12)
    assert (found >= 0).all()
    assert found.sum() <= 1 + 1e-12


def test_the_defaults_leave_out_little_noise() -> None:
    training = ConsistencyTraining()
    levels = noise_levels(161, sigma_min=training.sigma_min, sigma_max=training.sigma_max)
    assert 0.95 < interval_probabilities(levels, training).sum() < 1


# the loss


@given(st.integers(1, 3), st.integers(1, 6), st.floats(1e-6, 1e3))
def test_pseudo_huber_is_its_formula(channels: int, size: int, scale: float) -> None:
    x = scale * torch.randn(4, channels, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    c = 0.00054 * math.sqrt(channels * size * size)
    squared = [float((image**2).sum()) for image in x]
    expected = [math.sqrt(s + c * c) - c for s in squared]
    assert pseudo_huber(x).tolist() == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert pseudo_huber(-x).tolist() == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert (pseudo_huber(x) >= 0).all()
    assert not pseudo_huber(0 * x).any()


def test_the_loss_compares_the_student_above_with_the_teacher_below() -> None:
    network = ToyNetwork()
    initialize(network, torch.Generator().manual_seed(0))
    function = ConsistencyFunction(network)
    levels = noise_levels(6, sigma_min=0.002, sigma_max=20.0)
    weights = torch.tensor([0.1, 0.4, 0.2, 0.2, 0.1], dtype=torch.float64)
    batch = IMAGES[:16]
    loss = consistency_loss(function, batch, levels, weights, torch.Generator().manual_seed(3))
    (gradient,) = torch.autograd.grad(loss, network.first.weight)

    generator = torch.Generator().manual_seed(3)
    interval = torch.multinomial(weights, 16, replacement=True, generator=generator)
    z = torch.randn(batch.shape, generator=generator)
    losses = []
    for i in range(16):
        low, high = (levels[interval[i] + end].float().reshape(1) for end in (0, 1))
        teacher = function(batch[i] + low * z[i : i + 1], low).detach()  # no gradient goes through it
        student = function(batch[i] + high * z[i : i + 1], high)
        losses.append(pseudo_huber(student - teacher) / (high - low))
    expected = torch.cat(losses).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, network.first.weight)[0], rtol=1e-4, atol=1e-6)


def test_training_lowers_the_loss_and_samples_become_the_data(tmp_path: Path) -> None:
    training = dataclasses.replace(TINY_CONSISTENCY, steps=600, checkpoint_every=300, batch_size=32, learning_rate=1e-2)
    data = torch.full((64, 1, 4, 4), 0.5)
    trajectory = train_consistency(ToyNetwork, data, training=training, path=tmp_path / "run.trajectory")
    before, after = ToyNetwork(), ToyNetwork()
    initialize(before, torch.Generator().manual_seed(0))
    after.load_state_dict(trajectory.merge([0.0, 1.0]))
    levels = noise_levels(41, sigma_min=training.sigma_min, sigma_max=training.sigma_max)
    weights = interval_probabilities(levels, training)
    noise = torch.randn(500, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    losses, errors = [], []
    for network in (before, after):
        function = ConsistencyFunction(network)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(1)
            losses.append(float(consistency_loss(function, data.repeat(20, 1, 1, 1), levels, weights, generator)))
            errors.append(float((function(20 * noise, torch.full((500,), 20.0)) - 0.5).square().mean()))
    assert losses[1] < 0.5 * losses[0]
    assert errors[1] < 0.5 * errors[0]


# which noise levels are trained when


def test_a_run_follows_the_curriculum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    original = consistency.consistency_loss

    def counting(function: ConsistencyFunction, images: Tensor, levels: Tensor, *rest: Any) -> Tensor:
        assert (levels[0], levels[-1]) == pytest.approx((0.01, 5.0))
        assert (function.sigma_min, function.sigma_data) == (0.01, 0.4)
        counts.append(len(levels) - 1)
        return original(function, images, levels, *rest)

    monkeypatch.setattr(consistency, "consistency_loss", counting)
    training = dataclasses.replace(TINY_CONSISTENCY, sigma_min=0.01, sigma_max=5.0, sigma_data=0.4)
    train_consistency(ToyNetwork, IMAGES, training=training, path=tmp_path / "run.trajectory")
    assert counts == [10] * 6 + [20] * 6 + [40] * 8
