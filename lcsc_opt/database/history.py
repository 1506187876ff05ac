"""The history of a study as plain arrays, without coefficients."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from optuna.trial import TrialState

from lcsc_opt.database.cross_check import CrossCheck
from lcsc_opt.database.judges import Judge
from lcsc_opt.database.names import SUCCEEDED, label
from lcsc_opt.database.nodes import NODES, KeptNodes

HOLDER = "holder"  # the attribute of a study that names its last coordinator

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
        ("started", np.float64),
        ("ended", np.float64),
        ("loss", np.float64),
        ("asked", np.float64),
        *((name, np.float64) for name in COSTS),
    ]
)
"""One trial. ``state`` is the value of Optuna's ``TrialState``; ``started`` and ``ended`` are seconds since 1970, NaN
where unknown; ``loss`` is NaN unless the trial succeeded; ``asked`` is how many images a failed trial was asked for,
zero where no number was named; costs are zero where they are not known. ``tell_index`` is the trial's place among the
results that the optimizer was told; where none is stored, it is the trial's number."""


@dataclasses.dataclass(frozen=True)
class Holder:
    """The process that runs a study; ``since`` is in seconds since 1970."""

    host: str
    process: int
    since: float


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """A study's answer on noise that the search never saw.

    Attributes:
        trial: the number of the chosen trial.
        loss: mean over the groups of noise.
        images: images of each group; ``None`` where that is not stored.
        groups: the loss on each group of noise.
        baselines: name → loss on the same noise.
        seeds: the seeds of the groups of noise.
        cross_check: the answer in features that the loss does not see; ``None`` where not measured.
        judges: the metrics that are not the loss, each beside the baseline's value.
        warning: one line where the loss is below its baseline, and the cross-check is not, or not for certain, or a
            judge got worse.
        doubted: the metrics that the warning is about.
        metrics: the answer's metrics, each the mean over the groups of noise.
    """

    trial: int | None
    loss: float | None
    images: int | None = None
    groups: tuple[float, ...] = ()
    baselines: Mapping[str, float] = dataclasses.field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    cross_check: CrossCheck | None = None
    judges: tuple[Judge, ...] = ()
    warning: str | None = None
    doubted: tuple[str, ...] = ()
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def sample(self) -> tuple[int | None, tuple[int, ...]]:
        """Images and groups of noise: losses compare only where these are the same, since FID depends on both."""
        return self.images, self.seeds

    @classmethod
    def parse(cls, stored: Any) -> HeldOut | None:
        """The study attribute ``held_out``; ``None`` before there is one."""
        if not isinstance(stored, Mapping):
            return None
        baselines = {name: float(known["loss"]) for name, known in (stored.get("baselines") or {}).items()}
        seeds = tuple(int(group["seed"]) for group in stored.get("groups") or ()) or (0,)
        return cls(
            trial=stored.get("trial"),
            loss=stored.get("loss"),
            images=stored.get("images"),
            groups=tuple(float(group["loss"]) for group in stored.get("groups") or ()),
            baselines=baselines,
            seeds=seeds,
            cross_check=CrossCheck.parse(stored.get("cross_check")),
            judges=Judge.parse_all(stored.get("judges")),
            warning=stored.get("warning"),
            doubted=tuple(stored.get("doubted") or ()),
            metrics=stored.get("metrics") or {},
        )


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
        reasons: number → the reasons of its failed attempts, also for trials that succeeded later.
        tracebacks: reason → the traceback of the last exception with that reason.
        steps: ``[K]`` training steps of the checkpoints.
        budget: ``{"evaluations": n}`` or ``{"images": n}``.
        workers: how many evaluate at once.
        ordered: whether results are told in the order of the asks.
        ended: whether the search has spent its budget, or had nothing more to ask.
        forked_from: the study whose trials it took over.
        held_out: the answer on held-out noise.
        average: what the answer of an EMA grid is called, as ``average of the last 10``; ``None`` of other studies.
        metric: what the loss is called: ``FID`` where it is one, else ``loss``.
        keeps: whether a setting keeps a metric at EMA*'s value, so that a loss may have a penalty.
        holder: the process that runs it now.
        nodes: what its workers were last seen doing; ``None`` without workers.
        revision: new with every change of anything above but ``holder`` and ``nodes``, and where a study is made anew.
        read_at: when it was read, in seconds since 1970.
    """

    study_id: int
    study: str
    experiment: str
    optimizer: str
    seed: int
    trials: Trials
    reasons: Mapping[int, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    tracebacks: Mapping[str, str] = dataclasses.field(default_factory=dict)
    steps: tuple[int, ...] = ()
    budget: Mapping[str, int] = dataclasses.field(default_factory=dict)
    workers: int = 1
    ordered: bool = True
    ended: bool = False
    forked_from: str | None = None
    held_out: HeldOut | None = None
    average: str | None = None
    metric: str = "loss"
    keeps: bool = False
    holder: Holder | None = None
    nodes: KeptNodes | None = None
    revision: int = 0
    read_at: float = 0.0

    @property
    def label(self) -> str:
        """The optimizer's name in tables; that of an EMA grid says which average is EMA*."""
        return label(self.optimizer) + ("" if self.average is None else f" ({self.average})")

    @property
    def state(self) -> str:
        """``finished``, ``unfinished`` or ``empty``."""
        return "finished" if self.ended else "unfinished" if len(self.trials) else "empty"

    @property
    def held_out_loss(self) -> float | None:
        """The answer's loss on held-out noise; ``None`` before it was measured."""
        return None if self.held_out is None else self.held_out.loss

    @property
    def held_out_images(self) -> int | None:
        """The number of images of its held-out loss; ``None`` where there is no such loss, or no images."""
        return None if self.held_out is None or self.held_out.loss is None else self.held_out.images or None

    @property
    def cross_check(self) -> CrossCheck | None:
        """The answer in features that the loss does not see; ``None`` where not measured."""
        return None if self.held_out is None else self.held_out.cross_check

    @property
    def warning(self) -> str | None:
        """The warning of the held-out report, see :class:`HeldOut`; ``None`` where there is none."""
        return None if self.held_out is None else self.held_out.warning

    @property
    def evaluations(self) -> int:
        """Finished trials, failed ones included."""
        return len(self.finished)

    @property
    def images(self) -> int:
        """How many images the search sampled."""
        return int(self.finished["images"].sum())

    @property
    def seconds(self) -> float:
        """How many seconds the search spent in evaluations."""
        return round(float(self.finished["seconds"].sum()), 3)

    @property
    def running(self) -> bool:
        """Whether somebody runs it now."""
        return self.holder is not None

    @property
    def finished(self) -> Trials:
        """Trials that ended, failed ones included, in the order in which the optimizer was told of them."""
        done = self.trials[is_finished(self.trials)]
        return np.asarray(done[np.lexsort((done["number"], done["tell_index"], ~done["inherited"]))])

    @property
    def compared(self) -> Trials:
        """:attr:`finished`, in which the losses that do not compare with others are NaN."""
        return compared_only(self.finished)

    @property
    def failed(self) -> Trials:
        """Trials that failed, by number."""
        return np.asarray(self.trials[self.trials["state"] == TrialState.FAIL.value])

    @property
    def best(self) -> int | None:
        """The number of the trial with the lowest loss that compares; of equal ones the earlier."""
        known = compared_only(self.trials)
        known = known[~np.isnan(known["loss"])]
        return int(known["number"][known["loss"].argmin()]) if len(known) else None

    @property
    def searched(self) -> float | None:
        """The lowest loss of the search that compares."""
        best = self.best
        return None if best is None else float(self.trials["loss"][self.trials["number"] == best][0])

    @property
    def chosen(self) -> int | None:
        """The number of the trial that is the study's answer: chosen on other noise, else the best."""
        wanted = None if self.held_out is None else self.held_out.trial
        known = self.trials["number"][~np.isnan(self.trials["loss"])]
        return wanted if wanted is not None and wanted in known else self.best

    def as_row(self) -> dict[str, Any]:
        """What ``lcsc list --format json`` prints of a study."""
        names = ("study", "optimizer", "seed", "state", "searched")
        costs = ("held_out_images", "evaluations", "images", "seconds")
        return {
            **{name: getattr(self, name) for name in names},
            "held_out": self.held_out_loss,
            **{name: getattr(self, name) for name in costs},
            "cross_check": None if self.cross_check is None else dataclasses.asdict(self.cross_check),
            "judges": [] if self.held_out is None else [dataclasses.asdict(judge) for judge in self.held_out.judges],
        }


