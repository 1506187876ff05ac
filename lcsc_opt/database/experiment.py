"""What belongs to an experiment and to none of its searches, in an Optuna study of its name.

Its trials are what was evaluated and no search asked for, each with a ``role``:

=============  ===============================================================================================
``yardstick``  an average of the checkpoints, which losses on this noise are relative to
``had``        what the user had before any search, scored first
``choice``     a model on the noise of the choice, in one of its rounds
``report``     a model on held-out noise, also in a second sampler
=============  ===============================================================================================

A trial has ``coefficients``, ``images``, ``noise``, ``metrics``, ``cost`` and a value as that of a search, and
``model`` (its name, and where it comes from), ``sampler``, ``without_groups`` and ``unseen``; and ``key``, which says
what it is of. Its state is ``COMPLETE`` on held-out noise in the sampler of the searches, else ``PRUNED``.

=====================  =======================================================================================
study user attributes  ``about`` (what this study is, for people), ``key`` (what evaluations are of:
                       :class:`lcsc_opt.objective.key.Key`), ``keys`` (digest → what trials of it are of, of all whose
                       trials are valid today), ``chosen`` (which model, and when), ``metrics`` (of reports),
                       ``objective`` and ``held_out`` as the study file has them, ``directory``, ``places``,
                       ``checkpoints``, ``checkpoint_names``, ``averages``, ``steps``, ``renaming``,
                       ``sampling``, ``samples``, ``maximize``, ``report_images``, ``holds_out``, ``machine``,
                       ``changes``, ``pictured`` (of which models there are images), ``grid_of`` (which model was the
                       answer when ``lcsc images`` drew the grid); ``created``, ``created_by`` and ``schema`` as of a
                       study
=====================  =======================================================================================

Several processes may search one experiment. Each adds trials of its own, so none takes anything from another. Deleted,
the study is made again, and everything in it is measured again.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.records import (
    HELD_OUT,
    SEARCH,
    SELECTION,
    Candidate,
    Evaluation,
    Noise,
    ReportedMetrics,
    SamplerTitle,
    Yardstick,
    as_json,
)
from lcsc_opt.database.arrays import coefficients_of
from lcsc_opt.database.history import sign_of
from lcsc_opt.database.measurement import Measurement, Model, Sample
from lcsc_opt.database.names import KEYS
from lcsc_opt.database.report import Part, Report
from lcsc_opt.database.states import SUCCEEDED, Attributes
from lcsc_opt.database.store import StoredStudy, candidate_attributes, evaluation_of, read_study, write_together

ABOUT = (
    "an experiment of lcsc_opt: the trials here are what was evaluated beside its searches (yardstick, had, choice, "
    "report); lcsc compare shows them, and lcsc delete deletes them with the searches"
)
KEY = "key"
CHOSEN = "chosen"
AVERAGES = "averages"  # the digests of the trainer's own
YARDSTICK = "yardstick"
HAD = "had"
CHOICE = "choice"
REPORT = "report"


class StoredExperiment:
    """What is stored of one experiment, read when it is opened, and again by :meth:`refresh`.

    Args:
        record: the Optuna study of the experiment's name.

    Attributes:
        record, name, storage: of it.

    All methods raise :class:`StudyStoreError` where the database cannot be used.
    """

    def __init__(self, record: StoredStudy) -> None:
        self.record = record
        self.name = record.name
        self.storage = record.storage
        self._trials: list[FrozenTrial] | None = None

    @classmethod
    def open(cls, storage: RDBStorage, name: str) -> StoredExperiment:
        """Open what is stored.

        Raises:
            StudyStoreError: nothing is, or another program's study has the name.
        """
        try:
            record = StoredStudy(storage, name, *read_study(storage, name))
        except KeyError as error:
            raise StudyStoreError(f"{name}: no such experiment; start it with lcsc run") from error
        if KEYS not in record.attributes:
            raise StudyStoreError(f"{name}: is a study of another program; give yours another name, or --storage")
        return cls(record)

    @classmethod
    def open_or_create(cls, storage: RDBStorage, name: str, attributes: Attributes) -> StoredExperiment:
        """Open what is stored, or begin with ``attributes``; of two processes that race for it, one begins it.

        Raises:
            StudyStoreError: another program's study has the name.
        """
        record = StoredStudy.created(storage, name, {"about": ABOUT, **attributes})
        return cls.open(storage, name) if record is None else cls(record)

    @property
    def attributes(self) -> dict[str, Any]:
        """As they were when they were last read, and as written since."""
        return self.record.attributes

    @property
    def report(self) -> Report | None:
        """The report: its trials, and which model was chosen; ``None`` before there is one."""
        return report_of(self.attributes, self.trials)

    @property
    def trials(self) -> list[FrozenTrial]:
        """Its trials, with losses as values."""
        if self._trials is None:
            self._trials = self.record.trials()
        return self._trials

    def refresh(self) -> None:
        """Read all again: other processes may have measured something."""
        self.record.attributes = self.record.stored_attributes()
        self._trials = None
        self.__dict__.pop("_of_models", None)

    def _add(self, attributes: Attributes, result: Evaluation | Mapping[str, Any], *, compares: bool) -> None:
        """Commit a trial, and know of it without reading all of them again."""
        trial = self.record.add_ended(attributes, result, compares=compares)
        if self._trials is not None:
            self._trials.append(trial)
        self.__dict__.pop("_of_models", None)

    def set_attribute(self, name: str, value: Any) -> None:
        """Write one attribute, unless it has this value."""
        if name not in self.attributes or self.attributes[name] != value:
            self.record.set_attribute(name, value)

    def measured(self, model: Model, sample: Sample) -> list[Measurement]:
        """What is known of a model on this sample, under keys that are valid today."""
        return [_measurement_of(trial, model) for trial in self._of_models.get((model.key, sample), ())]

    @functools.cached_property
    def _of_models(self) -> dict[tuple[str, Sample], list[FrozenTrial]]:
        return _by_model(self.attributes, self.trials)

    def yardstick(self, sample: Sample) -> Yardstick | None:
        """The yardstick on this sample; ``None`` if it was not measured."""
        for trial in valid_trials(self.attributes, self.trials):
            if trial.user_attrs["role"] == YARDSTICK and sample_of(trial) == sample:
                return Yardstick(**trial.user_attrs[YARDSTICK])
        return None

    def add(
        self,
        role: str,
        model: Model,
        candidate: Candidate,
        sample: Sample,
        result: Evaluation | Mapping[str, Any],
        **attributes: Any,
    ) -> None:
        """Add a trial that has ended.

        Args:
            role: as of this module.
            model: what was evaluated.
            candidate: as it was.
            sample: on what.
            result: of it; of a failed one its attempt.
            attributes: further ones.
        """
        described: dict[str, Any] = {
            **candidate_attributes(dataclasses.replace(candidate, images=sample.images or None)),
            "role": role,
            "model": model.to_json(),
            KEY: next(iter(self.attributes[KEYS])),  # today's
            **attributes,
        }
        if sample.sampler is not None:
            described["sampler"] = dataclasses.asdict(sample.sampler)
        compares = sample.noise.group == HELD_OUT.group and sample.sampler is None
        self._add(described, result, compares=compares)

    def update(self, attributes: Attributes, searches: Sequence[str], *, keep_yardstick: bool) -> None:
        """Write attributes that are new, in one transaction.

        Args:
            attributes: the key among them, and which keys are valid from now on.
            searches: names of searches that get the new key, too.
            keep_yardstick: whether losses stay relative to what those of the stored searches are relative to.
        """
        yardstick = _search_yardstick(self.attributes, self.trials) if keep_yardstick else None
        # as text, since the order of keys counts
        changed = {
            name: value
            for name, value in attributes.items()
            if name not in self.attributes or json.dumps(self.attributes[name]) != json.dumps(value)
        }
        written = {self.name: changed}
        written |= {name: {KEY: attributes[KEY]["decides"]} for name in searches}
        write_together(self.storage, written)
        self.attributes.update(changed)
        self.__dict__.pop("_of_models", None)  # whose trials are valid under the keys of today
        if yardstick is not None and yardstick.user_attrs[KEY] not in attributes[KEYS]:
            today = {**yardstick.user_attrs, KEY: next(iter(attributes[KEYS]))}
            self._add(today, evaluation_of(yardstick), compares=False)

    def choose(self, report: Report, of: str) -> None:
        """Store which model was chosen, and when, and what the metrics of the report are.

        Args:
            report: the report.
            of: a digest of what it depends on.
        """
        self.set_attribute("metrics", as_json(dataclasses.asdict(report.metrics)))
        self.set_attribute(CHOSEN, {"at": time.time(), "of": of, **report.choice_to_json()})


def valid_trials(attributes: Attributes, trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """The trials with a value that are of what is compared today."""
    keys = attributes[KEYS]
    return [trial for trial in trials if trial.state in SUCCEEDED and trial.user_attrs.get(KEY) in keys]


def sample_of(trial: FrozenTrial) -> Sample:
    """What a stored trial was measured on."""
    attributes = trial.user_attrs
    noise = Noise(**attributes["noise"]) if "noise" in attributes else SEARCH
    sampler = SamplerTitle(**attributes["sampler"]) if "sampler" in attributes else None
    return Sample(noise, attributes.get("images", 0), sampler)


def _by_model(attributes: Attributes, trials: Iterable[FrozenTrial]) -> dict[tuple[str, Sample], list[FrozenTrial]]:
    """The key of a model, and a sample → the valid trials of it, the oldest first."""
    found: dict[tuple[str, Sample], list[FrozenTrial]] = {}
    for trial in valid_trials(attributes, trials):
        if trial.user_attrs["role"] != YARDSTICK:
            found.setdefault((trial.user_attrs["model"]["key"], sample_of(trial)), []).append(trial)
    return found


def _measurement_of(trial: FrozenTrial, model: Model) -> Measurement:
    """What a stored trial measured of a model."""
    sample = sample_of(trial)
    return Measurement.of(model, evaluation_of(trial), images=sample.images, seed=sample.noise.seed)


def search_yardstick(attributes: Attributes, trials: Iterable[FrozenTrial]) -> Yardstick | None:
    """What the losses of an experiment's searches are relative to; ``None`` if they are absolute."""
    trial = _search_yardstick(attributes, trials)
    return None if trial is None else Yardstick(**trial.user_attrs[YARDSTICK])


