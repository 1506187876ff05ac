"""Diffusion training: the loss against its equation and diffusers' own scheduler, and that it learns."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor, nn

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.sampling.schedulers import without_deprecations
from lcsc_opt.training.diffusion import DiffusionTraining, diffusion_loss, noise_schedule, train_diffusion
from lcsc_opt.training.networks import initialize, small_unet
from tests.training.training_examples import IMAGES, TINY_DIFFUSION, ToyNetwork


class Recording(ToyNetwork):
    """Keeps what it was asked."""

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        self.x, self.t = x.detach(), c_noise
        self.answer = super().forward(x, c_noise)
        return self.answer


@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
def test_the_loss_is_the_squared_error_of_the_noise_that_diffusers_adds(beta_schedule: str) -> None:
    network = Recording()
    training = DiffusionTraining(timesteps=50, beta_schedule=beta_schedule)
    schedule = noise_schedule(training)
    loss = diffusion_loss(network, IMAGES, schedule, 50, torch.Generator().manual_seed(3))

    scheduler = DDPMScheduler(num_train_timesteps=50, beta_schedule=beta_schedule)
    kept = scheduler.alphas_cumprod[network.t][:, None, None, None]
    epsilon = (network.x - kept.sqrt() * IMAGES) / (1 - kept).sqrt()  # Ho et al. 2020, Eq. 4, solved for the noise
    torch.testing.assert_close(scheduler.add_noise(IMAGES, epsilon, network.t), network.x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, (network.answer - epsilon).square().mean(), rtol=1e-4, atol=1e-5)


def test_noise_is_standard_normal_and_timesteps_are_uniform() -> None:
    network = Recording()
    schedule = noise_schedule(DiffusionTraining(timesteps=8))
    diffusion_loss(network, torch.zeros(4000, 1, 4, 4), schedule, 8, torch.Generator().manual_seed(0))
    counts = network.t.bincount(minlength=8)
    assert len(counts) == 8
    assert counts.min() > 400
    assert counts.max() < 600
    spread = (1 - DDPMScheduler(num_train_timesteps=8).alphas_cumprod[network.t]).sqrt()[:, None, None, None]
    epsilon = network.x / spread
    assert float(epsilon.mean()) == pytest.approx(0, abs=0.02)
    assert float(epsilon.std()) == pytest.approx(1, abs=0.02)


def test_a_network_that_knows_the_noise_has_no_loss() -> None:
    training = DiffusionTraining(timesteps=20)
    kept = DDPMScheduler(num_train_timesteps=20).alphas_cumprod

    def all_zero_images(x: Tensor, t: Tensor) -> Tensor:
        return x / (1 - kept[t]).sqrt()[:, None, None, None]

    schedule = noise_schedule(training)
    network: Any = all_zero_images
    loss = diffusion_loss(network, torch.zeros(9, 1, 4, 4), schedule, 20, torch.Generator().manual_seed(0))
    assert float(loss) == pytest.approx(0, abs=1e-9)


def test_an_output_that_diffusers_wraps_is_unwrapped() -> None:
    unet = small_unet((1, 8, 8), (4, 8))
    initialize(unet, torch.Generator().manual_seed(0))

    class Unwrapped(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            output: Tensor = unet(x, t, return_dict=False)[0]
            return output

    images = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    schedule = noise_schedule(DiffusionTraining())
    losses = [
        diffusion_loss(network, images, schedule, 1000, torch.Generator().manual_seed(2))
        for network in (unet, Unwrapped())
    ]
    assert torch.equal(*losses)


def test_a_sampler_of_diffusers_is_told_how_the_model_was_trained() -> None:
    training = DiffusionTraining(timesteps=123, beta_schedule="squaredcos_cap_v2")
    scheduler = DPMSolverMultistepScheduler(**training.schedule())
    trained = noise_schedule(training)
    assert isinstance(trained, DDPMScheduler)
    torch.testing.assert_close(scheduler.alphas_cumprod, trained.alphas_cumprod)
    assert scheduler.config["prediction_type"] == trained.config["prediction_type"] == "epsilon"


def test_training_learns_the_noise_and_samples_become_the_data(tmp_path: Path) -> None:
    training = dataclasses.replace(
        TINY_DIFFUSION, steps=400, checkpoint_every=200, batch_size=32, learning_rate=1e-2, timesteps=100
    )
    data = torch.full((64, 1, 4, 4), 0.5)
    trajectory = train_diffusion(ToyNetwork, data, training=training, path=tmp_path / "run.trajectory")
    before, after = ToyNetwork(), ToyNetwork()
    initialize(before, torch.Generator().manual_seed(0))
    after.load_state_dict(trajectory.merge([0.0, 1.0]))
    errors = [float((sample(network, training) - 0.5).square().mean()) for network in (before, after)]
    assert errors[1] < 0.2 * errors[0]


@torch.no_grad()
def sample(network: nn.Module, training: DiffusionTraining) -> Tensor:
    scheduler = DPMSolverMultistepScheduler(**training.schedule())
    with without_deprecations():
        scheduler.set_timesteps(10)
    x = torch.randn(200, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.expand(len(x))), t, x).prev_sample
    return x


def test_a_schedule_that_diffusers_does_not_know_is_refused(tmp_path: Path) -> None:
    training = dataclasses.replace(TINY_DIFFUSION, beta_schedule="quadratic")
    with pytest.raises(TrajectoryError, match=r"beta_schedule: quadratic .*; take 'squaredcos_cap_v2' or 'linear'"):
        train_diffusion(ToyNetwork, IMAGES, training=training, path=tmp_path / "run.trajectory")
    assert not list(tmp_path.iterdir())
