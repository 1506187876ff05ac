"""Fine-tuning of all weights by the gradient of an objective. It leaves a trajectory that can be searched.

Adam runs on fresh noise at every step; the answer is an average of its iterates. ``LCSCGradient`` does the same with
the coefficients in place of all weights. FD-loss (arXiv 2604.28190) minimizes the Fréchet distance in this way.
Next to ``NAME.trajectory``, ``NAME.jsonl`` is the learning curve, ``NAME.state.pt`` the state to continue from, and
``NAME.safetensors``, written at the end, the average. All random numbers of a step come from the seed and the number of
the step.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError
from torch import Tensor

from lcsc_opt.base.errors import MetricError, ObjectiveError, StudySpecError, TrainingError
from lcsc_opt.base.files import only_process, replacing
from lcsc_opt.base.progress import notice, progress
from lcsc_opt.base.records import HELD_OUT, Candidate, Coefficients, Constraint, Evaluation, Noise
from lcsc_opt.base.settings import FrozenModel
from lcsc_opt.checkpoints.weights import write_safetensors
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.merge_sample_score import MergeSampleScore
from lcsc_opt.objective.one_model import ONE, OneModel
from lcsc_opt.optimizers.gradient import NOISE_STRIDE, DualAscent, averaging_share
from lcsc_opt.search.bound import constraint_outside_studies
from lcsc_opt.search.resolving import differences
from lcsc_opt.training.trainer import LearningCurve
from lcsc_opt.trajectory import TrajectoryWriter

_NOISE_GROUP = "refine"
_RATE = 1e-4  # Adam's, with so many images a step:
_RATE_IMAGES = 200
_EPSILON = 1e-15  # Adam's 1e-8 would hide the gradients of a loss in a small unit
_CHECKPOINTS = 50  # how many, unless the settings say how many steps lie between two
_STATE = ".state.pt"
_CURVE = ".jsonl"
_ANSWER = ".safetensors"
_SUFFIXES = (_STATE, _CURVE, _ANSWER)
_STATE_SECONDS = 60.0  # between two states; a crash costs at most this time


class RefineSettings(FrozenModel):
    """Length and rate of a refinement.

    Attributes:
        images: that all steps sample together, rounded down to whole steps.
        images_per_step: images of each gradient.
        rate: Adam's rate, about how far each weight moves in a step; see :attr:`adam_rate`.
        checkpoint_every: steps between two checkpoints; by default there are fifty.
        seed: the seed of the noise.
        held_out: how many images the start and the answer are compared on; ``None`` leaves it to the study.
    """

    images: Annotated[int, Field(ge=2)] = 60_000
    images_per_step: Annotated[int, Field(ge=2)] = _RATE_IMAGES
    rate: Annotated[float, Field(gt=0, le=1)] | None = None
    checkpoint_every: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    held_out: Annotated[int, Field(ge=2)] | None = None

    @model_validator(mode="after")
    def _two_checkpoints(self) -> RefineSettings:
        if self.every > self.steps:
            raise ValueError(
                f"{self.images:,} images are {self.steps} steps of {self.images_per_step:,}, "
                f"and a checkpoint is written every {self.every}"
            )
        return self

    @property
    def steps(self) -> int:
        """How many steps the images allow."""
        return self.images // self.images_per_step

    @property
    def every(self) -> int:
        """Steps between two checkpoints."""
        return self.checkpoint_every or max(1, self.steps // _CHECKPOINTS)

    @property
    def adam_rate(self) -> float:
        """The rate; by default 1e-4 at 200 images a step, and more with the square root of their number.

        So Adam takes about the same path: gradients of more images have less noise (Malladi et al. 2022, square root
        scaling rule).
        """
        return self.rate or _RATE * math.sqrt(self.images_per_step / _RATE_IMAGES)


def refine(
    objective: Objective,
    settings: RefineSettings,
    out: Path,
    *,
    start: Callable[[], Coefficients],
    held_out_images: int,
    resume: bool = False,
) -> tuple[Path, Evaluation, Evaluation]:
    """Fine-tune to the end, write the average, and compare it with the start.

    Args:
        objective: whose loss is minimized.
        settings: how long, and how fast.
        out: the trajectory, ``NAME.trajectory``; its first checkpoint, step 0, is the start.
        start: gives the coefficients ``[K]`` of the start; not called when resuming.
        held_out_images: how many images the start and the answer are compared on, unless the settings say so.
        resume: continue from the last state; bit for bit if the device is deterministic.

    Returns:
        The file of the averaged weights, and the evaluations of the start and of the average on held-out noise.

    Raises:
        ObjectiveError: the objective has no gradient in weights.
        StudySpecError: the files exist already, or another process writes them; with ``resume``, there is no state, or
            it has other settings.
        TrainingError: a loss is not finite or cannot be computed; earlier checkpoints are whole.
        TrajectoryError: a checkpoint cannot be written.
    """
    if not isinstance(objective, MergeSampleScore):
        raise ObjectiveError(
            "refine: the objective samples no images with merged weights, so there is nothing to train"
        )
    reason = objective.why_no_gradient()
    if reason is not None:
        raise ObjectiveError(f"refine: all weights follow the gradient of the loss, and {reason}; search coefficients")
    if getattr(objective.sampler, "component", None) == "lora":  # its alphas would have to be written, too
        raise ObjectiveError("refine: trains all weights of a network, and no LoRA; search coefficients")
    if out.suffix != ".trajectory":
        raise StudySpecError(f"{out}: must end in .trajectory")

    busy = StudySpecError(f"{out}: another process refines to it; wait until it is done, or give another name")
    with only_process(out, busy=busy):
        if resume:
            run = _Refinement.resumed(objective, settings, out)
        else:
            _check_new(out)
            coefficients = start()
            constraint = constraint_outside_studies(objective)
            objective.release()  # Adam needs the memory now
            run = _Refinement(objective, settings, coefficients, out, constraint)
            run.save()
        run.descend()
        return run.finish(settings.held_out or held_out_images)


def _check_new(out: Path) -> None:
    """Refuse to write over files of another refinement."""
    for path in (out, *(out.with_suffix(suffix) for suffix in _SUFFIXES)):
        if path.exists():
            advice = "give another name"
            if out.with_suffix(_STATE).exists():
                advice = f"continue with --resume, or {advice}"
            raise StudySpecError(f"{path}: exists already; {advice}")


class _Refinement:
    """All weights while they are fine-tuned.

    Attributes:
        begun: the start, name → tensor in the dtype of the checkpoints.
        model: the iterate; trained tensors are at least float32.
        objective: the objective of the iterate.
        constraint: the bound of the kept metric, if there is one.
        done: how many steps were made, in ``seconds``.
    """

    def __init__(
        self,
        objective: MergeSampleScore,
        settings: RefineSettings,
        coefficients: Coefficients,
        out: Path,
        constraint: Constraint | None,
    ) -> None:
        assert objective.trajectory is not None  # why_no_gradient would have said so
        self.settings = settings
        self.coefficients = coefficients
        self.constraint = constraint
        self.out = out
        self._of_checkpoints = objective
        self._kept = DualAscent()
        self.begun: Mapping[str, Tensor] = objective.trajectory.merge(coefficients)
        varying = objective.trajectory.varying
        trained = sorted(name for name, tensor in self.begun.items() if name in varying and tensor.is_floating_point())
        iterate = {name: _copied(tensor, objective.device, wide=name in trained) for name, tensor in self.begun.items()}
        self.model = OneModel(iterate, frozenset(trained))
        self.objective = objective.on_weights(self.model)
        self._iterate = {name: iterate[name] for name in trained}
        self._average = {name: tensor.clone() for name, tensor in self._iterate.items()}
        self._adam = torch.optim.Adam(list(self._iterate.values()), lr=settings.adam_rate, eps=_EPSILON)
        self.done = 0
        self.seconds = 0.0

    @classmethod
    @torch.no_grad()
    def resumed(cls, objective: MergeSampleScore, settings: RefineSettings, out: Path) -> _Refinement:
        """The run whose state is stored; refused unless it began with the same settings and objective."""
        file = out.with_suffix(_STATE)
        if not file.exists():
            raise StudySpecError(f"{out}: there is nothing to resume; leave --resume out to start")
        try:
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
            stored = json.loads(state["identity"])
        except (OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
            raise TrainingError(f"{file}: is damaged; start again under another name") from error
        current = json.loads(_identity(objective, settings))
        difference = next(differences(stored, current), None)
        if difference is not None:
            raise StudySpecError(f"{out}: was started with other settings: {difference}; give the same settings again")
        if "constraint" not in state and objective.images_for_bound:
            raise TrainingError(
                f"{file}: was begun by lcsc_opt 0.2.0, which did not store the bound of keep; "
                "start again under another name"
            )
        constraint = None
        if state.get("constraint") is not None:
            constraint = Constraint(*state["constraint"])
        run = cls(objective, settings, state["coefficients"].numpy(), out, constraint)
        run.done = int(state["done"])
        run.seconds = float(state["seconds"])
        for name, tensor in run._iterate.items():
            tensor.copy_(state["iterate"][name])
            run._average[name].copy_(state["average"][name])
        run._adam.load_state_dict(state["adam"])
        run._kept = DualAscent(float(state["keep_weight"]))
        return run

    def save(self) -> None:
        """Replace the stored state by everything that a resumed refinement needs."""
        file = self.out.with_suffix(_STATE)
        constraint = None
        if self.constraint is not None:
            constraint = [float(value) for value in dataclasses.astuple(self.constraint)]
        state = {
            "done": self.done,
            "seconds": self.seconds,
            "coefficients": torch.from_numpy(self.coefficients),
            "iterate": self._iterate,
            "average": self._average,
            "adam": self._adam.state_dict(),
            "keep_weight": self._kept.weight,
            "constraint": constraint,
            "identity": _identity(self._of_checkpoints, self.settings),
        }
        try:
            with replacing(file) as pending:
                torch.save(state, pending)
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError
            raise TrainingError(f"{file}: cannot be written ({error})") from error

    def descend(self) -> None:
        """Make the remaining steps. An interruption loses no finished step."""
        settings = self.settings
        curve = LearningCurve(self.out.with_suffix(_CURVE))
        curve.rewind(self.done)
        with (
            TrajectoryWriter(self.out, every=settings.every, resume=self.done) as writer,
            progress("refining", settings.steps, done=self.done) as advance,
        ):
            writer.append(self.done, self.model.weights)
            saved_at = time.monotonic()
            began = time.monotonic() - self.seconds
            while self.done < settings.steps:
                try:
                    evaluation = self._evaluate()
                except KeyboardInterrupt:
                    writer.flush()
                    self.save()
                    notice(f"{self.out}: stopped after step {self.done}; stored up to it")
                    raise
                self._step(evaluation)
                self.seconds = time.monotonic() - began
                writer.append(self.done, self.model.weights, wait=False)
                curve.losses.append(evaluation.loss)
                curve.write(self.done, self.seconds)
                if time.monotonic() - saved_at >= _STATE_SECONDS or self.done == settings.steps:
                    writer.flush()  # the state is never ahead of the checkpoints
                    self.save()
                    saved_at = time.monotonic()
                advance(note=f"loss {evaluation.loss:.4g}")

    def _evaluate(self) -> Evaluation:
        """The loss of the next step, and its gradient in the weights."""
        seed = self.settings.seed * NOISE_STRIDE + self.done
        step = Candidate(
            ONE,
            self.settings.images_per_step,
            Noise(_NOISE_GROUP, seed),
            self._kept.weight,
            self.constraint,
        )
        try:
            evaluation = self.objective.evaluate(step, gradient=True)
            if not math.isfinite(evaluation.loss):
                raise ObjectiveError(f"the loss is {evaluation.loss}; lower the rate")
        except (ObjectiveError, MetricError) as error:
            raise TrainingError(
                f"step {self.done + 1}: {error}; the checkpoints before it are complete in {self.out}"
            ) from error
        return evaluation

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def _step(self, evaluation: Evaluation) -> None:
        """One step of Adam (Kingma and Ba 2015, Algorithm 1) with the evaluated gradient; updates the average, too."""
        for name, tensor in self._iterate.items():
            gradient = self.model.gradients.get(name)
            tensor.grad = None if gradient is None else gradient.to(tensor)
        self._adam.step()
        self._adam.zero_grad()
        self._kept.update(evaluation)
        self.done += 1
        share = averaging_share(self.done)
        for name, tensor in self._average.items():
            tensor.lerp_(self._iterate[name], share)

    def finish(self, held_out_images: int) -> tuple[Path, Evaluation, Evaluation]:
        """Write the average in the dtypes of the checkpoints, and compare it with the start."""
        answer = {name: self._average.get(name, tensor).to(tensor) for name, tensor in self.begun.items()}
        start_objective = self._of_checkpoints.on_weights(OneModel(self.begun, frozenset()))
        answer_objective = self._of_checkpoints.on_weights(OneModel(answer, frozenset()))
        tensors = {**answer, **answer_objective.statistics(ONE)}
        file = self.out.with_suffix(_ANSWER)
        try:
            with replacing(file) as pending:
                tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
                write_safetensors(tensors, pending, {"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise TrainingError(f"{file}: cannot be written ({error})") from error
        held_out = Candidate(ONE, held_out_images, HELD_OUT, constraint=self.constraint)
        with progress("held out", 2) as advance:
            start = start_objective.evaluate(held_out)
            advance(note=f"start {start.loss:.4g}")
            refined = answer_objective.evaluate(held_out)
            advance(note=f"refined {refined.loss:.4g}")
        self.out.with_suffix(_STATE).unlink()
        return file, start, refined


def _identity(objective: MergeSampleScore, settings: RefineSettings) -> str:
    """As JSON: what must stay the same for a refinement to be resumed."""
    identity: dict[str, Any] = settings.model_dump(exclude={"held_out"})
    identity["rate"] = settings.adam_rate
    identity["checkpoint_every"] = settings.every
    return json.dumps({"settings": identity, **objective.fingerprint()})


@torch.inference_mode(mode=False)
@torch.no_grad()
def _copied(tensor: Tensor, device: torch.device, *, wide: bool) -> Tensor:
    """A copy to train. With ``wide``, at least float32: half types would round Adam's steps away."""
    dtype = torch.promote_types(tensor.dtype, torch.float32) if wide else tensor.dtype
    return tensor.to(device, dtype, copy=True)
