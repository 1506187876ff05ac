"""One loop for all recipes, through Accelerate: on a CPU, a GPU or several GPUs, in full precision or in bf16.

Next to ``NAME.trajectory`` are ``NAME.jsonl``, the learning curve, ``NAME.samples``, and ``NAME.state``, from which
training continues. All random numbers of a step come from the seed, the number of the step and the number of the
process. So a training that was interrupted continues as if it had not been.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lcsc_opt.base.errors import TrainingError, TrajectoryError
from lcsc_opt.base.files import remove, write_atomically
from lcsc_opt.base.machine import interrupt_held
from lcsc_opt.base.progress import notice, progress
from lcsc_opt.base.reproducibility import derive_seed
from lcsc_opt.sampling.latents import LatentDecoder
from lcsc_opt.training.curve import LearningCurve, SampleSheets
from lcsc_opt.training.data import as_floats
from lcsc_opt.training.recipes.base import Batch, Denoiser, Recipe
from lcsc_opt.trajectory import Trajectory
from lcsc_opt.trajectory.callbacks import TrajectorySaver

STATE_SECONDS = 60.0  # between two states; a crash costs about this time
CHECKED_EVERY = 50  # steps between two looks at the loss on a device where each look waits for the device
LATEST = "latest"


@dataclasses.dataclass(frozen=True)
class Job:
    """A training: the recipe, the network, the images, and how long.

    Attributes:
        recipe: the loss, and its settings.
        network: with its first weights.
        images: ``[n, C, H, W]``, float32 in [-1, 1] or uint8; or latents.
        out: the trajectory.
        steps: of training.
        checkpoint_every: steps between two checkpoints.
        seed: of the batches and the noise.
        precision: of matrix products and convolutions.
        noise_scale: factor of ln(sigma) in the network's noise input.
        samples_every: steps between two sheets of samples; ``None`` writes none.
        decoder: latents → images, for the samples.
        keeps_start: whether the first weights are saved as the checkpoint of step 0.
        teacher: of a distillation; a module, if it has weights.
        state_seconds: between two states.
    """

    recipe: Recipe
    network: nn.Module
    images: Tensor
    out: Path
    steps: int
    checkpoint_every: int
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    noise_scale: float = 250.0
    samples_every: int | None = None
    decoder: LatentDecoder | None = None
    keeps_start: bool = False
    teacher: Denoiser | None = None
    state_seconds: float = STATE_SECONDS


def beside(out: Path, suffix: str) -> Path:
    """Another file or folder of the training that makes the trajectory ``out``."""
    return out.with_name(out.name.removesuffix(".trajectory") + suffix)


def new_accelerator(precision: Literal["fp32", "bf16"]) -> Any:
    """Accelerate's view of the devices of this process.

    Raises:
        TrainingError: Accelerate is not installed, or the device has no bf16.
    """
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise TrainingError(f"Accelerate cannot be imported ({error}): pip install accelerate") from error
    try:
        return Accelerator(mixed_precision="bf16" if precision == "bf16" else "no")
    except ValueError as error:
        raise TrainingError(f"--precision {precision}: {' '.join(str(error).split())}") from error


def train(job: Job, *, accelerator: Any, resume: bool) -> None:
    """Train to the end.

    Args:
        job: what is trained.
        accelerator: from :func:`new_accelerator`.
        resume: continue from the last state.

    Raises:
        TrainingError: the loss is not finite; earlier checkpoints are whole.
        TrajectoryError: a checkpoint cannot be written.
    """
    loop = _Loop(job, accelerator)
    try:
        loop.begin(resume=resume)
        if accelerator.num_processes == 1:
            with interrupt_held() as stop:
                loop.run_to_the_end(stop)
        else:  # an interrupt reaches them in different steps, and a state is saved by all in the same one
            loop.run_to_the_end(lambda: False)
    except KeyboardInterrupt:
        if accelerator.is_main_process:
            saved = (loop.latest or "step0").removeprefix("step")
            where = "there" if saved == str(loop.step) else f"step {saved}"
            notice(f"{job.out}: stopped after step {loop.step}; with --resume the same command goes on from {where}")
        raise
    finally:
        loop.saver.close()


class _Loop:
    """A training that can be stopped after a state and continued."""

    def __init__(self, job: Job, accelerator: Any) -> None:
        self.job, self.accelerator = job, accelerator
        network = job.network.train()
        rate = job.recipe.target_rate(0, job.steps)
        self.average = None if rate is None else copy.deepcopy(network).requires_grad_(requires_grad=False)
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        optimizer: Any = getattr(torch.optim, job.recipe.optimizer)(trained, lr=job.recipe.learning_rate)
        self.network, self.optimizer = accelerator.prepare(network, optimizer)
        self.raw = accelerator.unwrap_model(self.network)
        for module in (self.average, job.teacher):
            if isinstance(module, nn.Module):
                module.to(accelerator.device)
        self.saver = TrajectorySaver(
            job.out, every=job.checkpoint_every, accelerator=accelerator, metadata={"recipe": job.recipe.name}
        )
        self.step, self.seconds = 0, 0.0
        self.waiting: list[Tensor] = []  # losses that nobody has looked at yet
        accelerator.register_for_checkpointing(self)
        if self.average is not None:
            accelerator.register_for_checkpointing(self.average)
        self.generator = torch.Generator(accelerator.device)
        self.curve = LearningCurve(beside(job.out, ".jsonl"), write=accelerator.is_main_process)
        self.sheets = None
        if job.samples_every is not None and accelerator.is_main_process:
            self.sheets = SampleSheets(
                beside(job.out, ".samples"),
                recipe=job.recipe,
                network=self.raw,
                image_shape=tuple(job.images.shape[1:]),
                noise_scale=job.noise_scale,
                decoder=job.decoder,
                device=accelerator.device,
            )
        self.patience = 1 if accelerator.device.type == "cpu" else CHECKED_EVERY
        self.states = beside(job.out, ".state")
        self.saved_at = time.monotonic()

    @property
    def latest(self) -> str | None:
        """The name of the last state, ``stepN``."""
        try:
            return (self.states / LATEST).read_text(encoding="utf-8")
        except OSError:
            return None

    def state_dict(self) -> dict[str, Any]:
        """The state that Accelerate saves with its own."""
        began = self.curve.begun
        return {"step": self.step, "seconds": self.seconds, "threads": self._threads(), "losses": began}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that Accelerate has loaded."""
        self.step, self.seconds, self.curve.begun = int(state["step"]), float(state["seconds"]), list(state["losses"])
        before, now = state.get("threads"), self._threads()
        if before is not None and before != now and self.accelerator.is_main_process:
            notice(
                f"{self.job.out}: {before} threads trained it, and {now} go on, so what comes has other last digits; "
                f"OMP_NUM_THREADS={before} keeps them"
            )

    def _threads(self) -> int | None:
        """The number of torch's threads on a CPU, since sums depend on it; ``None`` on other devices."""
        return torch.get_num_threads() if self.accelerator.device.type == "cpu" else None

    def begin(self, *, resume: bool) -> None:
        """Load the last state, or save the first one."""
        name = self.latest if resume else None
        if resume and name in (None, "step0") and self.accelerator.is_main_process:
            if name is None and (made := last_step(self.job.out)) > 0:
                raise TrainingError(
                    f"{self.states}: is not there, and without it the training of {made:,} steps cannot go on; its "
                    "checkpoints are whole: search them, or train anew under another name"
                )
            remove(self.job.out)  # its rows are made again
        self.accelerator.wait_for_everyone()
        if name is None:
            self.saver.begin(0)
        else:
            try:
                self.accelerator.load_state(str(self.states / name))
            except (OSError, RuntimeError, ValueError, KeyError) as error:
                reason = " ".join(str(error).split())[:200]
                raise TrainingError(
                    f"{self.states}: cannot be gone on from ({reason}); train anew elsewhere"
                ) from error
        if self.job.keeps_start and self.step == 0:
            self.saver.keep_start(self.raw)
        if name is None:
            self.save_state()
        else:
            self.curve.rewind(self.step)

    def run_to_the_end(self, stop: Callable[[], bool]) -> None:
        """Train up to the last step, or to the one after which ``stop`` says so, and save the state."""
        if self.accelerator.is_main_process:
            with progress(f"training {self.job.recipe.name}", self.job.steps, done=self.step) as advance:
                for loss in self.run():
                    advance(note="" if loss is None else f"loss {loss:.4g}")
                    if stop():
                        break
        else:
            for _ in self.run():
                pass
        self.save_state()

    def run(self) -> Iterator[float | None]:
        """Train; gives each step's loss, or ``None`` for steps whose loss was not fetched from the device."""
        from accelerate.utils import broadcast_object_list

        job, began = self.job, time.monotonic() - self.seconds
        while self.step < job.steps:
            self.waiting.append(self._step())
            self.step += 1
            self.seconds = time.monotonic() - began
            due = self.step % job.checkpoint_every == 0
            shown = None
            if due or len(self.waiting) >= self.patience or self.step == job.steps:
                shown = self._look()
            if due:
                self.curve.write(self.step, self.seconds)
                self.saver.step(self.step, self.raw)
                late = [time.monotonic() - self.saved_at >= job.state_seconds]
                if bool(broadcast_object_list(late)[0]):  # in all processes when the main one finds that it is time
                    self.save_state()
            if self.sheets is not None and job.samples_every and self.step % job.samples_every == 0:
                self.sheets.write(self.step, self.raw)
            yield shown

    def _step(self) -> Tensor:
        job = self.job
        self.generator.manual_seed(derive_seed(job.seed, "training", self.step, self.accelerator.process_index))
        chosen = torch.randint(
            len(job.images), (job.recipe.batch_size,), generator=self.generator, device=self.generator.device
        )
        batch = Batch(
            images=as_floats(job.images[chosen.to(job.images.device)].to(self.accelerator.device)),
            step=self.step,
            steps=job.steps,
            network=self.network,
            target=self.raw if self.average is None else self.average,
            generator=self.generator,
            noise_scale=job.noise_scale,
            teacher=job.teacher,
        )
        with torch.enable_grad(), self.accelerator.autocast():
            loss = job.recipe.loss(batch)
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        self.optimizer.step()
        rate = job.recipe.target_rate(self.step, job.steps)
        if rate is not None and self.average is not None:  # theta^- ← mu theta^- + (1 - mu) theta
            with torch.no_grad():
                torch._foreach_lerp_(list(self.average.parameters()), list(self.raw.parameters()), 1 - rate)
        return loss.detach()

    def _look(self) -> float:
        """The last loss, after a check that all are finite since the last look."""
        losses = torch.stack(self.waiting).tolist()
        self.waiting = []
        for step, loss in enumerate(losses, start=self.step - len(losses) + 1):
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss of step {step} is {loss}: lower learning_rate, or look at the data; "
                    f"the checkpoints before it are whole in {self.job.out}"
                )
        self.curve.add(losses)
        return float(losses[-1])

    def save_state(self) -> None:
        """Write the state that training continues from, then remove the state before it."""
        name = f"step{self.step}"
        if self.waiting:
            self._look()  # before weights are saved that are not finite
        if (self.states / name).is_dir() and self.latest == name:
            return
        self.accelerator.save_state(str(self.states / name))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            write_atomically(self.states / LATEST, name.encode(), error=TrainingError)
            for old in self.states.iterdir():
                if old.is_dir() and old.name != name:
                    shutil.rmtree(old)
        self.accelerator.wait_for_everyone()
        self.saved_at = time.monotonic()


def last_step(path: Path) -> int:
    """The last step that a trajectory holds; 0 where there is none."""
    try:
        return Trajectory.open(path).steps[-1]
    except TrajectoryError:
        return 0
