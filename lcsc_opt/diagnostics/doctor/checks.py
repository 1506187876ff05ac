"""The checks of one study: functions of its rows and of the plan that they were made from."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard

from lcsc_opt.base.errors import CoefficientsError
from lcsc_opt.coefficients.profiles import SUM_TOLERANCE, check_steps
from lcsc_opt.diagnostics.doctor.findings import HELD_OUT, NO_REPAIR, NOTHING, SEARCH_ENDED, TELL_INDEX, Finding, shown
from lcsc_opt.diagnostics.doctor.rows import StudyRows, TrialRows
from lcsc_opt.search.plan import StudyPlan

REQUIRED = ("specification", "fingerprint", "budget", "steps", "failures", "optimizer_budget")
STATES = ("RUNNING", "COMPLETE", "PRUNED", "FAIL")  # that lcsc_opt writes
TELL_ORDER = "tell order"  # what TELL_INDEX is where it cannot be repaired


def check_study(study: StudyRows, plan: StudyPlan | str, *, live: bool) -> list[Finding]:
    """Every check of one study that needs nothing but its rows.

    Args:
        study: its rows.
        plan: what it was made from, or why that cannot be read.
        live: whether somebody is running it; what a search leaves open for a while is then no finding.
    """
    steps = _steps(study)
    found = [*_check_attributes(study, plan, steps), *_check_numbers(study)]
    for trial in study.trials:
        found += _check_trial(study, trial, None if steps is None else len(steps))
    if isinstance(plan, StudyPlan):
        found += [*_check_tells(study, plan), *_check_running(study, plan, live=live)]
        if not live:
            found += _check_search_ended(study, plan)
    return [*found, *_check_held_out(study)]


def _check_attributes(study: StudyRows, plan: StudyPlan | str, steps: Sequence[int] | None) -> Iterator[Finding]:
    for name in study.unreadable:
        if name not in (SEARCH_ENDED, HELD_OUT):  # which have checks of their own
            yield _problem(study, "attribute", f"the attribute {name} is no JSON")
    missing = [name for name in REQUIRED if name not in study.attributes and name not in study.unreadable]
    if missing:
        yield _problem(study, "attribute", f"lacks what every study of lcsc_opt has: {', '.join(missing)}")
    if isinstance(plan, str):
        if not missing and not study.unreadable:
            yield _problem(study, "plan", plan)
    elif plan.name != study.name:
        yield _problem(study, "plan", f"is called {study.name}, but its specification is that of {plan.name}")
    fingerprint = study.attributes.get("fingerprint", {"objective": None, "environment": {}})
    if not isinstance(fingerprint, Mapping) or not {"objective", "environment"} <= set(fingerprint):
        yield _problem(study, "fingerprint", "its fingerprint does not name the objective and the environment")
    if steps is None and "steps" in study.attributes:
        yield _problem(study, "steps", "its steps are not whole numbers that increase")


def _steps(study: StudyRows) -> tuple[int, ...] | None:
    try:
        return check_steps(study.attributes["steps"])
    except (CoefficientsError, KeyError, TypeError, ValueError, OverflowError):
        return None


def _check_numbers(study: StudyRows) -> Iterator[Finding]:
    counted = collections.Counter(trial.number for trial in study.trials if _is_count(trial.number))
    strange = len(study.trials) - counted.total()
    doubled = [number for number, times in counted.items() if times > 1]
    gaps = set(range(len(study.trials))) - set(counted)
    if strange:
        yield _problem(study, "numbers", f"{strange} trials have no number")
    if doubled:
        yield _problem(study, "numbers", f"several trials have the same number: {shown(doubled)}")
    if gaps:
        yield _problem(study, "numbers", f"trials are missing: {shown(gaps)}")


def _check_trial(study: StudyRows, trial: TrialRows, checkpoints: int | None) -> Iterator[Finding]:
    for text in _trial_faults(trial, checkpoints):
        yield _problem(study, "trial", text, trial=trial)


def _trial_faults(trial: TrialRows, checkpoints: int | None) -> Iterator[str]:
    yield from (f"its attribute {name} is no JSON" for name in trial.unreadable)
    if trial.state not in STATES:
        yield f"its state is {trial.state}, which lcsc_opt never writes"
    if trial.lacks("coefficients"):
        yield "has no coefficients"
    elif "coefficients" in trial.attributes:
        yield from _coefficient_faults(trial.attributes["coefficients"], checkpoints)
    if trial.state == "COMPLETE":
        yield from _complete_faults(trial)
    if trial.state == "FAIL" and "reason" not in trial.unreadable and not trial.attributes.get("reason"):
        yield "failed without a reason"


def _coefficient_faults(coefficients: Any, checkpoints: int | None) -> Iterator[str]:
    if not isinstance(coefficients, list) or not all(_is_finite(value) for value in coefficients):
        yield "its coefficients are not a list of finite numbers"
        return
    if checkpoints is not None and len(coefficients) != checkpoints:
        yield f"has {len(coefficients)} coefficients for {checkpoints} checkpoints"
    total = math.fsum(coefficients)
    if abs(total - 1) > SUM_TOLERANCE:
        yield f"its coefficients sum to {total:.12g}, not to one"


def _complete_faults(trial: TrialRows) -> Iterator[str]:
    finite = [value for value, kind in trial.values if kind == "FINITE" and _is_finite(value)]
    if len(finite) != 1 or len(trial.values) != 1:
        yield "is complete without one finite value"
    for name in ("metrics", "cost"):
        if name not in trial.unreadable and not isinstance(trial.attributes.get(name), Mapping):
            yield f"is complete without {name}"


def _check_tells(study: StudyRows, plan: StudyPlan) -> Iterator[Finding]:
    """Ordered, results are told in the order of their numbers; else the order of commits is the only record of it."""
    told = [trial for trial in study.trials if trial.own and trial.state in ("COMPLETE", "FAIL")]
    if plan.spec.tells == "ordered":
        sound = not list(_check_numbers(study))  # else a tell_index may be all that says which number a trial had
        for trial in told:
            stored = trial.attributes.get("tell_index")
            if not _is_count(stored) or stored != trial.number:
                text = f"its tell_index is {_short(stored)}, but results are told in the order of their numbers"
                kind, advice = (TELL_INDEX, "write its number") if sound else (TELL_ORDER, NO_REPAIR)
                yield _problem(study, kind, text, advice=advice, trial=trial)
        return
    places = [trial.attributes.get("tell_index") for trial in told]
    known = {place for place in places if _is_count(place)}
    if known != set(range(len(told))):
        lost = set(range(len(told))) - known
        yield _problem(study, TELL_ORDER, f"nothing was told in place {shown(lost)} of {len(told)}")


def _check_running(study: StudyRows, plan: StudyPlan, *, live: bool) -> Iterator[Finding]:
    running = [trial for trial in study.trials if trial.state == "RUNNING"]
    parallelism = study.attributes.get("parallelism")
    allowed = parallelism.get("in_flight") if isinstance(parallelism, Mapping) else None
    if _is_count(allowed) and len(running) > allowed:
        text = f"{len(running)} trials are running, and its {plan.workers} workers have at most {allowed} at once"
        yield _problem(study, "running", text)
    elif running and not live:
        numbers = shown(trial.number for trial in running if _is_count(trial.number))
        text = f"nobody runs it, and trials are unfinished: {numbers}"
        advice = f"{NOTHING}: `lcsc resume {study.name}` evaluates them again under the same numbers"
        yield Finding("running", "note", text, advice, study.name)


def _check_search_ended(study: StudyRows, plan: StudyPlan) -> Iterator[Finding]:
    """A search that has ended told all its trials; with a higher budget it may have begun to go on."""
    ended = study.attributes.get(SEARCH_ENDED)
    if ended is None and SEARCH_ENDED not in study.unreadable:
        return
    advice = f"forget that it ended, so that `lcsc resume {study.name}` goes on"
    told, exhausted = (ended.get("evaluations"), ended.get("exhausted")) if isinstance(ended, dict) else (None, None)
    if not _is_count(told) or not isinstance(exhausted, bool):
        yield _problem(study, SEARCH_ENDED, "how its search ended cannot be read", advice=advice)
        return
    own = [trial for trial in study.trials if trial.own]
    finished = sum(trial.finished for trial in own)
    budget = plan.spec.budget.evaluations
    if told <= finished and budget is not None and told < budget and not exhausted:
        text = f"its search ended after {told} evaluations, and its budget is now {budget}"
        yield Finding("unfinished", "note", text, f"run `lcsc resume {study.name}`", study.name)
    elif not told == finished == len(own):
        text = f"its search ended after {told} evaluations, but {finished} of its {len(own)} trials are finished"
        yield _problem(study, SEARCH_ENDED, text, advice=advice)


def _check_held_out(study: StudyRows) -> Iterator[Finding]:
    held_out = study.attributes.get(HELD_OUT)
    if held_out is None and HELD_OUT not in study.unreadable:
        return
    number = held_out.get("trial") if isinstance(held_out, dict) else None
    complete = [trial.number for trial in study.trials if trial.state == "COMPLETE"]
    if not _is_count(number) or number not in complete:
        text = f"its held-out report is on trial {_short(number)}, which is not complete"
        advice = f"forget the report; `lcsc evaluate {study.name}` makes another"
        yield _problem(study, HELD_OUT, text, advice=advice)


def _problem(study: StudyRows, kind: str, text: str, *, trial: TrialRows | None = None, **more: Any) -> Finding:
    number = trial.number if trial is not None and _is_count(trial.number) else None
    return Finding(kind, "problem", text, study=study.name, trial=number, **more)


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _short(value: Any) -> str:
    return "missing" if value is None else repr(value)[:40]
