"""Other ways to sample, tried one by one beside the study's own: how fast, and what they do to the loss."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lcsc_opt.base.errors import LcscError, ObjectiveError
from lcsc_opt.base.memory import free_memory
from lcsc_opt.base.paths import cache_directory
from lcsc_opt.base.progress import progress
from lcsc_opt.base.records import Candidate
from lcsc_opt.base.study_file import ObjectiveSpec
from lcsc_opt.coefficients.profiles import default_origin
from lcsc_opt.diagnostics.profiling.study import sampling_device, sampling_settings
from lcsc_opt.objective.batch_size import images_per_second, largest_batch
from lcsc_opt.objective.loading import load_objective
from lcsc_opt.objective.merge_sample_score import MergeSampleScore
from lcsc_opt.search.plan import StudyPlan

Settings = Mapping[str, Any]
ROUNDS = 2  # in each, the study's own way and the other one are measured in turn
FASTER = 1.05  # times as fast: the least for which a setting is recommended
LARGEST_CHANGE = 0.01  # of the loss, relative: the most with which a setting is recommended


@dataclasses.dataclass(frozen=True)
class Tried:
    """The result of one way to sample.

    Attributes:
        settings: the settings of the study file that were changed.
        images_per_second: of one batch, through sampler and extractors.
        ratio: the speed relative to that of the study's own way, measured beside it.
        loss: of one EMA, with as many images as in the search.
        loss_change: relative to the study's own way.
        problem: why there are no numbers.
    """

    settings: Settings
    images_per_second: float | None = None
    ratio: float | None = None
    loss: float | None = None
    loss_change: float | None = None
    problem: str | None = None

    @property
    def helps(self) -> bool:
        """Whether it is fast enough, and changes the loss little enough, to be recommended."""
        if self.ratio is None or self.loss_change is None:
            return False
        return self.ratio >= FASTER and abs(self.loss_change) <= LARGEST_CHANGE

    def as_row(self) -> dict[str, Any]:
        """JSON-able."""
        return {**dataclasses.asdict(self), "helps": self.helps}


def try_settings(plan: StudyPlan) -> tuple[Tried, ...]:
    """Measure the study's own settings first, then each change alone, then all changes that help together.

    Each time, the objective is loaded again with the change, samples one batch a few times and evaluates one candidate.

    Raises:
        ObjectiveError: the objective samples no images, or has no setting that could be tried.
    """
    with _quiet():
        base = _load(plan, {})
    known, device = sampling_settings(plan), sampling_device(base)
    changes = variants(known, images=base.images_per_evaluation, on_gpu=device is not None and device.type == "cuda")
    if not changes:
        raise ObjectiveError(
            f"--settings: {plan.spec.objective.file} has none of batch_size, dtype, channels_last, compile"
        )
    measured = [_measure_base(base, known)]
    with progress("trying settings", len(changes)) as advance:
        for change in changes:
            measured.append(_try(plan, base, measured[0], known, change))
            advance(note=described(change))
    together = combined(measured[1:])
    if len(together) > 1:
        measured.append(_try(plan, base, measured[0], known, together))
    return tuple(measured)


def variants(known: Settings, *, images: int, on_gpu: bool) -> list[dict[str, Any]]:
    """The changes that are worth trying, each of one setting: values that the objective's settings do not have now.

    Half types and CUDA graphs are tried where they can help: on a GPU; bfloat16 on a CPU, too.
    """
    size = known.get("batch_size")
    sizes = [] if not isinstance(size, int) else [size // 2, 2 * size, 4 * size]
    tried: dict[str, list[Any]] = {
        "batch_size": [other for other in sizes if 1 <= other < 2 * images],
        "channels_last": [True],
        "dtype": ["bf16", "fp16"] if on_gpu else ["bf16"],
        "compile": [True, "reduce-overhead", "max-autotune"] if on_gpu else [True],
    }
    return [
        {name: value} for name, values in tried.items() if name in known for value in values if value != known[name]
    ]


def combined(tried: Sequence[Tried]) -> dict[str, Any]:
    """For each setting, the fastest value that helps."""
    best: dict[str, tuple[float, Any]] = {}
    for other in tried:
        for name, value in other.settings.items():
            if other.helps and other.ratio is not None and other.ratio > best.get(name, (0.0, None))[0]:
                best[name] = (other.ratio, value)
    return {name: value for name, (_, value) in best.items()}


def recommended(tried: Sequence[Tried]) -> Tried | None:
    """The fastest that helps; ``None`` where the study's own settings are as good."""
    helping = [other for other in tried if other.helps and other.settings]
    return max(helping, key=lambda other: other.ratio or 0.0, default=None)


def described(settings: Settings) -> str:
    """As in a study file: ``dtype: bf16, channels_last: true``."""
    return ", ".join(f"{name}: {yaml_text(value)}" for name, value in settings.items()) or "as in the study file"


def yaml_text(value: Any) -> str:
    """``true`` for True, and everything else as it is written."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _measure_base(base: MergeSampleScore, known: Settings) -> Tried:
    rate = _rate(base, known)
    if rate is None:
        raise ObjectiveError("--settings: one batch does not fit into memory; set a smaller batch_size first")
    return Tried({}, rate, 1.0, _loss(base), 0.0)


def _try(plan: StudyPlan, base: MergeSampleScore, own: Tried, known: Settings, change: Settings) -> Tried:
    """Try one way to sample; if it fails, the error is a part of the result."""
    free_memory()  # of the one before
    problem = "takes more memory than there is"
    try:
        with _quiet():
            other = _load(plan, change)
            rates = [(_rate(base, known), _rate(other, {**known, **change})) for _ in range(ROUNDS)]
            old = max((rate for rate, _ in rates if rate is not None), default=None)
            new = max((rate for _, rate in rates if rate is not None), default=None)
            if old is not None and new is not None:
                loss = _loss(other)
                return Tried(change, new, new / old, loss, _relative(loss, own.loss))
    except (LcscError, RuntimeError) as error:
        problem = " ".join(str(error).split())[:200]
    return Tried(change, problem=problem)


def _quiet() -> contextlib.AbstractContextManager[object]:
    """Hide the notices of an objective: they were printed when it was loaded for the profile."""
    return contextlib.redirect_stderr(io.StringIO())


def _load(plan: StudyPlan, change: Settings) -> MergeSampleScore:
    spec = plan.spec.objective
    changed = ObjectiveSpec(file=spec.file, settings={**spec.settings, **change})
    objective = load_objective(changed, beside=plan.directory)
    if not isinstance(objective, MergeSampleScore):
        raise ObjectiveError(f"--settings: {spec.file} samples no images; there is nothing to try")
    return objective


def _rate(objective: MergeSampleScore, settings: Settings) -> float | None:
    """Images per second of one batch, with an EMA's weights."""
    objective.sampler.load(objective.trajectory.merge(default_origin(objective.steps)))
    device = sampling_device(objective) or torch.device("cpu")
    size = settings.get("batch_size")
    if not isinstance(size, int):
        size = largest_batch(objective.sampler, objective.scores, device=device, cache=cache_directory())
    count = min(size, objective.images_per_evaluation)
    return images_per_second(objective.sampler, objective.scores, count, device=device)


def _loss(objective: MergeSampleScore) -> float:
    return float(objective.evaluate(Candidate(default_origin(objective.steps))).loss)


def _relative(loss: float, own: float | None) -> float | None:
    return None if not own else loss / own - 1
