"""The final choice: the best trials again, on noise that the search never saw.

A search overfits its group of noise a little, and the best of several values is too good by chance. So the ``top``
trials of the search are scored on the *selection* noise, and the best of these is reported on the *held-out* noise,
which decided nothing. The answer of the experiment is chosen on selection noise, too, among these and what the user had
(:mod:`~lcsc_opt.study.choice`). Several groups of held-out noise are possible; their spread says how far to trust the
number.

The last checkpoint, and the trainer's own EMA if there is one, are scored there before the search: their numbers are
also in the trainer's log. If the objective has evaluation metrics, EMA* (or else the EMA that searches start from) is
measured on the same noise. A warning says that the loss is better than that EMA's while another metric is worse, or the
cross-check is not better; that the answer is worse than the last checkpoint or the trainer's EMA; and that a metric
which ``keep`` was to hold is worse.

If the objective has a second sampler, the answer and its baselines are measured there once, too, with as many images as
in an evaluation of the search. A warning says that a gain turns there: the answer belongs to its sampler.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from optuna.trial import FrozenTrial

from lcsc_opt.base.errors import SearchFailedError, StudySpecError, StudyStoreError, TrajectoryError
from lcsc_opt.base.progress import notice, progress
from lcsc_opt.base.records import (
    HELD_OUT,
    SEARCH,
    SELECTION,
    STANDARD_ERROR,
    Candidate,
    Coefficients,
    Noise,
    SamplerTitle,
    Yardstick,
)
from lcsc_opt.base.study_file import EMA_GRID, HeldOutSpec
from lcsc_opt.coefficients.profiles import default_origin, last_alone
from lcsc_opt.database.arrays import coefficients_of
from lcsc_opt.database.history import sign_of
from lcsc_opt.database.names import EMA, LAST_CHECKPOINT, TRAINED, TRAINER_EMA, TRAINER_EMA_SHA256, split_name
from lcsc_opt.database.report import (
    HELD_OUT_REPORT,
    MEASURED,
    Baseline,
    Choice,
    HeldOutReport,
    MeasuredModel,
    Measurement,
    MeasurementKey,
    MetricRow,
)
from lcsc_opt.database.states import compared_trials
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.evaluation.base import Failure, Outcome, evaluate_safely
from lcsc_opt.objective.contract import Objective, ReportedMetrics
from lcsc_opt.study.choice import WAY, choose, on_the_way
from lcsc_opt.study.report_rows import metric_rows, turned, warning_of
from lcsc_opt.study.siblings import known_ema, siblings
from lcsc_opt.study.yardstick import yardstick_on

DEFAULT_IMAGES = 50_000  # the usual number for FID (Liu et al. 2024, Section 5.1)
_DEFAULT_TOP = 5
_DEFAULT_EMA = "default EMA"
_LEAST_TREND = 10  # trials
_TREND_LEVEL = 0.05

Evaluate = Callable[[Candidate], Outcome]


@dataclasses.dataclass(frozen=True)
class HeldOutPlan:
    """How a study's answer is measured.

    Attributes:
        images: how many, for each trial and each group of noise; 0 if the objective samples none.
        top: the answer is chosen among this many of the best trials.
        groups: how many groups of held-out noise.
        first_group: the seed of the first of them; the others follow.
        baselines: whether EMA* is measured on the same noise, too, where no metric is compared with it. The last
            checkpoint always is.
        keep: whether the report becomes the study's result. Otherwise it is a preview: its measurements are stored,
            and nothing else changes.
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
        """The plan of ``lcsc evaluate``. Values that are ``None`` come from the study file, else from the defaults.

        The report is kept if ``keep`` is true, or if it is the study's first one with at least the planned images.

        Raises:
            StudySpecError: ``keep`` with fewer images than the study file asks for.
        """
        attributes = study.attributes
        stored_plan = (attributes.get("specification") or {}).get("held_out")
        objective_images = attributes.get("report_images")
        planned = HeldOutSpec(images=objective_images or DEFAULT_IMAGES, top=_DEFAULT_TOP)
        if stored_plan is not None:
            planned = HeldOutSpec(**stored_plan)
        planned_images = planned.images_with(objective_images)
        images = images or planned_images
        if keep and stored_plan is not None and images < planned_images:
            fewer = f"{images:,} images are fewer than the {planned_images:,} that the study file asks for"
            raise StudySpecError(f"--keep: {fewer}; increase --images, or leave out --keep for a preview")
        is_first = attributes.get(HELD_OUT_REPORT) is None and images >= planned_images
        return cls(
            images=images,
            top=top or planned.top,
            groups=groups,
            first_group=first_group,
            baselines=True,
            keep=keep or is_first,
        )


