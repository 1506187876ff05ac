"""What a study is and what running it will do, decided once from data that were read before. Nothing is read here.

``specification + stored studies + evidence of the code → Resolved``

There are two stages of knowledge. Before the objective is loaded, which may train a model, the evidence is the code and
the environment; that is enough for ``--dry-run``, and to refuse most of what is wrong before anything is loaded or
written. Once the objective is loaded, the evidence is its whole fingerprint, and it is also known what a new study
begins with. :mod:`lcsc_opt.search.sources` reads all that is needed, :mod:`lcsc_opt.search.execution` does the work.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from lcsc_opt.base.errors import LcscError, StudyStoreError
from lcsc_opt.coefficients.plane import LANDSCAPE
from lcsc_opt.database.names import is_search, split_name
from lcsc_opt.objective.contract import Objective
from lcsc_opt.search.compatibility import changes, differences, objective_changes, without_neutral
from lcsc_opt.search.plan import CHECKPOINTS, Plan
from lcsc_opt.trajectory import Trajectory

Attributes = Mapping[str, Any]
"""User attributes of a stored study."""

_ACCEPT = "if that cannot change a loss, continue with --accept-changes"


@dataclasses.dataclass(frozen=True)
class StoredTrials:
    """The trials of a stored study: how ``many``, and whether any of them ``succeeded``."""

    many: int
    succeeded: bool


@dataclasses.dataclass(frozen=True)
class StoredStudies:
    """What a database holds.

    Attributes:
        attributes: name → attributes of every study, in the order in which they were created.
        trials: name → trials, of those studies that are resolved.
    """

    attributes: Mapping[str, Attributes]
    trials: Mapping[str, StoredTrials]


@dataclasses.dataclass(frozen=True, eq=False)
class Evidence:
    """What is known of the code that would run.

    Attributes:
        fingerprint: ``environment``, and ``code`` as far as it is known. Once the objective is loaded also
            ``objective``, and the code is known completely.
        why_no_gradient: says why there is no gradient, or ``None``; called only for optimizers that need one.
        objective: the loaded objective; ``None`` before it is loaded.
        refusal: what is wrong with the objective's settings or code.
    """

    fingerprint: Mapping[str, Any]
    why_no_gradient: Callable[[], str | None] = lambda: None
    objective: Objective | None = None
    refusal: LcscError | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Resolved:
    """A study, and what running it will do.

    Attributes:
        plan: the specification; where a study file leaves the workers open, as the stored study has them.
        state: ``finished`` if neither the search nor the report has anything left to do.
        stored: the study's attributes in the database; ``None`` if it is new.
        beginning: attributes that a new study begins with and keeps; empty before the objective is loaded.
        following: attributes that are written into a new study, and into a stored one where they changed.
        notices: lines for people.
    """

    plan: Plan
    state: Literal["new", "unfinished", "finished"]
    stored: Attributes | None
    beginning: Attributes = dataclasses.field(default_factory=dict)
    following: Attributes = dataclasses.field(default_factory=dict)
    notices: tuple[str, ...] = ()

    @property
    def attributes(self) -> dict[str, Any]:
        """The study's attributes when it runs."""
        stored = self.beginning if self.stored is None else self.stored
        return {**stored, **self.following}


def resolve(plan: Plan, studies: StoredStudies, evidence: Evidence, *, accept_changes: bool = False) -> Resolved:
    """Decide whether a study is new, goes on or is finished, what changed, and what will be written.

    Args:
        plan: what was asked for.
        studies: what the database holds.
        evidence: what is known of the code; with the objective if it is loaded.
        accept_changes: allow other code and, for a stored study, other versions and settings; never other checkpoints.

    Raises:
        StudyStoreError: the stored study was made with something else, or the losses of a new one would not compare
            with those of the experiment's other studies.
        LcscError: the objective does not allow the plan, or is refused itself.
    """
    stored = studies.attributes.get(plan.name)
    plan = _continued(plan, stored)
    objective = evidence.objective
    finished = stored is not None and is_finished(plan, stored)
    if stored is not None and finished and objective is None:
        # Nobody has to load the objective of a finished study, whose code may even be gone.
        return Resolved(plan, "finished", stored, notices=_since_finished(plan, stored, evidence))
    if evidence.refusal is not None:
        raise evidence.refusal

    if objective is None:
        plan.check_gradient(evidence.why_no_gradient)
    else:
        plan.check(objective)
    following = plan.following()
    notices: list[str] = []
    if stored is not None:
        current = _completed(evidence, stored)
        accepted = accepted_changes(plan.name, stored, studies.trials[plan.name], current, accept=accept_changes)
        if accepted:
            following |= accepted
            notices.append(f"{plan.name}: continues with changes: {accepted['changes'][-1]['changed']}")
        state: Literal["unfinished", "finished"] = "finished" if finished else "unfinished"
        return Resolved(plan, state, stored, following=following, notices=tuple(notices))

    _check_siblings(plan, studies, evidence.fingerprint, accept=accept_changes)
    beginning: dict[str, Any] = {}
    if objective is not None:
        trajectory = objective.trajectory
        beginning = plan.beginning(objective)
        beginning["fingerprint"] = evidence.fingerprint
        beginning["checkpoints"] = None
        notices += plan.advice(objective)
        if isinstance(trajectory, Trajectory):
            beginning["checkpoints"] = trajectory.sha256
            notices += trajectory.identical()
    return Resolved(plan, "new", None, beginning, following, tuple(notices))


