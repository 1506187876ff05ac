"""The final choice: the best trials again, on noise that the search never saw.

A search overfits its group of noise a little, and the best of several values is too good by chance. So the ``top``
trials of the search are scored on the *selection* noise, and the best of these is reported on the *held-out* noise,
which decided nothing. Several groups of held-out noise are possible; their spread says how far to trust the number.

If the objective has evaluation metrics, EMA* (or else the EMA that searches start from) is measured on the same noise.
A warning says that the loss is better than that EMA's while another metric is worse, or the cross-check is not better;
and that a metric which ``keep`` was to hold is worse.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import statistics
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial

from lcsc_opt.base.errors import SearchFailedError, StudySpecError, StudyStoreError
from lcsc_opt.base.progress import notice, progress
from lcsc_opt.base.records import HELD_OUT, SELECTION, Candidate, Coefficients, Noise
from lcsc_opt.base.study_file import HeldOutSpec
from lcsc_opt.coefficients.profiles import default_origin
from lcsc_opt.database.arrays import coefficients_of
from lcsc_opt.database.history import StudyHistory, best_ema, kept_metric
from lcsc_opt.database.names import EMA, EMA_GRID, compared_trials, split_name
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.report import report_rows, warning_of
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.evaluation.base import Failure, Outcome, evaluate_safely
from lcsc_opt.objective.contract import Objective

DEFAULT_IMAGES = 50_000  # the usual number for FID (Liu et al. 2024, Section 5.1)
_DEFAULT_TOP = 5
_LAST, _DEFAULT_EMA = "last checkpoint", "default EMA"
_FEWEST_OF_TREND, _TREND_LEVEL = 10, 0.05
_MEASURED = "measured"  # the attribute of a study that keeps all measurements on other noise than the search's

Report = dict[str, Any]
Evaluate = Callable[[Candidate], Outcome]


@dataclasses.dataclass(frozen=True)
class HeldOutPlan:
    """How a study's answer is measured.

    Attributes:
        images: how many, for each trial and each group of noise; 0 if the objective samples none.
        top: the answer is chosen among this many of the best trials.
        groups: how many groups of held-out noise.
        first_group: the seed of the first of them; the others follow.
        baselines: whether EMA* is measured on the same noise, too.
        keep: whether the report becomes the study's result. Otherwise it is a *look*: it is remembered, and changes
            nothing.
    """

    images: int = DEFAULT_IMAGES
    top: int = _DEFAULT_TOP
    groups: int = 1
    first_group: int = 0
    baselines: bool = False
    keep: bool = True

    @classmethod
    def of(
        cls,
        study: StoredStudy,
        *,
        images: int | None = None,
        top: int | None = None,
        groups: int = 1,
        first_group: int = 0,
        keep: bool = False,
    ) -> HeldOutPlan:
        """The plan of ``lcsc evaluate``. What is ``None`` comes from the study file, else from the defaults.

        The report is kept if ``keep`` is true, or if it is the study's first one with at least the planned images.

        Raises:
            StudySpecError: fewer images are to be kept than the study file asks for.
        """
        asked = study.attributes.get("held_out_plan")
        planned = HeldOutSpec(images=DEFAULT_IMAGES, top=_DEFAULT_TOP) if asked is None else HeldOutSpec(**asked)
        images = images or planned.images
        if keep and asked is not None and images < planned.images:
            fewer = f"{images:,} images are fewer than the {planned.images:,} that the study file asks for"
            raise StudySpecError(f"--keep: {fewer}; leave --keep out for a look, or --images")
        first = study.attributes.get("held_out") is None and images >= planned.images
        return cls(images, top or planned.top, groups, first_group, baselines=True, keep=keep or first)


def score_held_out(
    study: StoredStudy, objective: Objective, plan: HeldOutPlan, evaluate: Evaluate | None = None
) -> Report:
    """Choose among the best trials and report the chosen one; write both into the database.

    Each measurement is stored with the study as soon as it is known and never repeated, also after an interruption.

    Args:
        study: its ``held_out`` gets the report, but not for a look.
        objective: the study's.
        plan: how many images, and which noise.
        evaluate: evaluates one candidate; ``None`` does it in this process.

    Returns:
        The report, which a plan with ``keep`` stores as the study's ``held_out`` attribute: ``trial``, ``loss``,
        ``metrics`` (means over the groups), ``images``, ``groups`` (each with its ``seed``, ``loss`` and ``metrics``),
        ``chosen_from`` with its ``selection`` losses; ``baselines``, if some were measured: name → the same and its
        origin; ``rows``, see :class:`lcsc_opt.database.report.MetricRow`; ``warning``, if metrics did not follow the
        loss.

    Raises:
        StudyStoreError: no trial is complete, or none of them on the search's noise.
        SearchFailedError: one of them cannot be evaluated.
    """
    found = study.trials()
    trials = _best_trials(found, plan.top)
    if not trials:
        raise StudyStoreError(f"{study.name}: no complete trial on the search's noise to evaluate; let it search on")
    signs = objective.evaluation_metrics
    baselines = _baselines(study, objective, plan, needed=bool(signs))
    asked = {trial.number: coefficients_of(trial) for trial in trials}
    where = {number: f"{study.name}: trial {number}" for number in asked}
    with progress(f"{study.name} held out", len(trials) + plan.groups * (1 + len(baselines))) as advance:
        evaluate = evaluate or functools.partial(evaluate_safely, objective)
        measurements = _Measurements(study, plan, evaluate, signs, advance)
        selection = [measurements.of(asked[number], SELECTION, where[number])["loss"] for number in asked]
        _, number = min(zip(selection, asked, strict=True))
        groups = measurements.of_groups(asked[number], where[number])
        report = {"trial": number, **_means(groups, plan.images), "chosen_from": [*asked], "selection": selection}
        if baselines:
            report["baselines"] = {}
        for name, (coefficients, origin) in baselines.items():
            try:
                groups = measurements.of_groups(coefficients, name, origin.get("study"))
                report["baselines"][name] = {**origin, **_means(groups, plan.images)}
            except SearchFailedError as error:
                notice(f"{error}; it is left out")
    against = next((name for name in (EMA, _DEFAULT_EMA) if name in report.get("baselines", {})), None)
    real = objective.real_halves() if signs else {}
    rows = report_rows(report, signs, against, real, objective.cross_check_metric)
    report["rows"] = [dataclasses.asdict(row) for row in rows]
    kept = kept_metric(study.attributes.get("specification") or {}) if baselines else {}
    warnings = (warning_of(rows, kept=kept), _overfits(found))
    if warning := "; ".join(filter(None, warnings)):
        report["warning"] = warning
        notice(f"{study.name}: {warning}")
    if plan.keep:
        study.set_attribute("held_out", report)
    return report


def _best_trials(trials: Sequence[FrozenTrial], top: int) -> list[FrozenTrial]:
    """The ``top`` trials of lowest loss, the best first; only losses that compare, and the same coefficients once."""
    distinct: dict[bytes, FrozenTrial] = {}
    for trial in sorted(compared_trials(trials), key=lambda trial: (trial.value, trial.number)):
        distinct.setdefault(coefficients_of(trial).tobytes(), trial)
    return list(distinct.values())[:top]


def _overfits(trials: Sequence[FrozenTrial]) -> str | None:
    """One line if, in the later half of the search, the loss fell and that to held-out real images rose.

    Both are trends of Kendall's rank correlation with time (Mann 1945) at a level of 5 %.
    """
    from scipy.stats import kendalltau  # takes a second

    pairs = [(trial.value, trial.user_attrs.get("unseen")) for trial in compared_trials(trials)]
    known = [pair for pair in pairs if pair[1] is not None]
    recent = np.array(known[len(known) // 2 :])
    if len(recent) < _FEWEST_OF_TREND:
        return None
    loss, unseen = (kendalltau(np.arange(len(recent)), column) for column in recent.T)
    if not (max(loss.pvalue, unseen.pvalue) < _TREND_LEVEL and loss.statistic < 0 < unseen.statistic):
        return None
    rose = f"{recent[:, 1].min():.4g} → {recent[-1, 1]:.4g}"
    return (
        f"the loss fell, but that to held-out real images rose in the later half of the search ({rose}): it fits the "
        "images of the reference. Take more of these, one row of coefficients, or a smaller budget"
    )


class _Measurements:
    """Losses and metrics of models on noise, stored by coefficients, number of images and noise.

    Held-out measurements that lack one of the ``metrics`` are made again.
    """

    def __init__(
        self,
        study: StoredStudy,
        plan: HeldOutPlan,
        evaluate: Evaluate,
        metrics: Collection[str],
        advance: Callable[..., None],
    ) -> None:
        self._study, self._images, self._evaluate, self._metrics = study, plan.images, evaluate, set(metrics)
        self._noises = [Noise(HELD_OUT.group, plan.first_group + group) for group in range(plan.groups)]
        self._advance = advance

    def of(self, coefficients: Coefficients, noise: Noise, where: str, also: StoredStudy | None = None) -> Report:
        """``loss`` and ``metrics`` of one model, which the study ``also`` may have measured, too.

        Raises:
            SearchFailedError: it cannot be evaluated.
        """
        model = hashlib.sha256(coefficients.tobytes()).hexdigest()[:16]
        key = f"{self._images} {noise.group} {noise.seed}"
        needed = self._metrics if noise.group == HELD_OUT.group else set()
        for one in (self._study, *([] if also is None else [also])):
            found: Report | None = (one.attributes.get(_MEASURED) or {}).get(model, {}).get(key)
            if found is not None and needed <= set(found["metrics"]):
                break
        else:
            outcome = self._evaluate(Candidate(coefficients, images=self._images or None, noise=noise))
            if isinstance(outcome, Failure):
                raise SearchFailedError(f"{where} on {noise.group} noise: {outcome.reason}")
            found = {"loss": outcome.loss, "metrics": dict(outcome.metrics)}
            stored = self._study.attributes.get(_MEASURED) or {}
            self._study.set_attribute(_MEASURED, {**stored, model: {**stored.get(model, {}), key: found}})
        self._advance(note=f"{found['loss']:.4g}")
        return found

    def of_groups(self, coefficients: Coefficients, where: str, study: str | None = None) -> list[Report]:
        """The same for each group of noise, with its ``seed``; the study of that name may have measured it, too."""
        also = None if study is None else StoredStudy.open(self._study.storage, study)
        return [{"seed": noise.seed, **self.of(coefficients, noise, where, also)} for noise in self._noises]


def _means(groups: Sequence[Report], images: int) -> Report:
    """The means over groups of noise, of the metrics that all of them have."""
    names = [name for name in groups[0]["metrics"] if all(name in group["metrics"] for group in groups)]
    return {
        "loss": statistics.fmean(group["loss"] for group in groups),
        "metrics": {name: statistics.fmean(group["metrics"][name] for group in groups) for name in names},
        "images": images,
        "groups": groups,
    }


def _baselines(
    study: StoredStudy, objective: Objective, plan: HeldOutPlan, *, needed: bool
) -> dict[str, tuple[Coefficients, Report]]:
    """Name → coefficients and origin of what the answer is compared with: EMA* of the same experiment.

    Without an EMA grid it is a default EMA, and with ``plan.baselines`` also the last checkpoint. Empty if neither
    ``plan.baselines`` nor the objective's metrics need one.
    """
    experiment, optimizer, _ = split_name(study.name)
    if optimizer == EMA_GRID or not (plan.baselines or needed):
        return {}
    if (found := known_ema(study)) is not None:
        ema, coefficients = found
        return {EMA: (coefficients, {"study": ema.study, "trial": ema.chosen, "label": ema.label})}
    default = {_DEFAULT_EMA: (default_origin(objective.steps), Report())}
    if not plan.baselines:
        return default
    notice(
        f"{experiment} has no finished EMAGrid study of the same objective, so EMA* is not known: the last checkpoint "
        "and one EMA are measured instead; for EMA* run the study file with --optimizer EMAGrid"
    )
    return {_LAST: (np.eye(len(objective.steps))[-1], Report()), **default}


def known_ema(study: StoredStudy) -> tuple[StudyHistory, Coefficients] | None:
    """EMA*: the best of the experiment's finished EMA grids with this study's objective, and ``[K]`` of its answer."""

    def function_of(name: str) -> tuple[Any, Any]:
        fingerprint = StoredStudy.open(study.storage, name).attributes["fingerprint"]
        return fingerprint["objective"], fingerprint.get("code")

    reader = HistoryReader(study.storage)
    grids = [found for found in reader.read(split_name(study.name)[0]) if found.optimizer == EMA_GRID]
    searched = function_of(study.name) if grids else None
    ema = best_ema([found for found in grids if function_of(found.study) == searched])
    coefficients = None if ema is None else reader.answer(ema)
    return None if ema is None or coefficients is None else (ema, coefficients)