def score_trained_models(
    study: StoredStudy, objective: Objective, plan: HeldOutPlan | None, evaluate: Evaluate | None = None
) -> None:
    """Score the last checkpoint as the report will, and print it: its number is also in the trainer's log.

    So is the trainer's own EMA, if there is one. An experiment evaluates each once. If one cannot be evaluated, that is
    said, and the search may begin.

    Args:
        study: what is going to be searched.
        objective: the study's objective.
        plan: of the report; ``None`` if there will be none, and the last checkpoint is scored as the search's
            candidates are.
        evaluate: evaluates one candidate; ``None`` does it in this process.
    """
    noise = HELD_OUT
    size = ""
    if plan is not None and plan.images:
        size = f" on {plan.images:,} {'items' if objective.sampler is None else 'images'}"
    if plan is None:
        noise = SEARCH
        plan = HeldOutPlan(images=0)
    evaluate = evaluate or functools.partial(evaluate_safely, objective)
    models = _trained_models(study, objective)
    lines = []
    with progress(f"{study.name} as trained", len(models)) as advance:
        measurements = _Measurements(study, objective, plan, evaluate, advance)
        for model in models:
            try:
                measurement = measurements.on(noise, model, shared=True)
            except SearchFailedError as error:
                lines.append(str(error))
                continue
            values = _described(measurement, sign_of(study.attributes))
            lines.append(
                f"{split_name(study.name)[0]}: {model.name}{_kind(model, objective)}, step {objective.steps[-1]}, "
                f"{noise.group} noise{size}: {values}; compare this with your trainer's log: "
                "if they differ, this score measures something else"
            )
    for line in lines:
        notice(line)


def _described(measurement: Measurement, sign: int) -> str:
    """``fid 12.3, precision 0.6``: the metrics, and first the loss unless it is one of them."""
    metrics = {name: value for name, value in measurement.metrics.items() if not name.endswith(STANDARD_ERROR)}
    score = sign * measurement.loss
    if score not in metrics.values():
        metrics = {"loss" if sign > 0 else "score": score, **metrics}
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def score_held_out(
    study: StoredStudy, objective: Objective, plan: HeldOutPlan, evaluate: Evaluate | None = None
) -> HeldOutReport:
    """Choose among the best trials and report the chosen one; write both into the database.

    Each measurement is stored with the study as soon as it is known and never repeated, also after an interruption.

    Args:
        study: the study; with ``plan.keep`` its ``held_out`` attribute becomes the report.
        objective: the study's objective.
        plan: how many images, and which noise.
        evaluate: evaluates one candidate; ``None`` does it in this process.

    Raises:
        StudyStoreError: no trial is complete, or none of them on the search's noise.
        SearchFailedError: one of them cannot be evaluated.
    """
    trials = study.trials()
    best_trials = _best_trials(trials, plan.top)
    if not best_trials:
        raise StudyStoreError(f"{study.name}: no complete trial on the search's noise to evaluate; let it continue")
    samplers = objective.samples.samplers
    reported = objective.reported_metrics()
    models = _baseline_models(study, objective, plan, has_metrics=bool(reported.signs))
    groups = plan.groups + len(samplers[1:])
    choices = len(best_trials) + len(models) + len(WAY)
    steps = choices + groups * (1 + len(models))
    with progress(f"{study.name} held out", steps) as advance:
        evaluate = evaluate or functools.partial(evaluate_safely, objective)
        measurements = _Measurements(study, objective, plan, evaluate, advance)
        selected: dict[_Model, Measurement] = {}
        for trial in best_trials:
            model = _model_of(trial)
            selected[model] = measurements.on(SELECTION, model)
        answer = min(selected, key=lambda model: (selected[model].loss, model.trial))
        found = _Compared.of(answer, models, measurements, reported)
        choice = _Choice(study, measurements, reported.cross_check).of(answer, models, selected, found)
        elsewhere = None
        if len(samplers) > 1:
            images = min(plan.images, objective.samples.per_evaluation)
            second = dataclasses.replace(plan, images=images, groups=1)
            sampler = (1, samplers[1])
            measurements = _Measurements(study, objective, second, evaluate, advance, sampler=sampler)
            try:
                elsewhere = _Compared.of(answer, models, measurements, reported)
            except SearchFailedError as error:
                notice(f"{samplers[1].text}: {error}; it is left out")
        advance(0, note=f"{sign_of(study.attributes) * found.answer.loss:.4g}")  # the bar ends on the answer's number
    warnings = _warnings(study, trials, samplers, found, elsewhere)
    also = None
    if elsewhere is not None:
        also = elsewhere.report(answer.trial, samplers[1].text)
    report = dataclasses.replace(
        found.report(answer.trial, samplers[0].text if samplers else None),
        selection={model.trial: measured.loss for model, measured in selected.items() if model.trial is not None},
        choice=choice,
        warning="; ".join(warnings) or None,
        also=also,
    )
    if report.warning is not None:
        notice(f"{study.name}: {report.warning}")
    if plan.keep:
        study.set_attribute(HELD_OUT_REPORT, report.to_json())
    return report