def is_searched(plan: Plan, stored: Attributes) -> bool:
    """Whether the search of a stored study has nothing left to do for this plan's budget."""
    ended = stored.get("search_ended")
    if ended is None:
        return False
    if ended["exhausted"]:
        return True
    budget = plan.spec.budget
    if budget.evaluations is not None:
        return bool(ended["evaluations"] >= budget.evaluations)
    stored_images = stored["budget"].get("images") or 0
    return bool(stored_images >= budget.total)


def is_finished(plan: Plan, stored: Attributes) -> bool:
    """Whether nothing is left to do, neither of the search nor of the held-out report."""
    must_report = plan.spec.held_out is not None and stored.get("holds_out") is not False
    if must_report and stored.get("held_out") is None:
        return False
    return is_searched(plan, stored)


def is_complete(plan: Plan, stored: Attributes) -> bool:
    """Whether nothing is left to do or to write: also the specification is as stored, with the checkpoints' place."""
    return is_finished(plan, stored) and stored["specification"] == plan.specification()


def _continued(plan: Plan, stored: Attributes | None) -> Plan:
    """The plan as a stored study continues it: if the study file leaves the workers open, it keeps their number.

    Raises:
        StudyStoreError: the study was made from another specification.
    """
    if stored is None:
        return plan
    before = stored.get("specification") or {}
    if plan.spec.workers == "auto" and before.get("workers"):
        plan = plan.changed(workers=before["workers"])
    now = plan.specification()
    settings = now["objective"]["settings"]
    if stored.get("checkpoints") and CHECKPOINTS in settings:
        # Files may move: whether checkpoints are the same is decided by their hash.
        settings[CHECKPOINTS] = before["objective"]["settings"].get(CHECKPOINTS)
    changed = "; ".join(differences(before, now, "specification"))
    if changed:
        raise StudyStoreError(f"{plan.name}: the stored study differs: {changed}. Give the new one another name")
    return plan


def _completed(evidence: Evidence, stored: Attributes) -> Mapping[str, Any]:
    """The current fingerprint. Before the objective is loaded, code that is not known yet counts as unchanged."""
    if evidence.objective is not None:
        return evidence.fingerprint
    stored_code = stored["fingerprint"]["code"]
    return {**evidence.fingerprint, "code": {**stored_code, **evidence.fingerprint["code"]}}


def _since_finished(plan: Plan, stored: Attributes, evidence: Evidence) -> tuple[str, ...]:
    """What to say of a finished study: if its code is another one now, its results are of the old code."""
    if evidence.refusal is not None:  # nobody takes the results for those of code that is gone
        return ()
    changed = changes(stored["fingerprint"], {"code": _completed(evidence, stored)["code"]})
    if not changed:
        return ()
    return (f"{plan.name}: finished before this changed: {changed}. lcsc run FILE name=... searches anew",)


def accepted_changes(
    name: str, stored: Attributes, trials: StoredTrials, current: Mapping[str, Any], *, accept: bool
) -> dict[str, Any]:
    """The attributes to write into a study that continues; empty if nothing changed.

    Args:
        name: of the study.
        stored: its attributes.
        trials: that it has.
        current: the fingerprint, or the part of it that is known.
        accept: allow changes. Before the first success they are always allowed, but never other checkpoints.

    Raises:
        StudyStoreError: something changed and is not accepted.
    """
    before = stored["fingerprint"]
    changed = changes(before, current)
    if not changed:
        return {}
    other_checkpoints = False
    if "objective" in current:
        stored_trajectory = before["objective"].get("trajectory")
        other_checkpoints = current["objective"].get("trajectory") != stored_trajectory
    if other_checkpoints or (trials.succeeded and not accept):
        advice = "other checkpoints are another study" if other_checkpoints else _ACCEPT
        raise StudyStoreError(
            f"{name}: changed since it began: {changed}. Put it back, or give the study another name; {advice}"
        )
    change = {"before_trial": trials.many, "changed": changed}
    return {"changes": [*stored.get("changes", []), change], "fingerprint": {**before, **current}}


def _check_siblings(plan: Plan, studies: StoredStudies, current: Mapping[str, Any], *, accept: bool) -> None:
    """Compare a new study with the experiment's other studies, before its losses stand next to theirs.

    It is compared with the first of them and the first with the same optimizer: the others were compared with these.

    Raises:
        StudyStoreError: the losses would not compare; the message says why.
    """
    if plan.optimizer.name == LANDSCAPE:
        return
    same_experiment = []
    same_optimizer = []
    for name in studies.attributes:
        if not is_search(name):
            continue
        experiment, optimizer, _ = split_name(name)
        if experiment == plan.spec.name:
            same_experiment.append(name)
            if optimizer == plan.optimizer.name:
                same_optimizer.append(name)

    specification = without_neutral(plan.specification())
    for name in dict.fromkeys([*same_experiment[:1], *same_optimizer[:1]]):
        sibling = studies.attributes[name]
        stored_specification = without_neutral(sibling["specification"])
        compared = ("objective", "optimizer", "space") if name in same_optimizer else ("objective",)
        lines: list[str] = []
        for key in compared:
            lines += differences(stored_specification[key], specification[key], key)
        if not lines and "objective" in current:
            lines = _fingerprint_differences(sibling["fingerprint"], current, accept=accept)
        if lines:
            raise StudyStoreError(
                f"{plan.name}: its losses would not compare with those of {name}: {'; '.join(lines)}. Give the "
                f"experiment another name: lcsc run FILE name=...; where only code changed, {_ACCEPT}"
            )


def _fingerprint_differences(before: Mapping[str, Any], now: Mapping[str, Any], *, accept: bool) -> list[str]:
    """Differences in the code, unless they are accepted, and in the objective."""
    lines = []
    if not accept:
        lines.append(changes(before, {"code": now["code"]}))
    lines.append(objective_changes(before, now))
    return [line for line in lines if line]
