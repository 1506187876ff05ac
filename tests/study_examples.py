"""Small studies, written as the runner writes them, and study files."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from optuna.storages import RDBStorage

from lcsc_opt.base.records import (
    CONTIGUOUS,
    HELD_OUT,
    SEARCH,
    SELECTION,
    STANDARD_ERROR,
    Candidate,
    Cost,
    Evaluation,
    Noise,
)
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.experiment import CHOICE, REPORT, StoredExperiment
from lcsc_opt.database.measurement import UNSEEN, Measurement, Model, Sample
from lcsc_opt.database.names import split_name
from lcsc_opt.database.report import Report
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.objective.key import Key, digest_of
from lcsc_opt.views.artifacts import (
    FARTHEST,
    SAMPLES,
    artifact_directory,
)
from tests.history_examples import report_of

STEPS = (100, 200, 300)
PNG = b"\x89PNG\r\n\x1a\n and the rest"


def coefficients(number: int) -> np.ndarray:
    """Those of trial ``number``: they sum to one, and say which trial they are of."""
    return np.array([-0.25 * number, 0.25, 0.75 + 0.25 * number])


def write_experiment(storage: RDBStorage, name: str, **attributes: Any) -> StoredExperiment:
    """What is stored of an experiment, with these attributes; one that is stored already keeps its own."""
    first = {
        "key": dataclasses.asdict(Key({})),
        "keys": {digest_of(Key({}).of_trials): Key({}).of_trials},
        "objective": {"file": "function.py", "settings": {}},
        "directory": None,
        "places": {},
        "checkpoints": None,
        "steps": list(STEPS),
        "maximize": False,
        "machine": {"layout": CONTIGUOUS},
        "renaming": None,
        "sampling": None,
        "samples": True,
        "report_images": None,
        "holds_out": True,
    }
    return StoredExperiment.open_or_create(storage, name, {**first, **attributes})


def write_report(storage: RDBStorage, report: Report, experiment: str = "digits") -> None:
    """Store a report as the trials of an experiment, and which model was chosen."""
    stored = write_experiment(storage, experiment)
    parts = [dataclasses.replace(part, models=tuple(map(_told_apart, part.models))) for part in report.parts]
    report = dataclasses.replace(report, parts=tuple(parts))
    for part in report.parts:
        for measured in part.models:
            for group, seed in enumerate(measured.seeds):
                noise = Noise(HELD_OUT.group, seed)
                sample = Sample(noise, measured.images, part.second)
                candidate = Candidate(measured.model.coefficients, noise=noise)
                stored.add(REPORT, measured.model, candidate, sample, evaluation_of_group(measured, group))
    entrants = dict(report.entrants)
    for name, loss in report.selection.items():
        if name not in entrants:
            known = report.measured(name)
            model = known.model if known is not None else _Named(name, coefficients(len(entrants)))
            noise = Noise(SELECTION.group)
            candidate = Candidate(model.coefficients, noise=noise)
            stored.add(CHOICE, model, candidate, Sample(noise, 7), Evaluation(report.sign * loss))
            entrants[name] = model.key
    stored.choose(dataclasses.replace(report, entrants=entrants, rounds=report.rounds or ((7, 0),)), of="")


class _Named(Model):
    """A model of an example, told apart from others by its name: many have the same coefficients."""

    @property
    def key(self) -> str:
        return f"key of {self.name}"


def _told_apart(measured: Measurement) -> Measurement:
    fields = {field.name: getattr(measured.model, field.name) for field in dataclasses.fields(Model)}
    return dataclasses.replace(measured, model=_Named(**fields))


def evaluation_of_group(measured: Measurement, group: int) -> Evaluation:
    """What was measured on one group of noise."""
    values = {name: of_groups[group] for name, of_groups in measured.values.items()}
    derived = values.pop("loss" + STANDARD_ERROR, None)
    loss, unseen = values.pop("loss"), values.pop(UNSEEN, None)
    assert derived is None or derived in values.values()
    without = {name: of_groups[group] for name, of_groups in measured.without_groups.items()}
    return Evaluation(loss, values, unseen=unseen, without_groups=without)


def stored_report(experiment: str, url: str = "sqlite:///studies.db") -> Report:
    """The report of an experiment that was run in the working folder."""
    found = StoredExperiment.open(open_storage(url, write=False), experiment).report
    assert found is not None
    return found


def write_mean(storage: RDBStorage, study: str, coefficients: np.ndarray, loss: float) -> None:
    """A report in which the best of a search is no trial, but a mean of its iterates."""
    model = Model("LCSCGradient, mean of the last half", coefficients, study=study)
    report = report_of({}, Measurement(model, 0, (0,), {"loss": (loss,)}), had=())
    write_report(storage, dataclasses.replace(report, found={study: model.name}), split_name(study)[0])


def write_study(
    storage: RDBStorage,
    name: str,
    losses: Sequence[float | None],
    *,
    held_out: Measurement | None = None,
    ended: bool = True,
    running: int = 0,
    images: int = 10,
    seconds: float = 0.5,
    metric: str | None = "fid",
) -> StoredStudy:
    """A study with a trial for each loss; ``None`` stands for one that failed.

    ``held_out`` is its best trial on held-out noise, which joins the report of the experiment.
    """
    experiment = write_experiment(storage, split_name(name)[0])
    created = {"steps": STEPS, "environment": {}, "budget": {"evaluations": 9, "images": None}, "key": {}}
    study = StoredStudy.open_or_create(storage, name, created)
    for number, loss in enumerate(losses):
        add_result(study, number, loss, images=images, seconds=seconds, metric=metric)
    for number in range(len(losses), len(losses) + running):
        study.add_candidate(Candidate(coefficients(number)))
    if ended:
        study.set_attribute("search_ended", {"evaluations": len(losses), "exhausted": False})
    if held_out is not None:
        searched = losses[held_out.model.trial or 0]
        model = dataclasses.replace(held_out.model, searched=searched)
        found = {name: dataclasses.replace(held_out, model=model)}
        had: list[Measurement] = []
        if experiment.report is not None:
            measured = {model.model.name: model for model in experiment.report.models}
            found |= {other: measured[title] for other, title in experiment.report.found.items()}
            had = [measured[title] for title in experiment.report.had]
        write_report(storage, report_of(found, *had), experiment.name)
    return study


def add_result(
    study: StoredStudy,
    number: int,
    loss: float | None,
    *,
    images: int = 10,
    seconds: float = 0.5,
    metric: str | None = "fid",
    reason: str = "broken",
    at: np.ndarray | None = None,
    asked: int | None = None,
    noise: Noise = SEARCH,
) -> None:
    """The trial of this number, which has ended; ``at`` are other coefficients, ``asked`` its own number of images."""
    key = study.add_candidate(Candidate(coefficients(number) if at is None else at, images=asked, noise=noise))
    if loss is None:
        study.fail(key, [{"reason": reason, "seconds": seconds}])
    else:
        cost = Cost(images=asked or images, seconds=seconds)
        evaluation = Evaluation(loss, {} if metric is None else {metric: loss}, cost)
        study.finish(key, evaluation, compares=asked is None and noise == SEARCH)


def attach(storage: RDBStorage, name: str, content: bytes = PNG, experiment: str = "digits") -> Path:
    """Store a file with an experiment, as a report does; the path of what is stored."""
    folder = artifact_directory(storage.url)
    folder.mkdir(exist_ok=True)
    record = write_experiment(storage, experiment).record
    record.attach(folder, name, content)
    (meta,) = (meta for meta in record.artifacts() if meta["filename"] == name)
    return folder / str(meta["artifact_id"])


def write_images(storage: RDBStorage, experiment: str = "digits", content: bytes = PNG) -> None:
    """All images of a report: samples as they come, real ones, and the pairs that differ most."""
    for name in (SAMPLES["before"], SAMPLES["answer"], SAMPLES["real"], FARTHEST["before"], FARTHEST["answer"]):
        attach(storage, name, content, experiment)