def _warnings(
    study: StoredStudy,
    trials: Sequence[FrozenTrial],
    samplers: Sequence[SamplerTitle],
    found: _Compared,
    elsewhere: _Compared | None,
) -> list[str]:
    """What does not hold: in other metrics, against the trainer's models, in the second sampler, on unseen images."""
    possible: list[str | None] = []
    if not _is_grid(study):  # what a grid finds is a baseline itself
        below_ema = _searched_below_ema(study, trials)
        possible.append(
            warning_of(found.rows, found.against_trained, yardstick=found.yardstick, searched_below_ema=below_ema)
        )
    if elsewhere is not None:
        rows_elsewhere = {rows[0].against: rows for rows in (elsewhere.rows, *elsewhere.against_trained)}
        turning = (
            turned(rows, rows_elsewhere.get(rows[0].against, ()), samplers)
            for rows in (found.rows, *found.against_trained)
        )
        possible.append(next((warning for warning in turning if warning is not None), None))
    possible.append(_overfitting(trials))
    return [warning for warning in possible if warning is not None]


@dataclasses.dataclass(frozen=True)
class _Compared:
    """The answer and its baselines, on the same noise and from the same sampler.

    Attributes:
        answer: what was measured of it.
        baselines: those that could be evaluated.
        rows: each metric, against EMA* or the default EMA.
        against_trained: the same against each model of the trainer's: the last checkpoint, and its EMA.
        yardstick: what their losses are relative to, on the first group of noise.
    """

    answer: MeasuredModel
    baselines: tuple[Baseline, ...]
    rows: tuple[MetricRow, ...]
    against_trained: tuple[tuple[MetricRow, ...], ...]
    yardstick: Yardstick | None

    @classmethod
    def of(
        cls,
        answer: _Model,
        models: Sequence[_Model],
        measurements: _Measurements,
        reported: ReportedMetrics,
    ) -> _Compared:
        """Measure all of them.

        Raises:
            SearchFailedError: the answer cannot be evaluated.
        """
        measured = measurements.held_out(answer)
        baselines = _measure_baselines(models, measurements)
        rows_against = functools.partial(metric_rows, measured, reported=reported)
        ema = next((baseline for baseline in baselines if baseline.name in (EMA, _DEFAULT_EMA)), None)
        trained = [baseline for baseline in baselines if baseline.name in TRAINED]
        return cls(
            answer=measured,
            baselines=baselines,
            rows=rows_against(ema),
            against_trained=tuple(rows_against(baseline) for baseline in trained),
            yardstick=measurements.yardstick(Noise(HELD_OUT.group, measured.seeds[0])),
        )

    def report(self, trial: int | None, sampler: str | None) -> HeldOutReport:
        """As a report of the trial's model, still without what it was chosen from."""
        return HeldOutReport(
            trial=trial,
            answer=self.answer,
            baselines=self.baselines,
            rows=self.rows,
            sampler=sampler,
        )


