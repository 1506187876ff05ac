"""One loop for all recipes, through Accelerate: on a CPU, a GPU or several GPUs, in full precision or in bf16.

Beside ``NAME.trajectory`` are ``NAME.jsonl``, the learning curve, ``NAME.samples``, and ``NAME.state``, from which
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
from lcsc_opt.base.interrupts import interrupt_held
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

    def beside(self, suffix: str) -> Path:
        """A file or folder beside the trajectory."""
        return self.out.with_name(self.out.name.removesuffix(".trajectory") + suffix)


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
            notice(
                f"{job.out}: stopped after step {loop.step}; with --resume the same command goes on {loop.resumed_from}"
            )
        raise
    finally:
        loop.close()


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
        self.curve = LearningCurve(job.beside(".jsonl"), write=accelerator.is_main_process)
        self.sheets = self._sample_sheets() if accelerator.is_main_process else None
        self.patience = 1 if accelerator.device.type == "cpu" else CHECKED_EVERY
        self.saved_at = time.monotonic()

    def _sample_sheets(self) -> SampleSheets | None:
        job = self.job
        if job.samples_every is None:
            return None
        return SampleSheets(
            job.beside(".samples"),
            recipe=job.recipe,
            network=self.raw,
            image_shape=tuple(job.images.shape[1:]),
            noise_scale=job.noise_scale,
            decoder=job.decoder,
            device=self.accelerator.device,
        )

    @property
    def resumed_from(self) -> str:
        """Where a resumed training would begin, in words."""
        name = self._latest(self.job.beside(".state"))
        if name is None:
            return "from the start"
        step = name.removeprefix("step")
        return "from there" if step == str(self.step) else f"from step {step}"

    def state_dict(self) -> dict[str, Any]:
        """The state that Accelerate saves beside its own."""
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
        states = self.job.beside(".state")
        name = self._latest(states) if resume else None
        if resume and name in (None, "step0") and self.accelerator.is_main_process:
            self._drop_rows(states, name)
        self.accelerator.wait_for_everyone()
        if name is None:
            self.saver.begin(0)
            self._keep_start()
            self.save_state()
            return
        try:
            self.accelerator.load_state(str(states / name))
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise TrainingError(f"{states}: cannot be gone on from ({reason}); train anew elsewhere") from error
        self._keep_start()
        self.curve.rewind(self.step)

    def _drop_rows(self, states: Path, name: str | None) -> None:
        """Remove the rows that training makes again; where the state was removed, they may be all that there is."""
        made = last_step(self.job.out)
        if name is None and made > 0:
            raise TrainingError(
                f"{states}: is not there, and without it the training of {made:,} steps cannot go on; its checkpoints "
                "are whole: search them, or train anew under another name"
            )
        remove(self.job.out)

    def _keep_start(self) -> None:
        if self.job.keeps_start and self.step == 0:
            self.saver.keep_start(self.raw)

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
        began = time.monotonic() - self.seconds
        while self.step < self.job.steps:
            self.waiting.append(self._step())
            self.step += 1
            self.seconds = time.monotonic() - began
            due = self.step % self.job.checkpoint_every == 0
            shown = None
            if due or len(self.waiting) >= self.patience or self.step == self.job.steps:
                shown = self._look()
            if due:
                self.curve.write(self.step, self.seconds)
                self.saver.step(self.step, self.raw)
                self._save_state_in_time()
            if self.sheets is not None and self.job.samples_every and self.step % self.job.samples_every == 0:
                self.sheets.write(self.step, self.raw)
            yield shown

    def _step(self) -> Tensor:
        job = self.job
        self.generator.manual_seed(derive_seed(job.seed, "training", self.step, self.accelerator.process_index))
        chosen = torch.randint(
            len(job.images), (job.recipe.batch_size,), generator=self.generator, device=self.generator.device
        )
        images = as_floats(job.images[chosen.to(job.images.device)].to(self.accelerator.device))
        batch = Batch(
            images=images,
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
        self._follow()
        return loss.detach()

    @torch.no_grad()
    def _follow(self) -> None:
        """The target: theta^- ← mu theta^- + (1 - mu) theta."""
        rate = self.job.recipe.target_rate(self.step, self.job.steps)
        if rate is not None and self.average is not None:
            torch._foreach_lerp_(list(self.average.parameters()), list(self.raw.parameters()), 1 - rate)

    def _look(self) -> float:
        """The last loss, after a check that all are finite since the last look."""
        losses = torch.stack(self.waiting).tolist()
        self.waiting = []
        for before, loss in enumerate(losses):
            if not math.isfinite(loss):
                step = self.step - len(losses) + 1 + before
                raise TrainingError(
                    f"the loss of step {step} is {loss}: lower learning_rate, or look at the data; "
                    f"the checkpoints before it are whole in {self.job.out}"
                )
        self.curve.add(losses)
        return float(losses[-1])

    def _save_state_in_time(self) -> None:
        """Save the state in all processes when the main process finds that it is time."""
        from accelerate.utils import broadcast_object_list

        due = [time.monotonic() - self.saved_at >= self.job.state_seconds]
        if bool(broadcast_object_list(due)[0]):
            self.save_state()

    def save_state(self) -> None:
        """Write the state that training continues from, then remove the state before it."""
        states = self.job.beside(".state")
        name = f"step{self.step}"
        if self.waiting:
            self._look()  # before weights are saved that are not finite
        if (states / name).is_dir() and self._latest(states) == name:
            return
        self.accelerator.save_state(str(states / name))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            write_atomically(states / LATEST, name.encode(), error=TrainingError)
            for old in states.iterdir():
                if old.is_dir() and old.name != name:
                    shutil.rmtree(old)
        self.accelerator.wait_for_everyone()
        self.saved_at = time.monotonic()

    def _latest(self, states: Path) -> str | None:
        try:
            return (states / LATEST).read_text(encoding="utf-8")
        except OSError:
            return None

    def close(self) -> None:
        """Close the trajectory, so that other processes can write it."""
        self.saver.close()


def last_step(path: Path) -> int:
    """The last step that a trajectory holds; 0 where there is none."""
    try:
        return Trajectory.open(path).steps[-1]
    except TrajectoryError:
        return 0
