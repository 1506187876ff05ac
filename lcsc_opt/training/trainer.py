"""One loop for all recipes, on a CPU or one accelerator.

Next to ``NAME.trajectory`` is ``NAME.state``, from which training continues. All random numbers of a step come
from the seed and the number of the step. So a training that was interrupted continues as if it had not been.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lcsc_opt.base import accelerator
from lcsc_opt.base.errors import TrainingError, text_of
from lcsc_opt.base.files import remove, write_atomically
from lcsc_opt.base.paths import MANIFEST
from lcsc_opt.base.progress import notice, progress
from lcsc_opt.base.reproducibility import derive_seed
from lcsc_opt.training.data import as_floats
from lcsc_opt.training.recipes.base import Batch, Denoiser, TrainingRecipe
from lcsc_opt.trajectory.callbacks import TrajectorySaver
from lcsc_opt.trajectory.manifest import Manifest

STATE_SECONDS = 60.0  # between two saved states, at least; a crash costs about this time


@dataclasses.dataclass(frozen=True)
class Training:
    """A request of ``lcsc train``.

    Attributes:
        recipe: the loss and its settings.
        data: ``digits``, ``photographs``, ``mnist``, ``cifar10``, a folder or a zip file.
        out: the trajectory.
        steps: the number of training steps.
        checkpoint_every: steps between two checkpoints.
        teacher: the folder of a diffusion model that is distilled.
        begin: the folder of a model whose weights the training starts from.
        network: the folder, or the ``config.json``, of a network of diffusers; without it a small U-Net.
        seed: the seed of all random numbers.
    """

    recipe: TrainingRecipe
    data: str
    out: Path
    steps: int
    checkpoint_every: int
    teacher: Path | None = None
    begin: Path | None = None
    network: Path | None = None
    seed: int = 0


def sibling_path(out: Path, suffix: str) -> Path:
    """Another file or folder of a training: ``NAME.trajectory`` → ``NAME.model`` for the suffix ``.model``."""
    return out.with_name(out.name.removesuffix(".trajectory") + suffix)


class Trainer:
    """A training that continues from its last state.

    Args:
        training: what is trained, and how long.
        network: with its first weights.
        images: ``[n, C, H, W]``, float32 in [-1, 1] or uint8.
        noise_scale: factor of ln(sigma) in the network's noise input.
        keeps_start: whether the first weights are saved as the checkpoint of step 0: those of a model of the same kind.
        teacher: the teacher of a distillation; a module, if it has weights.
    """

    def __init__(
        self,
        training: Training,
        network: nn.Module,
        images: Tensor,
        *,
        noise_scale: float = 250.0,
        keeps_start: bool = False,
        teacher: Denoiser | None = None,
    ) -> None:
        recipe = training.recipe
        self.training = training
        self.images = images
        self.device = accelerator.find("auto")
        self.noise_scale = noise_scale
        self.teacher = teacher
        self.step = 0
        self.saved_at = time.monotonic()
        self._keeps_start = keeps_start
        self._saved_step = 0

        self.network = network.train().to(self.device)
        self.average = None
        if recipe.target_rate(0, training.steps) is not None:
            self.average = copy.deepcopy(self.network).requires_grad_(requires_grad=False)
        if isinstance(teacher, nn.Module):
            teacher.to(self.device)
        trainable = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        optimizer_class = getattr(torch.optim, recipe.optimizer)
        self.optimizer: torch.optim.Optimizer = optimizer_class(trainable, lr=recipe.learning_rate)
        self.generator = torch.Generator(self.device)
        self.saver = TrajectorySaver(training.out, every=training.checkpoint_every, metadata={"recipe": recipe.name})
        self.state_file = sibling_path(training.out, ".state")

    def train(self, *, resume: bool) -> None:
        """Train to the end; with ``resume``, from the last state.

        An interruption waits for the end of its step, after which the state is saved.

        Raises:
            TrainingError: the loss is not finite, and earlier checkpoints are complete; the training cannot be resumed;
                or its state cannot be written.
            TrajectoryError: a checkpoint cannot be written.
        """
        training = self.training
        try:
            self._begin(resume=resume)
            with _interrupt_deferred() as is_interrupted:
                with progress(f"training {training.recipe.name}", training.steps, done=self.step) as advance:
                    for loss in self.run():
                        advance(note=f"loss {loss:.4g}")
                        if is_interrupted():
                            break
                self._save_state()
        except KeyboardInterrupt:
            notice(f"{training.out}: stopped after step {self.step}; stored up to step {self._saved_step}")
            raise
        finally:
            self.saver.close()

    def _begin(self, *, resume: bool) -> None:
        """Load the last state if there is one, and save it, or the first one."""
        if resume:
            has_state = self.state_file.exists()
            if has_state:
                self._restore()
            self._prepare_rows(has_state=has_state)
        self.saver.begin(self.step)
        if self._keeps_start and self.step == 0:
            self.saver.keep_start(self.network)
        self._save_state()  # before later checkpoints, which cannot be resumed without a state

    def _prepare_rows(self, *, has_state: bool) -> None:
        """Refuse to resume where checkpoints would be lost; before a training from step 0, remove all that are there.

        Those after a later state are dropped by the saver, which begins at its step.

        Raises:
            TrainingError: the state of the checkpoints is gone, or the checkpoints that the state follows are.
        """
        out = self.training.out
        last_row = _last_step(out)
        if not has_state and last_row > 0:
            raise TrainingError(
                f"{self.state_file} is missing, so the training cannot be resumed; its checkpoints are complete: "
                "search them, or train again under another name"
            )
        if self.step == 0:  # all rows are made again, also that of the start
            if last_row >= 0:
                remove(out)
            return
        expected_row = self.step // self.training.checkpoint_every * self.training.checkpoint_every
        if last_row < expected_row and (expected_row > 0 or self._keeps_start):  # step 0 has a row if it is kept
            raise TrainingError(
                f"{out} lacks checkpoints up to step {expected_row}: restore it, or train again under another name"
            )

    def run(self) -> Iterator[float]:
        """Train from the current step to the end; gives the loss of each step."""
        training = self.training
        while self.step < training.steps:
            loss = self._step()
            self.step += 1
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss of step {self.step} is {loss}: lower learning_rate, or check the data; "
                    f"the checkpoints before it are complete in {training.out}"
                )
            if self.step % training.checkpoint_every == 0:
                self.saver.step(self.step, self.network)
                if time.monotonic() - self.saved_at >= STATE_SECONDS:
                    self._save_state()
            yield loss

    def _step(self) -> float:
        """Take one optimizer step; gives its loss."""
        recipe = self.training.recipe
        self.generator.manual_seed(derive_seed(self.training.seed, "training", self.step, 0))
        size = (recipe.batch_size,)
        chosen = torch.randint(len(self.images), size, generator=self.generator, device=self.device)
        batch = Batch(
            images=as_floats(self.images[chosen.to(self.images.device)].to(self.device)),
            step=self.step,
            steps=self.training.steps,
            network=self.network,
            target=self.network if self.average is None else self.average,
            generator=self.generator,
            noise_scale=self.noise_scale,
            teacher=self.teacher,
        )
        dropout_seed = derive_seed(self.training.seed, "training", self.step, 1)  # not that of the batch and its noise
        with accelerator.seeded(dropout_seed, self.device), torch.enable_grad():
            loss = recipe.loss(batch)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        rate = recipe.target_rate(self.step, self.training.steps)
        if rate is not None and self.average is not None:  # theta^- ← mu theta^- + (1 - mu) theta
            with torch.no_grad():
                torch._foreach_lerp_(list(self.average.parameters()), list(self.network.parameters()), 1 - rate)
        return float(loss.detach())

    def _save_state(self) -> None:
        """Write what training continues from."""
        self.saver.flush()  # first the checkpoints that the state follows
        content = io.BytesIO()
        state = {
            "step": self.step,
            "network": self.network.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(state, content)
        write_atomically(self.state_file, content.getbuffer(), error=TrainingError)
        self._saved_step = self.step
        self.saved_at = time.monotonic()

    def _restore(self) -> None:
        """Continue from the last state.

        Raises:
            TrainingError: it is damaged, or of another model.
        """
        try:
            state: dict[str, Any] = torch.load(self.state_file, map_location="cpu", weights_only=True)
            self.network.load_state_dict(state["network"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = int(state["step"])
        except Exception as error:  # whatever torch raises of damaged files
            reason = text_of(error)[:200] or type(error).__name__
            raise TrainingError(
                f"{self.state_file}: cannot be read ({reason}); search the checkpoints, or train again under another "
                "name"
            ) from error


def _last_step(trajectory: Path) -> int:
    """The last step that a trajectory names; -1 if it names none, since 0 is a step."""
    if not (trajectory / MANIFEST).exists():
        return -1
    return max((checkpoint.step for checkpoint in Manifest.load(trajectory).checkpoints), default=-1)


_DEFERRED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def _interrupt_deferred() -> Iterator[Callable[[], bool]]:
    """Defer SIGINT, SIGTERM or SIGHUP until the end, where its usual handler is called. A second one acts at once.

    Signals that are ignored, or that end the process without a handler, stay as they are. Only the main thread gets
    signals; in others nothing is deferred.

    Yields:
        A function that tells whether a signal waits.
    """
    handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in _DEFERRED if callable(signal.getsignal(number))}
    waiting: list[tuple[int, Any]] = []  # number and frame of each signal that came

    def defer(number: int, frame: Any) -> None:
        """Keep the first signal for the end, and pass a second one on."""
        waiting.append((number, frame))
        if len(waiting) > 1:
            handlers[number](number, frame)

    for number in handlers:
        signal.signal(number, defer)
    try:
        yield lambda: bool(waiting)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if waiting:
        number, frame = waiting[0]
        handlers[number](number, frame)
