"""One loop for all recipes, through Accelerate: on a CPU, a GPU or several GPUs, in full precision or in bf16.

Next to ``NAME.trajectory`` are ``NAME.jsonl``, the learning curve, ``NAME.samples``, and ``NAME.state``, from which
training continues. All random numbers of a step come from the seed, the number of the step and the number of the
process. So a training that was interrupted continues as if it had not been.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lcsc_opt.base.contact_sheet import contact_sheet
from lcsc_opt.base.errors import LcscError, TrainingError
from lcsc_opt.base.files import remove, sync_tree, write_atomically
from lcsc_opt.base.imports import import_extra
from lcsc_opt.base.paths import MANIFEST
from lcsc_opt.base.progress import notice, progress
from lcsc_opt.base.records import HELD_OUT
from lcsc_opt.base.reproducibility import derive_seed
from lcsc_opt.sampling import DiffusersSampler, ImageNoise, NetworkSettings, build_scheduler
from lcsc_opt.training.data import as_floats
from lcsc_opt.training.recipes.base import Batch, Denoiser, TrainingRecipe
from lcsc_opt.trajectory.callbacks import TrajectorySaver
from lcsc_opt.trajectory.manifest import Manifest

STATE_SECONDS = 60.0  # between two saved states; a crash costs about this time
_STEPS_BETWEEN_CHECKS = 50  # of the loss on an accelerator, since fetching it waits for all kernels
_SHEET_IMAGES = 32
_LATEST = "latest"  # the file with the name of the last state
_STATE_NAME = re.compile(r"step[0-9]+")

Precision = Literal["fp32", "bf16"]


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
        precision: the precision of matrix products and convolutions.
        samples_every: steps between two sheets of samples; ``None`` writes none.
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
    precision: Precision = "fp32"
    samples_every: int | None = None


def sibling_path(out: Path, suffix: str) -> Path:
    """Another file or folder of the training that makes the trajectory ``out``."""
    return out.with_name(out.name.removesuffix(".trajectory") + suffix)


def new_accelerator(precision: Precision) -> Any:
    """Accelerate's view of the devices of this process.

    Raises:
        TrainingError: the device has no bf16.
    """
    accelerate = import_extra("accelerate")
    try:
        return accelerate.Accelerator(mixed_precision="bf16" if precision == "bf16" else "no")
    except ValueError as error:
        raise TrainingError(f"--precision {precision}: {' '.join(str(error).split())}") from error


class LearningCurve:
    """``{"step", "loss", "seconds"}`` in each line; the loss is the mean since the line before.

    Args:
        path: the path of the file.
        write: whether this process writes.

    Attributes:
        losses: those of the line that is not written yet.
    """

    def __init__(self, path: Path, *, write: bool = True) -> None:
        self._path = path
        self._write = write
        self.losses: list[float] = []

    def write(self, step: int, seconds: float) -> None:
        """Write a line for the losses that were added since the last line.

        Raises:
            TrainingError: the disk refuses.
        """
        mean = math.fsum(self.losses) / len(self.losses)
        self.losses = []
        if not self._write:
            return
        line = {"step": step, "loss": mean, "seconds": round(seconds, 3)}
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise TrainingError(f"{self._path}: cannot be written ({error.strerror or error})") from error

    def rewind(self, step: int) -> None:
        """Drop the lines after a step, and an unfinished line.

        Raises:
            TrainingError: the disk refuses.
        """
        if not self._write or not self._path.exists():
            return
        try:
            text = self._path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise TrainingError(f"{self._path}: cannot be read ({error.strerror or error})") from error
        retained = []
        for line in text.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # an unfinished line
                if json.loads(line)["step"] <= step:
                    retained.append(f"{line}\n")
        write_atomically(self._path, "".join(retained).encode(), error=TrainingError)


class Trainer:
    """A training that can be stopped after a state and continued.

    Args:
        training: what is trained, and how long.
        network: with its first weights.
        images: ``[n, C, H, W]``, float32 in [-1, 1] or uint8.
        accelerator: from :func:`new_accelerator`.
        noise_scale: factor of ln(sigma) in the network's noise input.
        keeps_start: whether the first weights are saved as the checkpoint of step 0.
        teacher: the teacher of a distillation; a module, if it has weights.
    """

    def __init__(
        self,
        training: Training,
        network: nn.Module,
        images: Tensor,
        *,
        accelerator: Any,
        noise_scale: float = 250.0,
        keeps_start: bool = False,
        teacher: Denoiser | None = None,
    ) -> None:
        recipe = training.recipe
        self.training = training
        self.images = images
        self.accelerator = accelerator
        self.noise_scale = noise_scale
        self.teacher = teacher
        self._keeps_start = keeps_start
        self.step = 0
        self.seconds = 0.0
        self.saved_at = time.monotonic()
        self.unchecked_losses: list[Tensor] = []  # of the last steps, still on the device

        network.train()
        self.average = None
        if recipe.target_rate(0, training.steps) is not None:
            self.average = copy.deepcopy(network).requires_grad_(requires_grad=False)
        trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
        optimizer: Any = getattr(torch.optim, recipe.optimizer)(trainable, lr=recipe.learning_rate)
        self.network, self.optimizer = accelerator.prepare(network, optimizer)
        self.raw = accelerator.unwrap_model(self.network)
        for module in (self.average, teacher):
            if isinstance(module, nn.Module):
                module.to(accelerator.device)
        self.generator = torch.Generator(accelerator.device)

        self.saver = TrajectorySaver(
            training.out, every=training.checkpoint_every, accelerator=accelerator, metadata={"recipe": recipe.name}
        )
        accelerator.register_for_checkpointing(self)
        if self.average is not None:
            accelerator.register_for_checkpointing(self.average)
        self.states = sibling_path(training.out, ".state")
        self.curve = LearningCurve(sibling_path(training.out, ".jsonl"), write=accelerator.is_main_process)
        self.sampler = None
        if training.samples_every is not None and accelerator.is_main_process:
            self.sampler = self._new_sampler()

    def _new_sampler(self) -> DiffusersSampler:
        """A sampler with a copy of the network, so that sampling leaves the mode and graphs of training alone."""
        recipe = self.training.recipe
        return DiffusersSampler(
            copy.deepcopy(self.raw).requires_grad_(requires_grad=False),
            build_scheduler(None, recipe.scheduler()),
            **recipe.sampler,
            image_shape=tuple(self.images.shape[1:]),
            noise=ImageNoise(0),
            timestep_scale=recipe.timestep_scale(self.noise_scale),
            settings=NetworkSettings(device=str(self.accelerator.device)),
        )

    def train(self, *, resume: bool) -> None:
        """Train to the end; with ``resume``, from the last state.

        Raises:
            TrainingError: the loss is not finite, and earlier checkpoints are complete; the training cannot be resumed;
                or its state cannot be written.
            TrajectoryError: a checkpoint cannot be written.
        """
        try:
            self.restore_or_start(resume=resume)
            if self.accelerator.num_processes == 1:
                with _interrupt_deferred() as is_interrupted:
                    self._run_and_save_state(is_interrupted)
            else:
                # an interrupt reaches several processes in different steps, and they must save a state in the same one
                self._run_and_save_state(lambda: False)
        except KeyboardInterrupt:
            if self.accelerator.is_main_process:
                saved_step = (self._latest or "step0").removeprefix("step")
                notice(f"{self.training.out}: stopped after step {self.step}; stored up to step {saved_step}")
            raise
        finally:
            self.saver.close()

    @property
    def _latest(self) -> str | None:
        """The name of the last state, ``stepN``; ``None`` if there is no complete one."""
        try:
            name = (self.states / _LATEST).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
        if _STATE_NAME.fullmatch(name) is None or not (self.states / name).is_dir():
            return None
        return name

    def state_dict(self) -> dict[str, Any]:
        """The state that Accelerate saves with its own."""
        return {"step": self.step, "seconds": self.seconds, "losses": self.curve.losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that Accelerate has loaded."""
        self.step = int(state["step"])
        self.seconds = float(state["seconds"])
        self.curve.losses = list(state["losses"])

    def restore_or_start(self, *, resume: bool) -> None:
        """Load the last state, or save the first one."""
        state_name = self._latest if resume else None
        if resume and self.accelerator.is_main_process:
            self._prepare_rows(state_name)
        self.accelerator.wait_for_everyone()
        if state_name is None:
            self.saver.begin(0)
        else:
            self._load_state(state_name)
        if self._keeps_start and self.step == 0:
            self.saver.keep_start(self.raw)
        if state_name is None:
            self._save_state()
        self.curve.rewind(self.step)

    def _prepare_rows(self, state_name: str | None) -> None:
        """Refuse to resume where checkpoints would be lost, and remove those that are made again.

        Raises:
            TrainingError: the state of the checkpoints is gone, or the checkpoints that the state follows are.
        """
        out = self.training.out
        last_row = _last_step(out)
        if state_name is None and last_row > 0:
            raise TrainingError(
                f"{self.states} holds no complete state, so the training cannot be resumed; its checkpoints are "
                "complete: search them, or train again under another name"
            )
        state_step = 0 if state_name is None else int(state_name.removeprefix("step"))
        if state_step == 0:  # all rows are made again, also that of the start
            if last_row >= 0:
                remove(out)
            return
        expected_row = state_step // self.training.checkpoint_every * self.training.checkpoint_every
        if last_row < expected_row and (expected_row > 0 or self._keeps_start):
            raise TrainingError(
                f"{out} lacks checkpoints up to step {expected_row}: restore it, or train again under another name"
            )

    def _run_and_save_state(self, is_interrupted: Callable[[], bool]) -> None:
        """Train up to the last step, or to the step in which an interrupt came, and save the state.

        The interrupt itself is raised when :func:`_interrupt_deferred` ends.
        """
        with contextlib.ExitStack() as bar:
            advance = None
            if self.accelerator.is_main_process:
                description = f"training {self.training.recipe.name}"
                advance = bar.enter_context(progress(description, self.training.steps, done=self.step))
            for loss in self.run():
                if advance is not None:
                    advance(note="" if loss is None else f"loss {loss:.4g}")
                if is_interrupted():
                    break
        self._save_state()

    def run(self) -> Iterator[float | None]:
        """Train; gives each step's loss, or ``None`` for steps whose loss was not fetched from the device."""
        training = self.training
        start = time.monotonic() - self.seconds
        steps_between_checks = _STEPS_BETWEEN_CHECKS
        if self.accelerator.device.type == "cpu":
            steps_between_checks = 1
        while self.step < training.steps:
            self.unchecked_losses.append(self._step())
            self.step += 1
            self.seconds = time.monotonic() - start
            saves_checkpoint = self.step % training.checkpoint_every == 0
            is_last = self.step == training.steps
            loss = None
            if saves_checkpoint or is_last or len(self.unchecked_losses) >= steps_between_checks:
                loss = self._check_losses()
            if saves_checkpoint:
                self.curve.write(self.step, self.seconds)
                self.saver.step(self.step, self.raw)
                if self._state_is_due():
                    self._save_state()
            if self.sampler is not None and training.samples_every and self.step % training.samples_every == 0:
                self._write_samples(self.sampler)
            yield loss

    def _state_is_due(self) -> bool:
        """Whether the main process's clock says that it is time to save a state; the same in all processes."""
        broadcast = import_extra("accelerate.utils").broadcast_object_list
        is_due = [time.monotonic() - self.saved_at >= STATE_SECONDS]
        return bool(broadcast(is_due)[0])

    def _write_samples(self, sampler: DiffusersSampler) -> None:
        """Write a sheet of images, always from the same noise."""
        sampler.load(self.raw.state_dict())
        with torch.no_grad():
            images = sampler.sample(HELD_OUT, 0, _SHEET_IMAGES).float().nan_to_num().cpu().numpy()
        file = sibling_path(self.training.out, ".samples") / f"step{self.step:08d}.png"
        write_atomically(file, contact_sheet(images), error=TrainingError)

    def _step(self) -> Tensor:
        """Take one optimizer step; gives its loss, on the device."""
        recipe = self.training.recipe
        seed = derive_seed(self.training.seed, "training", self.step, self.accelerator.process_index)
        self.generator.manual_seed(seed)
        size = (recipe.batch_size,)
        chosen = torch.randint(len(self.images), size, generator=self.generator, device=self.generator.device)
        images = self.images[chosen.to(self.images.device)].to(self.accelerator.device)
        batch = Batch(
            images=as_floats(images),
            step=self.step,
            steps=self.training.steps,
            network=self.network,
            target=self.raw if self.average is None else self.average,
            generator=self.generator,
            noise_scale=self.noise_scale,
            teacher=self.teacher,
        )
        with torch.enable_grad(), self.accelerator.autocast():
            loss = recipe.loss(batch)
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        self.optimizer.step()
        rate = recipe.target_rate(self.step, self.training.steps)
        if rate is not None and self.average is not None:  # theta^- ← mu theta^- + (1 - mu) theta
            with torch.no_grad():
                torch._foreach_lerp_(list(self.average.parameters()), list(self.raw.parameters()), 1 - rate)
        return loss.detach()

    def _check_losses(self) -> float:
        """Fetch the losses since the last check, and refuse any that is not finite; gives the last one."""
        losses = torch.stack(self.unchecked_losses).tolist()
        self.unchecked_losses = []
        for step, loss in enumerate(losses, start=self.step - len(losses) + 1):
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss of step {step} is {loss}: lower learning_rate, or check the data; "
                    f"the checkpoints before it are complete in {self.training.out}"
                )
        self.curve.losses.extend(losses)
        return float(losses[-1])

    def _save_state(self) -> None:
        """Write the state that training continues from, then remove the state before it."""
        name = f"step{self.step}"
        if self.unchecked_losses:
            self._check_losses()  # so that no weights are saved that are not finite
        if self._latest == name:
            return
        state = self.states / name
        try:
            self.accelerator.save_state(str(state))
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                sync_tree(self.states)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise TrainingError(
                f"{state}: cannot be written ({_reason(error)}); free space on the disk, then continue with --resume"
            ) from error
        if self.accelerator.is_main_process:
            write_atomically(self.states / _LATEST, name.encode(), error=TrainingError)
            for earlier in self.states.iterdir():
                if earlier.is_dir() and earlier.name != name:
                    remove(earlier)
        self.accelerator.wait_for_everyone()
        self.saved_at = time.monotonic()

    def _load_state(self, name: str) -> None:
        """Continue from a state: sets the step, and begins the saver, which is a part of it.

        Raises:
            TrainingError: it is damaged, or of another model.
        """
        state = self.states / name
        try:
            self.accelerator.load_state(str(state))
        except LcscError:
            raise
        except Exception as error:  # whatever torch, safetensors and pickle raise of damaged files
            raise TrainingError(
                f"{state}: cannot be read ({_reason(error)}); search the checkpoints, or train again under another name"
            ) from error


def _reason(error: Exception) -> str:
    """What a library says of an error, in one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _last_step(trajectory: Path) -> int:
    """The last step that a trajectory names; -1 if it names none."""
    if not (trajectory / MANIFEST).exists():
        return -1
    return max((checkpoint.step for checkpoint in Manifest.load(trajectory).checkpoints), default=-1)


_DEFERRED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def _interrupt_deferred() -> Iterator[Callable[[], bool]]:
    """Defer SIGINT, SIGTERM or SIGHUP until the end, where its own handler is called. A second one acts at once.

    Signals that are ignored, or that end the process without a handler, stay as they are. Only the main thread gets
    signals; in others nothing is deferred.

    Yields:
        Whether a signal waits.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    handlers: dict[int, Any] = {}
    for deferred in _DEFERRED:
        handler = signal.getsignal(deferred)
        if callable(handler):
            handlers[deferred] = handler
    waiting: list[tuple[int, Any]] = []

    def defer(number: int, frame: Any) -> None:
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
