"""Reads studies, repeatedly for pages that refresh while a search runs. Nothing is ever written.

Of a study that has a summary no trial is read. All trials come through Optuna's cache, which never reads a trial again
that has ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from optuna.storages import RDBStorage, get_storage
from optuna.trial import FrozenTrial, TrialState

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.progress import notice
from lcsc_opt.base.records import Yardstick
from lcsc_opt.base.settings import near_miss
from lcsc_opt.base.study_spec import OF_EXPERIMENT
from lcsc_opt.database.arrays import coefficients_of
from lcsc_opt.database.connection import in_database
from lcsc_opt.database.experiment import report_of, search_yardstick
from lcsc_opt.database.history import Floats, Standing, sign_of
from lcsc_opt.database.lock import locked
from lcsc_opt.database.names import BASELINES, HOLDER, split_name
from lcsc_opt.database.report import Report
from lcsc_opt.database.states import forgotten_trials, shown_trials
from lcsc_opt.database.store import Contents, StoredStudy, no_such_study, read_contents
from lcsc_opt.database.summary import Summary


@dataclasses.dataclass(frozen=True)
class FailureReason:
    """One reason, how often it came up, and how many of these trials were lost; the others succeeded later.

    ``traceback`` is Python's text of the last exception with this reason; empty if there was none.
    """

    reason: str
    attempts: int
    lost: int
    traceback: str = ""

    @classmethod
    def of(cls, trials: Iterable[FrozenTrial]) -> list[FailureReason]:
        """Why attempts of these trials failed, the most frequent reason first."""
        attempts: Counter[str] = Counter()
        lost: Counter[str] = Counter()
        tracebacks: dict[str, str] = {}
        for trial in trials:
            failed_attempts = trial.user_attrs.get("attempts") or []
            if trial.state == TrialState.FAIL:
                failed_attempts = failed_attempts or [{"reason": "unknown"}]  # another program ended it
                lost.update({str(attempt["reason"]) for attempt in failed_attempts})  # once for each of its reasons
            for attempt in failed_attempts:
                attempts[str(attempt["reason"])] += 1
                if "traceback" in attempt:
                    tracebacks[str(attempt["reason"])] = str(attempt["traceback"])
        return [
            cls(reason, count, lost[reason], tracebacks.get(reason, "")) for reason, count in attempts.most_common()
        ]


class HistoryReader:
    """The studies of one database, as fresh as their last :meth:`read`. Safe to share between threads.

    All methods raise :class:`StudyStoreError` where the database cannot be read, or a newer lcsc_opt has made one of
    its studies. Of a study that was deleted since it was read, more cannot be read: that raises :class:`KeyError`.
    """

    def __init__(self, storage: RDBStorage) -> None:
        self.storage = storage
        self._cached_storage = get_storage(storage)
        self._created: dict[str, Any] = {}  # study → when that was, as it was last read

    def names(self) -> list[str]:
        """The names of our studies, in the order in which they were created."""
        return list(read_contents(self.storage).studies)

    def experiments(self) -> list[str]:
        """The experiments that the database holds, the newest last."""
        return list(dict.fromkeys(split_name(name)[0] for name in self.names()))

    def read(self, experiment: str) -> tuple[Standing, ...]:
        """How the searches of an experiment stand now, without their trials, in order of creation.

        Raises:
            StudyStoreError: there is no such experiment, and the message lists all.
        """
        contents = read_contents(self.storage)
        names_of_experiment = list(contents.searches(experiment))
        if not names_of_experiment:
            experiments = sorted({split_name(name)[0] for name in contents.studies})
            listed = ", ".join(experiments) or "none"
            guess = near_miss(experiment, experiments)
            raise StudyStoreError(f"{experiment}: no such experiment{guess}; the database holds: {listed}")
        foreign = contents.foreign(experiment)
        if foreign:
            notice(f"{experiment}: of another problem, and in no table: {', '.join(foreign)}")
        return self._read_all(contents, names_of_experiment)

    def read_studies(self, names: Iterable[str] | None = None) -> tuple[Standing, ...]:
        """The studies of these names as they are now, in this order; those that do not exist are left out.

        Args:
            names: ``None`` for all studies.

        Raises:
            StudyStoreError: a name is not ``experiment/optimizer/seed``, or the database cannot be read.
        """
        contents = read_contents(self.storage)
        return self._read_all(contents, list(contents.studies if names is None else names))

    def _read_all(self, contents: Contents, names: Sequence[str]) -> tuple[Standing, ...]:
        """How the studies of these names stand; those that do not exist are left out.

        ``contents`` are those of the database, which also tell whether a study was deleted since the last read.
        """
        all_studies = {**contents.experiments, **contents.studies}
        created = {name: attributes.get("created") for name, attributes in all_studies.items()}
        if not self._created.items() <= created.items():  # one is gone, and another may have its key
            self._cached_storage = get_storage(self.storage)
        self._created = created
        running = locked(self.storage, names)
        experiments: dict[str, _Experiment] = {}
        standings = []
        for name in names:
            experiment = split_name(name)[0]  # raises
            with contextlib.suppress(KeyError):  # there is none, or it was deleted since the names were read
                if experiment not in experiments:
                    experiments[experiment] = self._read_experiment(contents, experiment)
                of_experiment = experiments[experiment]
                if name in of_experiment.foreign:
                    of_experiment = _Experiment({})
                standings.append(self._read(name, contents.studies[name], of_experiment, is_running=name in running))
        return tuple(standings)

    def _read_experiment(self, contents: Contents, name: str) -> _Experiment:
        """What its searches have of an experiment. Raises KeyError if it was deleted just now."""
        attributes = contents.experiments.get(name)
        if attributes is None:
            return _Experiment({})
        study_id = in_database(self.storage, lambda: self.storage.get_study_id_from_name(name))
        stored = in_database(self.storage, lambda: self._cached_storage.get_all_trials(study_id, deepcopy=False))
        trials = shown_trials(stored, sign=sign_of(attributes), forgotten=())
        report = report_of(attributes, trials)
        return _Experiment(attributes, report, search_yardstick(attributes, trials), contents.foreign(name).keys())

    def read_study(self, name: str) -> Standing:
        """One study as it is now.

        Raises:
            StudyStoreError: there is no such study, and the message lists all; or another program made it.
        """
        contents = read_contents(self.storage)
        if name in contents.studies:
            for study in self._read_all(contents, [name]):  # none, if it was deleted just now
                return study
        StoredStudy.open(self.storage, name)  # which knows why it is none of ours
        raise no_such_study(self.storage, contents, name)

    def trials(self, study: Standing) -> list[FrozenTrial]:
        """The trials of a study by number, as they are now, with losses as values, also where a score is maximized.

        Trials of other programs, and those that a retry has replaced, are left out. The rest is shared with Optuna's
        cache and must not be changed.

        Raises:
            KeyError: it was deleted.
        """
        trials = in_database(self.storage, lambda: self._cached_storage.get_all_trials(study.study_id, deepcopy=False))
        return shown_trials(trials, sign=study.sign, forgotten=study.forgotten)

    def failures(self, study: Standing) -> list[FailureReason]:
        """Why attempts failed. The trials are read only where one has failed, or may have."""
        summary = study.summary
        if not summary.failed and not summary.retried and summary.evaluations == summary.trials:
            return []
        return FailureReason.of(self.trials(study))

    def answer(self, study: Standing) -> Floats | None:
        """The coefficients, ``[K]`` or ``[S, K]``, of the study's best model; ``None`` while there is none.

        That is the one that a report found, else the best trial.
        """
        if study.found is not None and study.found.model.trial is None:  # a mean of several
            return study.found.model.coefficients
        if study.chosen is None:
            return None
        number = study.chosen

        def read() -> FrozenTrial:
            trial_id = self._cached_storage.get_trial_id_from_study_id_trial_number(study.study_id, number)
            return self._cached_storage.get_trial(trial_id)

        try:
            return coefficients_of(in_database(self.storage, read))
        except KeyError as error:
            raise StudyStoreError(f"{study.study}: has no trial {number} of a search") from error

    def _read(self, name: str, attributes: Mapping[str, Any], experiment: _Experiment, *, is_running: bool) -> Standing:
        """One study as it is now. Its trials are read only while it has no summary.

        Raises:
            KeyError: it was deleted.
        """
        shared = {key: experiment.attributes.get(key) for key in OF_EXPERIMENT}
        settings = {**attributes.get("specification", {}), **shared}
        budget = attributes.get("budget") or {}
        ended = attributes.get("search_ended")
        # the last one, which may have ended; a first holder takes the lock before it writes its name
        holder = attributes.get(HOLDER)
        study = Standing(
            in_database(self.storage, lambda: self.storage.get_study_id_from_name(name)),
            name,
            *split_name(name),
            steps=tuple(attributes.get("steps") or ()),
            checkpoint_names=experiment.attributes.get("checkpoint_names", ()),
            layer_groups=attributes.get("layer_groups") or {},
            settings=settings,
            workers=_worker_count(settings.get("workers", 1)),
            sign=sign_of(attributes),
            forgotten=forgotten_trials(attributes),
            holds_out=experiment.attributes.get("holds_out", True),
            budget={unit: int(total) for unit, total in budget.items() if total is not None},
            ended=bool(ended),
            how=ended.get("how") if ended else None,
            yardstick=experiment.yardstick,
            changes=experiment.attributes.get("changes", ()),
            report=experiment.report,
            holder=holder["host"] if is_running and holder is not None else None,
        )
        study = dataclasses.replace(study, summary=Summary.stored(attributes) or Summary.of(self.trials(study)))
        if study.optimizer not in BASELINES:
            return study
        coefficients = self.answer(study)
        average = None if coefficients is None else study.average_name(coefficients)
        return dataclasses.replace(study, average=average)


@dataclasses.dataclass(frozen=True)
class _Experiment:
    """What all searches of an experiment have of it; nothing where it was deleted."""

    attributes: Mapping[str, Any]
    report: Report | None = None
    yardstick: Yardstick | None = None
    foreign: Collection[str] = ()  # searches of its name that are of another problem


def _worker_count(workers: Any) -> int:
    """How many workers a stored specification has; ``auto`` counts as one."""
    if isinstance(workers, Mapping):
        return int(workers["ray"])
    if isinstance(workers, Sequence) and not isinstance(workers, str):
        return len(workers)
    if isinstance(workers, int):
        return workers
    return 1
