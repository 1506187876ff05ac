"""The contract of a storage."""

from __future__ import annotations

import uuid

import numpy as np
from optuna.trial import TrialState

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.records import Candidate, Cost, Evaluation, Noise
from lcsc_opt.database.connection import in_database, open_storage
from lcsc_opt.database.store import StoredStudy, study_names
from lcsc_opt.testing.requiring import require

K = 500
SMALLEST = 5e-324


def check_storage(url: str) -> None:
    """Write a study into a database, read it back, and delete it.

    * 500 coefficients, losses and gradients come back bit for bit, also the smallest numbers and negative zero.
    * A trial's number is the index of its ask. A candidate is stored, as running, before its result is.
    * Failures keep their reasons. Study attributes can be set again; other settings are refused.
    * One coordinator holds a study; a second one gets an error.

    Args:
        url: of a database that this may write to.

    Raises:
        AssertionError: one of these is not kept.
        StudyStoreError: the database cannot be opened or written.
    """
    storage, name = open_storage(url, write=True), f"contract-{uuid.uuid4().hex}/LCSC/0"
    study = StoredStudy.open_or_create(storage, name, {"specification": {"seed": 0}})
    try:
        with study.hold():
            _check_lock(url, name)
            _check_trials(study)
        _check_attributes(study)
    finally:
        in_database(storage, lambda: storage.delete_study(storage.get_study_id_from_name(name)))
    if name in study_names(storage):
        raise AssertionError(f"{url}: a study that was deleted is still listed")


def _check_lock(url: str, name: str) -> None:
    second = StoredStudy.open(open_storage(url, write=True), name)
    try:
        with second.hold():
            pass
    except StudyStoreError:
        return
    raise AssertionError("a second coordinator may hold a study that one holds already")


def _check_trials(study: StoredStudy) -> None:
    numbers = np.random.default_rng(0).standard_normal((2, K))
    numbers[0, :3] = (SMALLEST, -0.0, 1 / 3)
    candidate = Candidate(numbers[0], images=7, noise=Noise("search", 3))
    evaluation = Evaluation(1 / 3, {"fid": 1e-300}, Cost(images=7, seconds=0.1), gradient=numbers[1])
    keys = [study.add_candidate(candidate) for _ in range(3)]
    require(keys == [0, 1, 2], "the number of a trial is not the index of its ask")
    require(
        {trial.state for trial in study.trials()} == {TrialState.RUNNING}, "a candidate is not there before its result"
    )
    study.finish(keys[1], evaluation, tell_index=0)
    study.fail(keys[0], [{"reason": "no «image» 😀", "seconds": 0.1}], tell_index=1)
    failed, finished, running = study.trials()
    require(running.state == TrialState.RUNNING, "a trial that did not end has ended")
    require(failed.state == TrialState.FAIL and failed.value is None, "a failed trial is complete")
    require("no «image» 😀" in str(failed.user_attrs), "the reason of a failure is lost")
    require(finished.value == 1 / 3, f"a loss of {1 / 3!r} is read as {finished.value!r}")
    for attribute, wanted in (("coefficients", numbers[0]), ("gradient", numbers[1])):
        found = np.array(finished.user_attrs[attribute], dtype=np.float64)
        require(found.tobytes() == wanted.tobytes(), f"{attribute}: are read as other numbers than were written")


def _check_attributes(study: StoredStudy) -> None:
    for value in ({"a": [1, None, 0.1]}, "ü" * 5000, None):
        study.set_attribute("note", value)
        require(study.attributes["note"] == value, "a study attribute is read as another value than was written")
    study.require("specification", {"seed": 0})
    try:
        study.require("specification", {"seed": 1})
    except StudyStoreError:
        return
    raise AssertionError("a study that was made with other settings is not refused")
