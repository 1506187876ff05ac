"""Small networks that an objective trains on the CPU when a study first needs them.

The shipped objectives' recipes (``consistency``, ``diffusion``) call :func:`train`. After an interruption it continues
from its own state file. It opens a finished trajectory at once. It gives the numbers of the demo, bit for bit;
``lcsc train`` has a loop of its own, in ``trainer``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.files import replacing
from lcsc_opt.base.progress import progress
from lcsc_opt.base.reproducibility import derive_seed
from lcsc_opt.checkpoints.names import MANIFEST
from lcsc_opt.training.networks import initialize, torch_threads
from lcsc_opt.trajectory import Trajectory, TrajectoryWriter

THREADS = 2  # the README's numbers are of weights that two threads trained, on any number of cores

BatchLoss = Callable[[nn.Module, Tensor, int, torch.Generator], Tensor]
"""``(network, images [N, C, H, W], step, generator) -> scalar``: the loss that one step of a recipe minimizes."""


@dataclasses.dataclass(frozen=True)
class Training:
    """Settings that ``consistency`` and ``diffusion`` share.

    Attributes:
        steps: training steps.
        checkpoint_every: steps between two checkpoints.
        batch_size: images in each step.
        learning_rate: of RAdam; constant, since averaging replaces a decay.
        seed: of the weights, the batches and the noise.
    """

    steps: int = 4000
    checkpoint_every: int = 20
    batch_size: int = 128
    learning_rate: float = 1e-3
    seed: int = 0


def training_key(recipe: int | str, network: str, training: Training) -> str:
    """A name for the trajectory that these settings train: 16 hexadecimal digits.

    Args:
        recipe: a version, raised when the same settings would train another model.
        network: a description of the network, and of the data if there is a choice.
        training: all settings.
    """
    text = json.dumps([recipe, network, dataclasses.asdict(training)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def train(
    build_network: Callable[[], nn.Module],
    images: Tensor,
    *,
    training: Training,
    loss: BatchLoss,
    path: Path,
    description: str,
) -> Trajectory:
    """The trajectory at ``path``, trained first if it does not exist.

    Args:
        build_network: makes the network; its weights are drawn anew from the seed.
        images: ``[n, C, H, W]`` training images in [-1, 1].
        training: settings.
        loss: that a step minimizes, for a batch of the images.
        path: of the trajectory; during training it is called ``PATH.partial``.
        description: what the progress bar says.

    Raises:
        TrajectoryError: the settings leave fewer than two checkpoints, the training diverged, or the path
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
    run = _Run(build_network(), images, training, loss, partial / "training.safe.pt")
    with (
        torch_threads(THREADS),
        TrajectoryWriter(partial, every=training.checkpoint_every) as writer,
        progress(description, training.steps, done=run.step) as advance,
        torch.enable_grad(),
    ):
        run.save_checkpoint(writer)
        for value in run.train():
            run.save_checkpoint(writer)
            advance(note=f"loss {value:.3f}")
    run.state_path.unlink()
    partial.replace(path)
    return Trajectory.open(path)


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrajectoryError(f"{path}: {error.strerror}; choose a cache folder with LCSC_CACHE") from error


def _forget_unborn(partial: Path) -> None:
    """Remove the states of a run that stopped before its first checkpoint, so that it begins again."""
    if not (partial / MANIFEST).exists():
        for state in partial.glob("training.safe.*"):
            state.unlink()


class _Run:
    """A training run that can be stopped after any checkpoint and continued."""

    def __init__(
        self, network: nn.Module, images: Tensor, training: Training, loss: BatchLoss, state_path: Path
    ) -> None:
        self.network, self.images, self.training, self.loss = network, images, training, loss
        self.state_path = state_path
        self.generator = torch.Generator().manual_seed(derive_seed(training.seed, "training"))
        initialize(network, self.generator)
        self.optimizer = torch.optim.RAdam(network.parameters(), lr=training.learning_rate)
        self.step = 0
        if state_path.exists():
            self._load_state()

    def train(self) -> Iterator[float]:
        """Train to the end; gives each step's loss."""
        self.network.train()
        while self.step < self.training.steps:
            yield self._train_step()

    def _train_step(self) -> float:
        chosen = torch.randint(len(self.images), (self.training.batch_size,), generator=self.generator)
        loss = self.loss(self.network, self.images[chosen], self.step, self.generator)
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
        """Save the state, then the checkpoint: after a crash between the two, the state holds the checkpoint.

        The checkpoint is written while training goes on. The next state waits until it is on the disk.
        """
        if self.step and self.step % self.training.checkpoint_every == 0:
            writer.flush()
            self._save_state()
            writer.append(self.step, self.network, wait=False)

    def _save_state(self) -> None:
        state = {
            "step": self.step,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }
        with replacing(self.state_path) as pending:
            torch.save(state, pending)

    def _load_state(self) -> None:
        try:
            state = torch.load(self.state_path, weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise TrajectoryError(f"{self.state_path}: is damaged; delete it, and training begins anew") from error
        self.step = int(state["step"])
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
