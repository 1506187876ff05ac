"""What the database knows of a study, without coefficients, as plain arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from optuna.trial import TrialState

from lcsc_opt.database.compared import compared
from lcsc_opt.database.lease import Holder
from lcsc_opt.database.names import label
from lcsc_opt.database.second import Second

Floats = npt.NDArray[np.float64]
Trials = npt.NDArray[np.void]

PARTS = ("merge_seconds", "sample_seconds", "features_seconds", "metric_seconds")
COSTS = ("images", "model_calls", "seconds", *PARTS)
TRIAL = np.dtype(
    [
        ("trial_id", np.int64),
        ("number", np.int64),
        ("tell_index", np.int64),
        ("state", np.int8),
        ("inherited", np.bool_),
        ("other_noise", np.bool_),
        ("started", np.float64),
        ("ended", np.float64),
        ("loss", np.float64),
        ("asked", np.float64),
        *((name, np.float64) for name in COSTS),
    ]
)
"""One trial. ``state`` is the value of Optuna's ``TrialState``; ``started`` and ``ended`` are seconds since 1970, NaN
where unknown; ``loss`` is NaN unless the trial is complete; ``other_noise`` is whether it was evaluated on other noise
than the search's; ``asked`` is how many images a failed trial was asked for, zero where no number was named; what it
cost is zero where it is not known.
``tell_index`` is its place among the results that the optimizer was told, the number where nothing else is stored."""


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """What a study's answer came to on noise that the search never saw.

    Attributes:
        trial: the number of the chosen trial.
        loss: mean over the groups of noise.
        images: of each group; ``None`` where it was not stored.
        groups: the loss on each group of noise.
        baselines: name → loss on the same noise.
        seeds: of the groups of noise.
        second: the answer in features that the loss does not look at, where it was measured.
        warning: one line where the loss is below its baseline and the second metric is not, or not for certain.
    """

    trial: int | None
    loss: float | None
    images: int | None = None
    groups: tuple[float, ...] = ()
    baselines: Mapping[str, float] = dataclasses.field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    second: Second | None = None
    warning: str | None = None

    @property
    def sample(self) -> tuple[int | None, tuple[int, ...]]:
        """Images and groups of noise: losses compare only where these are the same, since FID depends on both."""
        return self.images, self.seeds

    @classmethod
    def parse(cls, stored: Any) -> HeldOut | None:
        """The study attribute ``held_out``; ``None`` before there is one."""
        if not isinstance(stored, Mapping):
            return None
        groups = tuple(float(group["loss"]) for group in stored.get("groups") or ())
        baselines = {name: float(known["loss"]) for name, known in (stored.get("baselines") or {}).items()}
        seeds = tuple(int(group["seed"]) for group in stored.get("groups") or ()) or (0,)
        return cls(
            trial=stored.get("trial"),
            loss=stored.get("loss"),
            images=stored.get("images"),
            groups=groups,
            baselines=baselines,
            seeds=seeds,
            second=Second.parse(stored.get("second")),
            warning=stored.get("warning"),
        )


def ema_beside(held_out: HeldOut | None, ema: HeldOut | None) -> float | None:
    """EMA*'s loss on the noise that ``held_out`` is of; ``None`` where it was not measured on that.

    Args:
        held_out: of a study.
        ema: of the EMA grid, whose own report may be of fewer images.
    """
    if held_out is None:
        return None
    if "EMA*" in held_out.baselines:
        return held_out.baselines["EMA*"]
    return ema.loss if ema is not None and ema.sample == held_out.sample else None


def relative(value: float | None, reference: float | None) -> float | None:
    """How far ``value`` is above ``reference``, as a share of it: -0.6 is 60 % below.

    ``None`` where one is not known, or the two have different signs: a share then means nothing.
    """
    if value is None or not reference or value * reference < 0:
        return None
    return (value - reference) / abs(reference)


@dataclasses.dataclass(frozen=True, eq=False)
class StudyHistory:
    """One study at one moment.

    Attributes:
        study_id: the database's key.
        study: ``experiment/optimizer/seed``.
        experiment: the first part of it.
        optimizer: its name.
        seed: of the study.
        trials: ``[n]`` of :data:`TRIAL`, by number.
        reasons: number → why each of its attempts failed; of trials that failed, or succeeded when tried again.
        steps: ``[K]`` training steps of the checkpoints.
        budget: ``{"evaluations": n}`` or ``{"images": n}``.
        workers: how many evaluate at once.
        ordered: whether results are told in the order of the asks.
        ended: whether the search has spent its budget, or had nothing more to ask.
        forked_from: the study whose trials it took over.
        held_out: the answer on held-out noise.
        metric: what the loss is called: ``FID`` where it is one, else ``loss``.
        holder: who runs it, or ran it and did not end properly.
        revision: grows with every change of anything above but ``holder``.
        read_at: when it was read, in seconds since 1970.
    """

    study_id: int
    study: str
    experiment: str
    optimizer: str
    seed: int
    trials: Trials
    reasons: Mapping[int, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    steps: tuple[int, ...] = ()
    budget: Mapping[str, int] = dataclasses.field(default_factory=dict)
    workers: int = 1
    ordered: bool = True
    ended: bool = False
    forked_from: str | None = None
    held_out: HeldOut | None = None
    metric: str = "loss"
    holder: Holder | None = None
    revision: int = 0
    read_at: float = 0.0

    @property
    def label(self) -> str:
        """The optimizer as tables and legends call it."""
        return label(self.optimizer)

    @property
    def state(self) -> str:
        """``finished``, ``unfinished`` or ``empty``."""
        return "finished" if self.ended else "unfinished" if len(self.trials) else "empty"

    @property
    def running(self) -> bool:
        """Whether somebody runs it now."""
        return self.holder is not None and self.holder.alive

    @property
    def finished(self) -> Trials:
        """Trials that ended, failed ones included, in the order in which the optimizer was told of them."""
        done = self.trials[is_finished(self.trials)]
        return np.asarray(done[np.lexsort((done["number"], done["tell_index"], ~done["inherited"]))])

    @property
    def compared(self) -> Trials:
        """:attr:`finished`, in which the losses that do not compare with others are NaN (:func:`compared`)."""
        return compared_only(self.finished)

    @property
    def failed(self) -> Trials:
        """Trials that failed, by number."""
        return np.asarray(self.trials[self.trials["state"] == TrialState.FAIL.value])

    @property
    def best(self) -> int | None:
        """The number of the trial with the lowest loss of those that compare, the earlier one of equals."""
        known = compared_only(self.trials)
        known = known[~np.isnan(known["loss"])]
        return int(known["number"][known["loss"].argmin()]) if len(known) else None

    @property
    def searched(self) -> float | None:
        """The lowest loss of the search, of those that compare."""
        best = self.best
        return None if best is None else float(self.trials["loss"][self.trials["number"] == best][0])

    @property
    def chosen(self) -> int | None:
        """The number of the trial that is the study's answer: chosen on other noise, else the best."""
        wanted = None if self.held_out is None else self.held_out.trial
        known = self.trials["number"][~np.isnan(self.trials["loss"])]
        return wanted if wanted is not None and wanted in known else self.best


def compared_only(trials: Trials) -> Trials:
    """A copy in which the losses that do not compare with others are NaN.

    Args:
        trials: at least all finished ones of a study.
    """
    kept = trials.copy()
    kept["loss"][~compared(trials["loss"], trials["images"], trials["other_noise"])] = np.nan
    return kept


def images_taken(trials: Trials) -> Floats:
    """``[n]`` images that each trial took of a budget: what it sampled; a failed one, what it was asked for.

    Where no number was named, that is as many as plain evaluations have, told from those that were complete.

    Args:
        trials: at least all finished ones of a study.
    """
    plain = trials["images"][~np.isnan(compared_only(trials)["loss"])].max(initial=0.0)
    asked = np.where(trials["asked"] > 0, trials["asked"], plain)
    return np.where(trials["state"] == TrialState.FAIL.value, asked, trials["images"])


def is_finished(trials: Trials) -> npt.NDArray[np.bool_]:
    """``[n]``, whether each trial has ended."""
    unfinished = [state.value for state in TrialState if not state.is_finished()]
    return ~np.isin(trials["state"], unfinished)