def _model_of(trial: FrozenTrial) -> _Model:
    return _Model(f"trial {trial.number}", coefficients_of(trial), trial=trial.number)


def _best_trials(trials: Sequence[FrozenTrial], top: int) -> list[FrozenTrial]:
    """The ``top`` best trials, the best first; only comparable ones, and the same model once.

    What a search stops by, it chooses by: the loss to real images that it does not see, where it has measured one.
    """
    distinct: dict[bytes, FrozenTrial] = {}
    best_first = sorted(
        compared_trials(trials), key=lambda trial: (trial.user_attrs.get("unseen", trial.value), trial.number)
    )
    for trial in best_first:
        if len(distinct) == top:
            break
        distinct.setdefault(coefficients_of(trial).tobytes(), trial)
    return list(distinct.values())


def _searched_below_ema(study: StoredStudy, trials: Sequence[FrozenTrial]) -> bool | None:
    """Whether the search's lowest loss is below that of the EMA grid; ``None`` if there is no finished one."""
    known_best = known_ema(study)
    if known_best is None:
        return None
    ema, _ = known_best
    assert ema.searched is not None  # it has an answer
    losses = [trial.value for trial in compared_trials(trials) if trial.value is not None]
    return min(losses) < ema.searched


def _overfitting(trials: Sequence[FrozenTrial]) -> str | None:
    """A warning if, in the later half of the search, the loss fell and that to held-out real images rose.

    Both are trends of Kendall's rank correlation with time (Mann 1945) at a level of 5 %.
    """
    from scipy.stats import kendalltau  # takes a second

    pairs = [(trial.value, trial.user_attrs.get("unseen")) for trial in compared_trials(trials)]
    complete_pairs = [pair for pair in pairs if pair[1] is not None]
    recent = np.array(complete_pairs[len(complete_pairs) // 2 :])
    if len(recent) < _LEAST_TREND:
        return None
    loss_trend, unseen_trend = (kendalltau(np.arange(len(recent)), column) for column in recent.T)
    is_certain = max(loss_trend.pvalue, unseen_trend.pvalue) < _TREND_LEVEL
    if not is_certain or not loss_trend.statistic < 0 < unseen_trend.statistic:
        return None
    rise = f"{recent[:, 1].min():.4g} → {recent[-1, 1]:.4g}"
    return (
        "the loss fell, but the distance to held-out real images rose in the later half of the search "
        f"({rise}): the search is overfitting the reference images. Use more of them, one row of coefficients, or "
        "a smaller budget"
    )


class _Choice:
    """Chooses the best model that is known, on the noise of the choice."""

    def __init__(
        self,
        study: StoredStudy,
        measurements: _Measurements,
        judge: str | None,
    ) -> None:
        self._study = study
        self._measurements = measurements
        self._judge = judge

    def of(
        self,
        searched: _Model,
        models: Sequence[_Model],
        trials: Mapping[_Model, Measurement],
        compared: _Compared,
    ) -> Choice:
        """The answer.

        Args:
            searched: the best trial.
            models: what the user had.
            trials: the best trials, on the noise of the choice.
            compared: the best trial and the models, on held-out noise.
        """
        baselines = {baseline.name: baseline for baseline in compared.baselines}
        had = self._measured([model for model in models if model.name in baselines])
        if _is_grid(self._study):  # its trials are averages that need no search
            baselines[EMA] = Baseline(EMA, compared.answer)
            best_average = dataclasses.replace(searched, name=EMA)
            had[best_average] = trials[searched]
            found = {}
        else:
            found = {**trials, **self._measured(_on_the_way(models, searched))}
        answer, best_had = choose(had, found, judge=self._judge)
        if answer.name in baselines:
            measured = baselines[answer.name].measured
        elif answer is searched:
            measured = compared.answer
        else:
            measured = self._measurements.held_out(answer)
        return Choice(
            name=answer.name,
            coefficients=answer.coefficients,
            selection=(had | found)[answer].loss,
            measured=measured,
            trial=answer.trial if answer.study is None else None,
            had=None if best_had is None else baselines[best_had.name],
        )

    def _measured(self, models: Iterable[_Model]) -> dict[_Model, Measurement]:
        """Those that can be evaluated, on the noise of the choice."""
        measured = {}
        for model in models:
            with contextlib.suppress(SearchFailedError):  # a point on the way may be no model; the others were told of
                measured[model] = self._measurements.on(SELECTION, model, shared=True)
        return measured


def _on_the_way(models: Sequence[_Model], searched: _Model) -> Iterator[_Model]:
    """Points between EMA* and the best trial."""
    for ema in models:
        if ema.name in (EMA, _DEFAULT_EMA):
            for part, coefficients in on_the_way(ema.coefficients, searched.coefficients).items():
                yield _Model(f"{part} of the way from {ema.label or ema.name} to {searched.name}", coefficients)


class _Measurements:
    """Losses and metrics of models on noise, stored by coefficients, number of images, noise and sampler.

    Held-out measurements that lack one of the objective's metrics are repeated. ``sampler`` is the index of another
    sampler than the search's, and what it is called.
    """

    def __init__(
        self,
        study: StoredStudy,
        objective: Objective,
        plan: HeldOutPlan,
        evaluate: Evaluate,
        advance: Callable[..., None],
        *,
        sampler: tuple[int, SamplerTitle] | None = None,
    ) -> None:
        self._study = study
        self._objective = objective
        self._images = plan.images
        self._evaluate = evaluate
        self._metrics = set(objective.reported_metrics().signs)
        self._advance = advance
        self._sampler = sampler
        self._seeds = range(plan.first_group, plan.first_group + plan.groups)
        self._yardsticks: dict[Noise, Yardstick | None] = {}

    def on(
        self,
        noise: Noise,
        model: _Model,
        *,
        shared: bool = False,
    ) -> Measurement:
        """One model on one group of noise.

        Args:
            noise: the group.
            model: the model.
            shared: whether a measurement by another study of the experiment will do.

        Raises:
            SearchFailedError: it cannot be evaluated.
        """
        index, title = self._sampler or (0, None)
        key = MeasurementKey.of(model.coefficients, self._images, noise, title, weights_sha256=model.weights_sha256)
        measurement = self._stored(key, noise, shared=shared)
        if measurement is None:
            candidate = Candidate(
                model.coefficients,
                images=self._images or None,
                noise=noise,
                yardstick=self.yardstick(noise),
                sampler=index,
            )
            outcome = self._evaluate(candidate)
            if isinstance(outcome, Failure):
                raise SearchFailedError(f"{self._study.name}: {model.name} on {noise.group} noise: {outcome.reason}")
            measurement = Measurement(noise.seed, outcome.loss, dict(outcome.metrics), outcome.without_groups)
            measured = self._study.attributes.get(MEASURED)
            self._study.set_attribute(MEASURED, key.added(measured, measurement))
        self._advance(note=f"{sign_of(self._study.attributes) * measurement.loss:.4g}")
        return measurement

    def yardstick(self, noise: Noise) -> Yardstick | None:
        """What losses on this noise are relative to.

        Raises:
            ObjectiveError: it cannot be measured.
        """
        if noise not in self._yardsticks:
            self._yardsticks[noise] = yardstick_on(
                noise, self._study, self._objective, self._evaluate, images=self._images, sampler=self._sampler
            )
        return self._yardsticks[noise]

    def held_out(self, model: _Model, *, shared: bool = False) -> MeasuredModel:
        """One model on each group of held-out noise, as :meth:`on`."""
        groups = []
        for seed in self._seeds:
            noise = Noise(HELD_OUT.group, seed)
            groups.append(self.on(noise, model, shared=shared))
        return MeasuredModel.mean_of(groups, images=self._images)

    def _stored(self, key: MeasurementKey, noise: Noise, *, shared: bool) -> Measurement | None:
        """What was measured earlier, in this study or in its siblings, if it has all metrics that are needed."""
        needed = self._metrics if noise.group == HELD_OUT.group else set()
        studies = [self._study.attributes]
        if shared:
            studies += siblings(self._study).values()
        for attributes in studies:
            measurement = key.find(attributes.get(MEASURED), seed=noise.seed)
            if measurement is not None and needed <= set(measurement.metrics):
                return measurement
        return None


@dataclasses.dataclass(frozen=True, eq=False)
class _Model:
    """The answer, or a model that it is compared with, before it is measured; :class:`Baseline` is a measured one.

    Attributes:
        name: for messages and tables.
        coefficients: ``[K]`` or ``[S, K]``; of the trainer's own EMA ``[K + 1]``.
        weights_sha256: of the trainer's own EMA.
        study: the study that it was found in, ``trial`` its trial, and ``label`` its name in tables.
    """

    name: str
    coefficients: Coefficients
    weights_sha256: str | None = None
    study: str | None = None
    trial: int | None = None
    label: str | None = None


def _baseline_models(study: StoredStudy, objective: Objective, plan: HeldOutPlan, *, has_metrics: bool) -> list[_Model]:
    """The models that the answer is compared with: the trainer's, and an EMA of the checkpoints if one is wanted.

    None is wanted for an EMA grid itself. EMA* is, where it is known; a default EMA in its place only where
    ``plan.baselines`` asks for one or evaluation metrics are compared.
    """
    trained = _trained_models(study, objective)
    if _is_grid(study):
        return trained
    is_asked_for = plan.baselines or has_metrics
    ema = _ema_model(study, objective, notices=plan.baselines)
    return [*trained, ema] if is_asked_for or ema.name == EMA else trained


def _trained_models(study: StoredStudy, objective: Objective) -> list[_Model]:
    """The models that the trainer has made itself: the last checkpoint, and its own EMA where it kept one.

    An EMA that is gone is still one of them if the study has known it: its measurements are stored.

    Raises:
        TrajectoryError: the EMA that the user named is not there, or of another model.
    """
    count = len(objective.steps)
    models = [_Model(LAST_CHECKPOINT, last_alone(count))]
    sha256 = known_sha256 = study.attributes.get(TRAINER_EMA_SHA256)
    try:
        if objective.trajectory is not None:
            sha256 = objective.trajectory.trainer_ema_sha256 or known_sha256
    except TrajectoryError:
        if known_sha256 is None:
            raise
    if sha256 != known_sha256:
        study.set_attribute(TRAINER_EMA_SHA256, sha256)
    if sha256 is not None:
        models.append(_Model(TRAINER_EMA, last_alone(count + 1), weights_sha256=sha256))
    return models


def _kind(model: _Model, objective: Objective) -> str:
    """`` (the trainer's EMA)`` behind the last checkpoint if all checkpoints are running averages."""
    is_average = objective.trajectory is not None and objective.trajectory.merges_averages
    return f" ({TRAINER_EMA})" if is_average and model.name == LAST_CHECKPOINT else ""


def _is_grid(study: StoredStudy) -> bool:
    return split_name(study.name)[1] == EMA_GRID


def _ema_model(study: StoredStudy, objective: Objective, *, notices: bool) -> _Model:
    """EMA* of the experiment, the answer of its EMA grids, if it is known; else a default EMA."""
    known_best = known_ema(study)
    if known_best is not None:
        ema, coefficients = known_best
        return _Model(EMA, coefficients, study=ema.study, trial=ema.chosen, label=ema.label)
    if notices:
        notice(
            f"{split_name(study.name)[0]} has no finished EMAGrid study of the same objective, so EMA* is not known: "
            "one EMA is measured instead; for EMA* run the study file with --optimizer EMAGrid"
        )
    return _Model(_DEFAULT_EMA, default_origin(objective.steps))


def _measure_baselines(models: Sequence[_Model], measurements: _Measurements) -> tuple[Baseline, ...]:
    """The baselines on held-out noise, without those that cannot be evaluated."""
    baselines = []
    for model in models:
        try:
            measured = measurements.held_out(model, shared=True)
        except SearchFailedError as error:
            notice(f"{error}; it is left out")
        else:
            baselines.append(Baseline(model.name, measured, study=model.study, trial=model.trial, label=model.label))
    return tuple(baselines)