def compared_only(trials: Trials) -> Trials:
    """A copy in which the losses that do not compare with others are NaN."""
    kept = trials.copy()
    kept["loss"][trials["state"] != TrialState.COMPLETE.value] = np.nan
    return kept


def images_taken(trials: Trials) -> Floats:
    """``[n]`` images that each trial took of a budget: those it sampled; for a failed trial, those it was asked for.

    A failed trial that names no number took as many as a complete trial.

    Args:
        trials: at least all finished ones of a study.
    """
    plain = trials["images"][~np.isnan(compared_only(trials)["loss"])].max(initial=0.0)
    asked = np.where(trials["asked"] > 0, trials["asked"], plain)
    return np.where(trials["state"] == TrialState.FAIL.value, asked, trials["images"])


def is_finished(trials: Trials) -> npt.NDArray[np.bool_]:
    """``[n]``, whether each trial has ended."""
    return ~np.isin(trials["state"], [state.value for state in TrialState if not state.is_finished()])


def is_kept(specification: Mapping[str, Any]) -> bool:
    """Whether the objective of a study's specification has the setting ``keep`` of our objectives."""
    settings = (specification.get("objective") or {}).get("settings") or {}
    return settings.get("keep") is not None


Rows = list[tuple[Any, ...]]
"""Rows of trials: study, trial, number, state, start, end, value, and the texts of ``cost`` and ``attempts``."""


