"""EMA* and the bound of the kept metric, measured once a study, before its search asks anything.

EMA* is that of the report: the answer of the experiment's finished EMA grid with the same objective. Without one, the
averages of that grid are evaluated on the search's noise, and the best is EMA*. Then EMA* is evaluated on as many
images as its bound needs.

Each of these evaluations is a baseline: a trial that no optimizer proposed, and whose result none receives. It is
written before it is evaluated, is not evaluated again after an interruption, and counts in the budget.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from lcsc_opt.base.errors import ObjectiveError, SearchFailedError, StudySpecError
from lcsc_opt.base.progress import progress
from lcsc_opt.base.records import Candidate, Coefficients, Constraint, Evaluation
from lcsc_opt.base.study_file import BudgetSpec
from lcsc_opt.coefficients.profiles import average_name, plain_average_count, plain_averages
from lcsc_opt.database.arrays import coefficients_of
from lcsc_opt.database.history import StudyHistory, best_ema
from lcsc_opt.database.kept_bound import KEPT_BOUND, KeptBound, is_baseline
from lcsc_opt.database.names import EMA, EMA_GRID, is_search, split_name
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy, our_studies
from lcsc_opt.evaluation.base import Evaluator, Failure, Outcome, evaluate_safely
from lcsc_opt.objective.contract import Objective
from lcsc_opt.search.resolving import Resolved
from lcsc_opt.search.runner import stored_outcome

_Evaluate = Callable[[Sequence[Candidate]], list[Evaluation]]


@dataclasses.dataclass(frozen=True, eq=False)
class _Ema:
    """EMA*, before its bound is measured.

    Attributes:
        coefficients: ``[K]``, or ``[S, K]`` with equal rows.
        loss: on the search's noise, with as many images as a candidate of the search.
        label: as of :class:`KeptBound`.
        study: the EMA grid whose answer it is.
        trial: the number of the answer.
    """

    coefficients: Coefficients
    loss: float
    label: str
    study: str | None = None
    trial: int | None = None


def measure_bound(
    study: StoredStudy,
    objective: Objective,
    evaluator: Evaluator,
    *,
    budget: BudgetSpec,
    retries: int,
    in_flight: int,
) -> KeptBound:
    """Measure the bound, or what is missing of it, and store it with the study.

    Args:
        study: whose lock is held.
        objective: one that keeps a metric.
        evaluator: where candidates are evaluated.
        budget: of the study.
        retries: how often a candidate is tried again.
        in_flight: how many may be evaluated at the same time.

    Raises:
        StudySpecError: the budget would leave nothing to the search.
        SearchFailedError: a baseline failed.
        ObjectiveError: the objective gives no bound.
    """
    baselines = _Baselines(study, evaluator, steps=objective.steps, retries=retries, in_flight=in_flight)
    ema = None
    # What an earlier run began is finished, even if there is a grid now, unless an average failed.
    if not baselines.can_finish_averages:
        ema = _ema_of_grid(study)
    check_budget(study.name, objective, budget, must_find_ema=ema is None)
    count = _baseline_count(objective, must_find_ema=ema is None)
    with progress(f"{study.name} {EMA}", count) as advance:
        baselines.on_end = advance
        if ema is None:
            ema = _best_average(objective, baselines.evaluate)
        constraint = _constraint_at(ema, objective, baselines.evaluate)
    bound = KeptBound(constraint, ema.coefficients, ema.label, ema.study, ema.trial)
    study.set_attribute(KEPT_BOUND, bound.to_json())
    return bound


def constraint_outside_studies(objective: Objective) -> Constraint | None:
    """The bound for a run that is no study, evaluated in this process; ``None`` if no metric is kept.

    Raises:
        ObjectiveError: an average cannot be evaluated.
    """
    if not objective.images_for_bound:
        return None

    with progress(EMA, _baseline_count(objective, must_find_ema=True)) as advance:

        def evaluate(candidates: Sequence[Candidate]) -> list[Evaluation]:
            evaluations = []
            for candidate in candidates:
                outcome = evaluate_safely(objective, candidate)
                if isinstance(outcome, Failure):
                    raise ObjectiveError(f"{EMA}, which bounds the kept metric, cannot be evaluated: {outcome.reason}")
                evaluations.append(outcome)
                advance(note=f"loss {outcome.loss:.4g}")
            return evaluations

        ema = _best_average(objective, evaluate)
        return _constraint_at(ema, objective, evaluate)


def known_ema(study: StoredStudy) -> tuple[StudyHistory, Coefficients] | None:
    """EMA*: the best of the experiment's finished EMA grids with this study's objective, and its answer."""
    experiment = split_name(study.name)[0]
    return ema_of_grids(study.storage, experiment, study.attributes["fingerprint"])


def ema_of_grids(
    storage: RDBStorage, experiment: str, fingerprint: Mapping[str, Any]
) -> tuple[StudyHistory, Coefficients] | None:
    """EMA*: the best of an experiment's finished EMA grids, and its answer; ``None`` without a grid.

    Args:
        storage: of the experiment's studies.
        experiment: their name.
        fingerprint: the objective and the code in it are those of the grid.
    """
    studies = our_studies(storage)
    grids = []
    for name, attributes in studies.items():
        if not is_search(name):
            continue
        study_experiment, optimizer, _ = split_name(name)
        if (study_experiment, optimizer) != (experiment, EMA_GRID):
            continue
        if _function_of(attributes["fingerprint"]) == _function_of(fingerprint):
            grids.append(name)
    if not grids:
        return None
    reader = HistoryReader(storage)
    ema = best_ema(reader.read_studies(grids))
    if ema is None:
        return None
    coefficients = reader.answer(ema)
    if coefficients is None:
        return None
    return ema, coefficients


def _function_of(fingerprint: Mapping[str, Any]) -> Any:
    """The objective and the code of a fingerprint, as they are stored: tuples are lists in the database."""
    return json.loads(json.dumps([fingerprint["objective"], fingerprint.get("code")]))


def check_new_budget(storage: RDBStorage, resolved: Resolved) -> None:
    """Refuse a new study that would spend its budget on its bound, before its search begins.

    Args:
        storage: where it will be stored.
        resolved: the study, with its objective.

    Raises:
        StudySpecError: the budget is too small.
    """
    if resolved.state != "new" or resolved.penalty.bound != "measured":
        return
    objective = resolved.objective
    assert objective is not None  # it is loaded by now
    spec = resolved.plan.spec
    must_find_ema = ema_of_grids(storage, spec.name, resolved.fingerprint) is None
    check_budget(resolved.plan.name, objective, spec.budget, must_find_ema=must_find_ema)


def check_budget(name: str, objective: Objective, budget: BudgetSpec, *, must_find_ema: bool) -> None:
    """Refuse a budget that the baselines would spend.

    Raises:
        StudySpecError: it would leave not one evaluation to the search.
    """
    images = objective.images_per_evaluation
    needed = _baseline_count(objective, must_find_ema=must_find_ema)
    least = needed + 1
    if budget.unit == "images":
        averages = plain_average_count(objective.steps) if must_find_ema else 0
        needed = averages * images
        if needed == 0 or objective.images_for_bound != images:
            needed += objective.images_for_bound
        least = needed + images
    if budget.total < least:
        advice = "increase the budget"
        if must_find_ema:
            advice += ", or run EMAGrid first, which then finds EMA* for all studies of the experiment"
        raise StudySpecError(
            f"{name}: budget: {needed:,} of {budget.total:,} {budget.unit} would measure EMA* and the bound of the "
            f"kept metric, which leaves nothing to the search; {advice}"
        )


def _baseline_count(objective: Objective, *, must_find_ema: bool) -> int:
    """How many baselines a study evaluates."""
    if not must_find_ema:
        return 1
    averages = plain_average_count(objective.steps)
    if objective.images_for_bound == objective.images_per_evaluation:
        return averages  # the evaluation of the best of them has the bound, too
    return averages + 1


def _ema_of_grid(study: StoredStudy) -> _Ema | None:
    """EMA* as the report has it: the answer of a finished EMA grid; ``None`` without one."""
    grid_and_answer = known_ema(study)
    if grid_and_answer is None:
        return None
    grid, coefficients = grid_and_answer
    loss = grid.trials["loss"][grid.trials["number"] == grid.chosen][0]
    return _Ema(coefficients, float(loss), grid.label, grid.study, grid.chosen)


def _best_average(objective: Objective, evaluate: _Evaluate) -> _Ema:
    """The average of lowest loss on the search's noise."""
    averages = plain_averages(objective.steps)
    evaluations = evaluate([Candidate(average) for average in averages])
    best = min(range(len(averages)), key=lambda index: evaluations[index].loss)
    label = f"{EMA} ({average_name(averages[best], objective.steps)})"
    return _Ema(averages[best], evaluations[best].loss, label)


