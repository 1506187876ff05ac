"""What belongs to an experiment and to none of its searches, in an Optuna study of its name without trials.

========================  ====================================================================================
user attributes           ``problem`` (what decides losses, what is only reported), ``objective`` and ``held_out`` as
                          the study file has them, ``directory``, ``places``, ``checkpoints``, ``steps``,
                          ``maximize``, ``report_images``, ``holds_out``, ``layout``, ``changes``,
                          ``trainer_ema_sha256``; ``created``, ``created_by`` and ``schema`` as of a study
``yardstick SAMPLE``      what losses on this noise are relative to
``measured MODEL SAMPLE``  a model on noise that no search saw
``report``                the report, with the answer (:mod:`lcsc_opt.database.report`)
========================  ====================================================================================

Several processes may search one experiment. Each writes what it has measured under a key of its own, so none takes
anything from another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optuna.storages import RDBStorage

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.records import SEARCH, Yardstick
from lcsc_opt.database.connection import in_database
from lcsc_opt.database.report import REPORT, Report
from lcsc_opt.database.store import StoredStudy, create

PROBLEM = "problem"
LAYOUT = "layout"  # how the network's weights lie in memory, the same for all evaluations
TRAINER_EMA_SHA256 = "trainer_ema_sha256"
_MEASURED = "measured"
_YARDSTICK = "yardstick"


class StoredExperiment:
    """What is stored of one experiment. Its attributes are read when it is opened, and again by :meth:`refresh`.

    Args:
        record: the Optuna study of the experiment's name.

    All methods raise :class:`StudyStoreError` where the database cannot be used.
    """

    def __init__(self, record: StoredStudy) -> None:
        self.record = record
        self.attributes: dict[str, Any] = record.attributes

    @classmethod
    def open(cls, storage: RDBStorage, name: str) -> StoredExperiment:
        """Open what is stored.

        Raises:
            StudyStoreError: nothing is, or another program's study has the name.
        """
        try:
            study_id = in_database(storage, lambda: storage.get_study_id_from_name(name))
        except KeyError as error:
            raise StudyStoreError(f"{name}: no such experiment; start it with lcsc run") from error
        experiment = cls(StoredStudy(storage, name, study_id))
        if PROBLEM not in experiment.attributes:
            raise StudyStoreError(f"{name}: is a study of another program; give yours another name, or --storage")
        return experiment

    @classmethod
    def open_or_create(cls, storage: RDBStorage, name: str, attributes: Mapping[str, Any]) -> StoredExperiment:
        """Open what is stored, or begin with ``attributes``; of two processes that race for it, one begins it.

        Raises:
            StudyStoreError: another program's study has the name.
        """
        create(storage, name, attributes)
        return cls.open(storage, name)

    @property
    def name(self) -> str:
        """Of the experiment."""
        return self.record.name

    @property
    def storage(self) -> RDBStorage:
        """The database."""
        return self.record.storage

    @property
    def report(self) -> Report | None:
        """The report; ``None`` before there is one."""
        return Report.from_json(self.attributes.get(REPORT))

    def refresh(self) -> None:
        """Read the attributes again: other processes may have measured something."""
        self.attributes = self.record.attributes

    def set_attribute(self, name: str, value: Any) -> None:
        """Write one attribute, unless it has this value."""
        if name not in self.attributes or self.attributes[name] != value:
            self.record.set_attribute(name, value)
            self.attributes[name] = value

    def measured(self, key: str) -> Mapping[str, Any] | None:
        """What was stored by :meth:`keep_measured`; ``None`` if nothing was."""
        return self.attributes.get(f"{_MEASURED} {key}")

    def keep_measured(self, key: str, measurement: Mapping[str, Any]) -> None:
        """Store what was measured under the keys of the model and of the sample."""
        self.set_attribute(f"{_MEASURED} {key}", measurement)

    def yardstick(self, key: str) -> Yardstick | None:
        """The yardstick on this sample; ``None`` if it was not measured."""
        stored = self.attributes.get(f"{_YARDSTICK} {key}")
        if stored is None:
            return None
        return Yardstick(**stored)

    def keep_yardstick(self, key: str, yardstick: Mapping[str, Any]) -> None:
        """Store the fields of a yardstick on a sample, which is named as :func:`sample_key` names it."""
        self.set_attribute(f"{_YARDSTICK} {key}", yardstick)

    def forget_measured(self, *, yardsticks: bool) -> None:
        """Forget what was measured, as another objective or other code would measure it otherwise, and the report.

        Args:
            yardsticks: those, too; not if there are losses that are relative to them.
        """
        forgotten = [_MEASURED, _YARDSTICK] if yardsticks else [_MEASURED]
        for name in list(self.attributes):
            if name == REPORT or name.split(" ")[0] in forgotten:
                self.set_attribute(name, None)  # Optuna cannot delete one


def search_yardstick(attributes: Mapping[str, Any]) -> Yardstick | None:
    """What the losses of searches are relative to, from an experiment's attributes; ``None`` if they are absolute."""
    for name, stored in attributes.items():
        words = name.split(" ")  # see sample_key
        if words[0] == _YARDSTICK and words[2] == SEARCH.group and stored is not None:
            return Yardstick(**stored)
    return None
