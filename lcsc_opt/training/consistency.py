"""Improved consistency training (Song & Dhariwal 2023), leaving a trajectory of checkpoints behind.

The run is seeded, shows its progress, continues after an interruption from its own state file, and is cached by
its settings: asked for again, the finished trajectory is opened at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from lcsc_opt.errors import TrajectoryError
from lcsc_opt.progress import progress
from lcsc_opt.sampling.consistency import ConsistencyFunction, noise_levels
from lcsc_opt.seeds import derive_seed
from lcsc_opt.trajectory import Trajectory, TrajectoryWriter
from lcsc_opt.trajectory.manifest import MANIFEST

RECIPE = 1  # raise it when the same settings would train another model


@dataclasses.dataclass(frozen=True)
class ConsistencyTraining:
    """Settings of one training run.

    Names as in Song & Dhariwal 2023, Table 1. Their 80 and 1,280 for ``sigma_max`` and ``last_discretization``, made
    for 32×32 images and 400,000 steps, are 20 and 160 here, for 8×8 images and thousands of steps.

    Attributes:
        steps: training steps.
        checkpoint_every: a checkpoint is kept every so many steps.
        batch_size: images a step.
        learning_rate: of RAdam.
        seed: of the weights, the batches and the noise.
        sigma_min: lowest noise level.
        sigma_max: highest noise level.
        sigma_data: the data's standard deviation, for preconditioning.
        first_discretization: s0 of the curriculum, noise levels at the start.
        last_discretization: s1, noise levels at the end.
        noise_mean: P_mean of the lognormal distribution of noise levels.
        noise_std: P_std of it.
    """

    steps: int = 4000
    checkpoint_every: int = 20
    batch_size: int = 128
    learning_rate: float = 1e-3
    seed: int = 0
    sigma_min: float = 0.002
    sigma_max: float = 20.0
    sigma_data: float = 0.5
    first_discretization: int = 10
    last_discretization: int = 160
    noise_mean: float = -1.1
    noise_std: float = 2.0

    def key(self, network: str) -> str:
        """A name for the trajectory that these settings train with a network of this description."""
        text = json.dumps([RECIPE, network, dataclasses.asdict(self)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def discretization(step: int, training: ConsistencyTraining) -> int:
    """N(k) - 1, the number of intervals between noise levels at a step: it doubles on a schedule."""
    first, last = training.first_discretization, training.last_discretization
    every = max(int(training.steps / (math.log2(last // first) + 1)), 1)
    return int(min(first * 2 ** (step // every), last))


def interval_probabilities(levels: Tensor, training: ConsistencyTraining) -> Tensor:
    """``[n]`` chance of each interval between ``[n + 1]`` noise levels under a lognormal distribution.

    What lies below the first level and above the last is missing from their sum.
    """
    quantiles = torch.erf((levels.log() - training.noise_mean) / (math.sqrt(2) * training.noise_std))
    return quantiles.diff() / 2


def pseudo_huber(difference: Tensor) -> Tensor:
    """``[N, C, H, W]`` → ``[N]``: sqrt(|x|^2 + c^2) - c with c = 0.00054 sqrt(CHW) (Song & Dhariwal, Sec. 3.3)."""
    c = 0.00054 * math.sqrt(difference[0].numel())
    return (difference.flatten(1).square().sum(1) + c * c).sqrt() - c


def consistency_loss(
    function: ConsistencyFunction, images: Tensor, levels: Tensor, weights: Tensor, generator: torch.Generator
) -> Tensor:
    """One batch's loss (Eq. 7): the student at the upper end of an interval, the teacher, itself, at the lower one.

    Args:
        function: student and teacher.
        images: ``[N, C, H, W]``.
        levels: ``[n + 1]`` noise levels, increasing.
        weights: ``[n]`` probabilities of the intervals.
        generator: of the noise.

    Returns:
        A scalar.
    """
    interval = torch.multinomial(weights, len(images), replacement=True, generator=generator)
    low, high = levels[interval].float(), levels[interval + 1].float()
    z = torch.randn(images.shape, generator=generator)
    with torch.no_grad():
        target = function(images + low[:, None, None, None] * z, low)
    student = function(images + high[:, None, None, None] * z, high)
    return (pseudo_huber(student - target) / (high - low)).mean()


def train_consistency(
    build_network: Callable[[], nn.Module],
    images: Tensor,
    *,
    training: ConsistencyTraining,
    path: Path,
    description: str = "training",
) -> Trajectory:
    """The trajectory at ``path``, trained first where it is not there yet.

    Args:
        build_network: makes the network; its weights are drawn anew from the seed.
        images: ``[n, C, H, W]`` training images in [-1, 1].
        training: settings.
        path: of the trajectory; while it is trained it is called ``PATH.partial``.
        description: what the progress bar says.

    Raises:
        TrajectoryError: when the settings leave fewer than two checkpoints, the training diverged, or the path
            cannot be written.
    """
    if path.exists():
        return Trajectory.open(path)
    if training.steps < 2 * training.checkpoint_every:
        raise TrajectoryError(
            f"{training.steps} steps with a checkpoint every {training.checkpoint_every} leave fewer than two"
        )
    partial = path.with_name(path.name + ".partial")
    _make_directory(partial)
    _forget_unborn(partial)
    run = _Run(build_network(), images, training, partial / "training.safe.pt")
    with (
        TrajectoryWriter(partial, every=training.checkpoint_every) as writer,
        progress(description, training.steps, done=run.step) as advance,
    ):
        run.save_checkpoint(writer)
        for loss in run.train():
            run.save_checkpoint(writer)
            advance(note=f"loss {loss:.3f}")
    run.state_path.unlink()
    partial.replace(path)
    return Trajectory.open(path)


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrajectoryError(f"{path}: {error.strerror}; choose a cache folder with LCSC_CACHE") from error


def _forget_unborn(partial: Path) -> None:
    """Begin again where a run was put down before its first checkpoint: its folder is no trajectory yet."""
    if not (partial / MANIFEST).exists():
        for state in partial.glob("training.safe.*"):
            state.unlink()


class _Run:
    """A training run that can be put down after any checkpoint and taken up again."""

    def __init__(self, network: nn.Module, images: Tensor, training: ConsistencyTraining, state_path: Path) -> None:
        self.training, self.images, self.state_path = training, images, state_path
        self.generator = torch.Generator().manual_seed(derive_seed(training.seed, "training"))
        initialize(network, self.generator)
        self.function = ConsistencyFunction(network, sigma_data=training.sigma_data, sigma_min=training.sigma_min)
        self.optimizer = torch.optim.RAdam(network.parameters(), lr=training.learning_rate)
        self.step = 0
        if state_path.exists():
            self._load_state()

    def train(self) -> Iterator[float]:
        """Train to the end; gives each step's loss."""
        self.function.train()
        while self.step < self.training.steps:
            yield self._train_step()

    def _train_step(self) -> float:
        count = discretization(self.step, self.training)
        levels = noise_levels(count + 1, sigma_min=self.training.sigma_min, sigma_max=self.training.sigma_max)
        weights = interval_probabilities(levels, self.training)
        chosen = torch.randint(len(self.images), (self.training.batch_size,), generator=self.generator)
        loss = consistency_loss(self.function, self.images[chosen], levels, weights, self.generator)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.step += 1
        return self._finite(float(loss.detach()))

    def _finite(self, loss: float) -> float:
        if not math.isfinite(loss):
            raise TrajectoryError(f"the training diverged at step {self.step} (loss {loss}); lower its learning_rate")
        return loss

    def save_checkpoint(self, writer: TrajectoryWriter) -> None:
        """The state first, then the checkpoint: a crash between the two leaves a state that holds the checkpoint."""
        if self.step and self.step % self.training.checkpoint_every == 0:
            self._save_state()
            writer.append(self.step, self.function.network)

    def _save_state(self) -> None:
        state = {
            "step": self.step,
            "network": self.function.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }
        temporary = self.state_path.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, self.state_path)  # noqa: PTH105 - says that it is atomic

    def _load_state(self) -> None:
        try:
            state = torch.load(self.state_path, weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise TrajectoryError(f"{self.state_path}: is damaged; delete it, and training begins anew") from error
        self.step = int(state["step"])
        self.function.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])


def initialize(network: nn.Module, generator: torch.Generator) -> None:
    """Draw every weight of a network anew from ``generator``, as PyTorch's own defaults would.

    Weights of two axes and more are uniform within 1 / sqrt(fan-in), vectors of normalization layers one and zero.
    """
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            _initialize_parameter(parameter, name, _fan_in(module), generator)


def _fan_in(module: nn.Module) -> int:
    weight = getattr(module, "weight", None)
    return weight[0].numel() if isinstance(weight, Tensor) and weight.ndim >= 2 else 0


@torch.no_grad()
def _initialize_parameter(parameter: Tensor, name: str, fan_in: int, generator: torch.Generator) -> None:
    if fan_in:
        bound = 1 / math.sqrt(fan_in)
        parameter.uniform_(-bound, bound, generator=generator)
    else:
        parameter.fill_(1.0 if name == "weight" else 0.0)