def _constraint_at(ema: _Ema, objective: Objective, evaluate: _Evaluate) -> Constraint:
    """The bound, measured on as many images as it needs.

    The loss, which scales the penalty, is that on as many images as the search's: FID falls with their number.
    """
    images = None
    if objective.images_for_bound != objective.images_per_evaluation:
        images = objective.images_for_bound
    evaluation = evaluate([Candidate(ema.coefficients, images=images)])[0]
    if evaluation.constraint is None:
        raise ObjectiveError("images_for_bound: the objective keeps a metric, and its evaluations have no constraint")
    return dataclasses.replace(evaluation.constraint, loss=ema.loss)


@dataclasses.dataclass(eq=False)
class _Baseline:
    """A trial of a study that is evaluated, or was in an earlier run."""

    number: int
    candidate: Candidate
    attempts: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    future: concurrent.futures.Future[Outcome] | None = None
    outcome: Outcome | None = None


class _Baselines:
    """Evaluates baselines as trials of a study. Those that are stored are not evaluated again.

    Attributes:
        on_end: is called whenever one has ended.
    """

    def __init__(
        self,
        study: StoredStudy,
        evaluator: Evaluator,
        *,
        steps: Sequence[int],
        retries: int,
        in_flight: int,
    ) -> None:
        self.on_end: Callable[..., None] = lambda **_: None
        self._study = study
        self._evaluator = evaluator
        self._steps = steps
        self._retries = retries
        self._in_flight = in_flight
        self._stored: dict[tuple[bytes, int | None], FrozenTrial] = {}
        self._begun: dict[tuple[bytes, int | None], _Baseline] = {}
        trials = study.trials_without_arrays()
        baselines = [trial for trial in trials if is_baseline(trial) and "inherited" not in trial.user_attrs]
        for trial in study.with_arrays(baselines):
            self._stored[_key(coefficients_of(trial), trial.user_attrs.get("images"))] = trial

    @property
    def can_finish_averages(self) -> bool:
        """Whether an earlier run has begun to evaluate the averages of which EMA* is the best, and none has failed."""
        first_average = plain_averages(self._steps)[0]
        has_failures = any(trial.state == TrialState.FAIL for trial in self._stored.values())
        return _key(first_average, None) in self._stored and not has_failures

    def evaluate(self, candidates: Sequence[Candidate]) -> list[Evaluation]:
        """The evaluations of these candidates, several of which may run at the same time.

        Raises:
            SearchFailedError: one of them failed.
        """
        evaluations = []
        running: collections.deque[_Baseline] = collections.deque()
        for candidate in candidates:
            if len(running) == self._in_flight:
                evaluations.append(self._evaluation_of(running.popleft()))
            running.append(self._begin(candidate))
        while running:
            evaluations.append(self._evaluation_of(running.popleft()))
        return evaluations

    def _begin(self, candidate: Candidate) -> _Baseline:
        """Write a candidate and start its evaluation, unless that was done before."""
        key = _key(candidate.coefficients, candidate.images)
        if key in self._begun:
            return self._begun[key]
        stored = self._stored.get(key)
        if stored is None:
            name = average_name(candidate.coefficients, self._steps) or EMA
            baseline = _Baseline(self._study.add_candidate(candidate, baseline=name), candidate)
        else:
            attempts = [attempt for attempt in stored.user_attrs.get("attempts", ()) if not attempt.get("last")]
            baseline = _Baseline(stored.number, candidate, attempts)
            if stored.state.is_finished():
                baseline.outcome = stored_outcome(stored)
        self._begun[key] = baseline
        if baseline.outcome is None:
            baseline.future = self._evaluator.submit(candidate)
        return baseline

    def _evaluation_of(self, baseline: _Baseline) -> Evaluation:
        """Wait for a baseline, and write its result."""
        while baseline.outcome is None:
            assert baseline.future is not None
            self._write(baseline, baseline.future.result())
        if isinstance(baseline.outcome, Failure):
            raise SearchFailedError(
                f"{self._study.name}: trial {baseline.number}, an average that EMA* is chosen from, failed: "
                f"{baseline.outcome.reason.rstrip('.')}. Fix it, then run: lcsc resume {self._study.name} "
                "--retry-failed; or run EMAGrid, which goes on without averages that fail"
            )
        self.on_end(note=f"loss {baseline.outcome.loss:.4g}")
        return baseline.outcome

    def _write(self, baseline: _Baseline, outcome: Outcome) -> None:
        """Write a result; a failed attempt may be followed by another one."""
        number = baseline.number
        if isinstance(outcome, Evaluation):
            self._study.finish(number, outcome, compares=False)
            baseline.outcome = outcome
            return
        baseline.attempts.append(outcome.as_attempt())
        if outcome.retry and len(baseline.attempts) <= self._retries:
            self._study.note_attempts(number, baseline.attempts)
            baseline.future = self._evaluator.submit(baseline.candidate)
            return
        self._study.fail(number, baseline.attempts)
        baseline.outcome = outcome


def _key(coefficients: Coefficients, images: int | None) -> tuple[bytes, int | None]:
    """What two evaluations of one model on the search's noise have in common."""
    return coefficients.tobytes(), images