def _search_yardstick(attributes: Attributes, trials: Iterable[FrozenTrial]) -> FrozenTrial | None:
    for trial in valid_trials(attributes, trials):
        if trial.user_attrs["role"] == YARDSTICK and sample_of(trial).noise == SEARCH:
            return trial
    return None


def report_of(attributes: Attributes, trials: Sequence[FrozenTrial]) -> Report | None:
    """The report of an experiment: a query over its trials; ``None`` before a model was chosen."""
    chosen = attributes.get(CHOSEN)
    if chosen is None:
        return None
    found = _by_model(attributes, trials)

    def measured(stored: Mapping[str, Any], part: Mapping[str, Any]) -> Measurement | None:
        """A model in a part of the report; ``None`` if it was not measured in all groups of noise."""
        sampler = None if part["sampler"] is None else SamplerTitle(**part["sampler"])
        groups = []
        for seed in part["seeds"]:
            of_sample = found.get((stored["key"], Sample(Noise(HELD_OUT.group, seed), part["images"], sampler)))
            if not of_sample:
                return None
            groups.append(_measurement_of(of_sample[-1], Model.from_json(stored, coefficients_of(of_sample[-1]))))
        return Measurement.joined(groups)

    parts = []
    for part in chosen["parts"]:
        models = filter(None, (measured(stored, part) for stored in chosen["models"].values()))
        second = None if part["sampler"] is None else SamplerTitle(**part["sampler"])
        parts.append(Part(part["title"], tuple(models), second))
    if parts[0].measured(chosen["answer"]) is None:  # its trials were deleted, or are of another key
        return None
    sign = sign_of(attributes)
    return Report(
        parts=tuple(part for part in parts if part.models),
        answer=chosen["answer"],
        had=tuple(chosen["had"]),
        found=chosen["found"],
        evaluations=chosen["evaluations"],
        top=chosen["top"],
        selection=_selection(chosen, found, sign),
        metrics=_metrics_of(attributes["metrics"]),
        sign=sign,
        warnings=tuple(chosen["warnings"]),
        entrants=chosen["entrants"],
        rounds=tuple((images, seed) for images, seed in chosen["rounds"]),
    )


def _selection(
    chosen: Mapping[str, Any], found: Mapping[tuple[str, Sample], Sequence[FrozenTrial]], sign: int
) -> dict[str, float]:
    """The name of a model → its loss on the noise of the choice, over all rounds but the first if it was in these."""
    first, *further = (Sample(Noise(SELECTION.group, seed), images) for images, seed in chosen["rounds"])
    losses = {}
    for name, key in chosen["entrants"].items():
        of_rounds = [found[key, sample][-1] for sample in further if (key, sample) in found]
        trials = of_rounds or found.get((key, first), ())[-1:]
        if trials:
            losses[name] = sign * statistics.fmean(trial.value or 0.0 for trial in trials)
    return losses


def _metrics_of(stored: Mapping[str, Any]) -> ReportedMetrics:
    """The metrics of reports, as :meth:`StoredExperiment.choose` stores them."""
    return ReportedMetrics(**{**stored, "terms": tuple(stored["terms"]), "judges": tuple(stored["judges"])})