def with_attributes(study: StudyHistory, attributes: Mapping[str, Any]) -> StudyHistory:
    """The study updated with its user attributes. Those that never change may be missing where they are known."""
    changes: dict[str, Any] = {}
    if "steps" in attributes:
        changes["steps"] = tuple(attributes["steps"])
    if "forked_from" in attributes:
        changes["forked_from"] = attributes["forked_from"]
    if specification := attributes.get("specification"):
        changes["workers"] = int(specification.get("workers", 1))
        changes["ordered"] = specification.get("tells", "ordered") == "ordered"
        changes["keeps"] = is_kept(specification)
    return dataclasses.replace(
        study,
        budget={unit: n for unit, n in (attributes.get("budget") or {}).items() if n is not None},
        ended=bool(attributes.get("search_ended")),
        held_out=HeldOut.parse(attributes.get("held_out")),
        nodes=KeptNodes.parse(attributes.get(NODES)),
        holder=None if (known := attributes.get(HOLDER)) is None else Holder(**known),
        **changes,
    )


def with_trials(study: StudyHistory, rows: Rows, extras: Mapping[int, Mapping[str, Any]]) -> StudyHistory:
    """The study updated with trials that are new or were read again.

    Args:
        study: as it was known.
        rows: of trials.
        extras: trial → name → value, for attributes that only some trials have.
    """
    if not rows:
        return study
    trials = _merge(study.trials, _trials(rows, extras))
    attempts = _attempts(rows, extras)
    reasons = {
        number: tuple(str(attempt.get("reason", "unknown")) for attempt in made) for number, made in attempts.items()
    }
    read_again = {row[2] for row in rows}
    kept = {number: known for number, known in study.reasons.items() if number not in read_again}
    texts = {
        str(attempt["reason"]): str(attempt["traceback"])
        for made in attempts.values()
        for attempt in made
        if "traceback" in attempt
    }
    return dataclasses.replace(
        study, trials=trials, reasons={**kept, **reasons}, tracebacks={**study.tracebacks, **texts}
    )


def _merge(before: Trials, fresh: Trials) -> Trials:
    """Known and new trials, by number; rows that were read again take the place of the old ones."""
    old = before[~np.isin(before["trial_id"], fresh["trial_id"])]
    merged = np.concatenate([old, fresh])
    merged = merged[np.argsort(merged["number"], kind="stable")]
    merged.setflags(write=False)
    return merged


def _trials(rows: Rows, extras: Mapping[int, Mapping[str, Any]]) -> Trials:
    found = np.zeros(len(rows), dtype=TRIAL)
    _, ids, numbers, states, started, ended, values, costs, _ = zip(*rows, strict=True)
    found["trial_id"], found["number"] = ids, numbers
    found["tell_index"] = [
        extras.get(key, {}).get("tell_index", number) for key, number in zip(ids, numbers, strict=True)
    ]
    found["inherited"] = ["inherited" in extras.get(key, {}) for key in ids]
    found["state"] = [state.value for state in states]
    found["started"], found["ended"] = seconds(started), seconds(ended)
    loss = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    found["asked"] = [extras.get(key, {}).get("images") or 0 for key in ids]
    found["loss"] = np.where(np.isin(found["state"], [state.value for state in SUCCEEDED]), loss, np.nan)
    parsed = _parse_all(costs)
    for name in COSTS:
        found[name] = [cost.get(name, 0.0) for cost in parsed]
    return found


def seconds(moments: Sequence[Any]) -> Floats:
    """Datetimes of Optuna's tables, which are UTC without a time zone → seconds since 1970."""
    stamps = np.array(moments, dtype="datetime64[us]")
    return np.where(np.isnat(stamps), np.nan, stamps.astype(np.int64) / 1e6)


def _parse_all(texts: Sequence[str | None]) -> list[dict[str, Any]]:
    """JSON mappings, parsed all at once. If one cannot be read, they are parsed one by one, and that one is empty."""
    try:
        parsed = json.loads(f"[{','.join(text or '{}' for text in texts)}]")
    except ValueError:
        parsed = [parse(text, {}) for text in texts]
    return [value if isinstance(value, dict) else {} for value in parsed]


def parse(text: str | None, default: Any) -> Any:
    """JSON; ``default`` where it cannot be read."""
    try:
        return json.loads(text or "null")
    except ValueError:
        return default


def _attempts(rows: Rows, extras: Mapping[int, Mapping[str, Any]]) -> dict[int, list[Mapping[str, Any]]]:
    """Trial number → its failed attempts; for a failed trial that stores none, one attempt with its reason."""
    found: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        attempts = parse(row[-1], None) or [] if row[-1] else []
        if row[3] == TrialState.FAIL and not attempts:
            attempts = [extras.get(row[1], {})]
        if attempts:
            found[row[2]] = attempts
    return found
