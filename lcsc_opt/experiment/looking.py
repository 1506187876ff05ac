"""Which models are looked at side by side, and the sampler that makes their images; nothing is scored."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import JsonValue

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.files import write_atomically
from lcsc_opt.base.paths import BuildContext
from lcsc_opt.base.settings import parse_yaml
from lcsc_opt.base.study_file import FILL_IN, read_study_file
from lcsc_opt.base.study_spec import ModelKind, ObjectiveSpec
from lcsc_opt.coefficients.profiles import trainer_ema
from lcsc_opt.database.experiment import StoredExperiment
from lcsc_opt.database.names import has_study_form
from lcsc_opt.database.opened import Database
from lcsc_opt.database.urls import files_directory
from lcsc_opt.exports.chosen import Chosen
from lcsc_opt.exports.grid import (
    ANSWER,
    FINALISTS,
    Shown,
    checkpoints_of,
    each_once,
    finalists_shown,
    named_shown,
)
from lcsc_opt.metrics.from_settings import ReferenceScoreSettings
from lcsc_opt.objective.checkpoints_alone import stored_context
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.loading import load_objective
from lcsc_opt.objective.starting import draft, kind_of
from lcsc_opt.views.artifacts import GRID, GRID_OF, artifact_directory


class Looked(NamedTuple):
    """What is looked at.

    Attributes:
        name: of the experiment, or of the checkpoints' folder.
        objective: merges and samples.
        models: each once.
    """

    name: str
    objective: Objective
    models: list[Shown]


def look_at_experiment(database: Database, name: str, models: Sequence[str] = ()) -> Looked:
    """The checkpoints and the models of the report of a stored experiment, or the models of these names.

    Args:
        database: where it is stored.
        name: of the experiment.
        models: ``checkpoints``, ``finalists``, ``answer``, a study's name, or an average as ``lcsc apply`` names it.

    Raises:
        LcscError: there is no such experiment or model, or its sampler cannot be loaded.
    """
    storage = database.existing()
    contents = database.contents
    stored = StoredExperiment.open(storage, name)
    files = files_directory(database.url)
    context = dataclasses.replace(stored_context(stored.attributes, files), samples_alone=True)
    objective = load_objective(ObjectiveSpec(**stored.attributes["objective"]), context)
    shown: list[Shown] = []
    report = stored.report
    finalists = finalists_shown(report, contents.studies) if report is not None else []
    if not models:
        shown = [*_checkpoints(objective), *finalists]
    for named in models:
        if named == FINALISTS:
            shown += finalists
        elif named == ANSWER or has_study_form(named):
            chosen = Chosen.of(storage, name if named == ANSWER else named)
            shown.append(Shown(chosen.model.title, chosen.model.coefficients, chosen.rows))
        else:
            shown += named_shown([named], objective)
    return Looked(name, objective, each_once(shown))


def look_at_study_file(path: Path, overrides: Sequence[str], url: str, models: Sequence[str] = ()) -> Looked:
    """The checkpoints of a study file, or the averages of these names.

    Raises:
        LcscError: the file is wrong, or its sampler cannot be loaded.
    """
    study_file = read_study_file(path, overrides)
    context = BuildContext(path.absolute().parent, files=files_directory(url), samples_alone=True)
    objective = load_objective(study_file.objective, context)
    return Looked(study_file.name, objective, _of_checkpoints(objective, models))


def look_at_checkpoints(
    kind: ModelKind | None,
    checkpoints: Sequence[Path],
    given: Mapping[str, JsonValue],
    url: str,
    *,
    steps: Sequence[int] | None = None,
    models: Sequence[str] = (),
) -> Looked:
    """Checkpoints without a study file: what ``lcsc init`` would find out about them, and these settings.

    Args:
        kind: what they are; ``None`` reads it from the last one.
        checkpoints: their folder, a glob, files, or a packed trajectory.
        given: settings of the objective.
        url: of the database, beside which packed checkpoints are kept.
        steps: of training, of each checkpoint; ``None`` reads them from names and contents.
        models: names of averages; none of them is all checkpoints.

    Raises:
        StudySpecError: settings of the sampler are missing.
        LcscError: the sampler cannot be loaded.
    """
    key = given.get("key")
    kind = kind or kind_of(checkpoints, key=None if key is None else str(key), steps=steps)
    text, _ = draft(kind, checkpoints, given, steps=steps)
    name, spec, missing = sampling_spec(text)
    if missing:
        raise StudySpecError(
            f"{checkpoints[0]}: what makes images is not known yet; give {' '.join(f'{key}=…' for key in missing)}"
        )
    objective = load_objective(spec, BuildContext(Path.cwd(), files=files_directory(url), samples_alone=True))
    return Looked(name, objective, _of_checkpoints(objective, models))


def sampling_spec(text: str) -> tuple[str, ObjectiveSpec, list[str]]:
    """Of the text of a study file: its name, its objective without metrics, and the settings that are to be filled in.

    Only those that sampling needs are among them.
    """
    content: Any = parse_yaml(text)
    settings = {
        key: value
        for key, value in content["objective"]["settings"].items()
        if key not in ReferenceScoreSettings.model_fields and key != "images"
    }
    missing = [key for key, value in settings.items() if value == FILL_IN]
    return str(content["name"]), ObjectiveSpec(file=content["objective"]["file"], settings=settings), missing


def _of_checkpoints(objective: Objective, models: Sequence[str]) -> list[Shown]:
    if models:
        return each_once(named_shown(models, objective))
    return _checkpoints(objective)


def _checkpoints(objective: Objective) -> list[Shown]:
    """The checkpoints, and the averages that the trainer kept itself, if it did; of LoRAs first the base."""
    shown = checkpoints_of(objective)
    trajectory = objective.trajectory
    names = () if trajectory is None else trajectory.averages
    return shown + [Shown(name, trainer_ema(len(objective.steps), index)) for index, name in enumerate(names)]


def keep_grid(database: Database, experiment: str, content: bytes) -> None:
    """Store a grid with an experiment, for the Images page; it replaces the one before."""
    storage = database.existing()
    folder = artifact_directory(storage.url)
    folder.mkdir(parents=True, exist_ok=True)
    stored = StoredExperiment.open(storage, experiment)
    stored.record.attach(folder, GRID, content)
    report = stored.report
    stored.set_attribute(GRID_OF, None if report is None else report.of_answer.model.key)


def write_first_look(content: bytes, name: str, files: Path) -> Path:
    """Write the picture of a first look beside the packed checkpoints, and return where it is."""
    path = files / f"{name}-checkpoints.png"
    write_atomically(path, content, error=StudySpecError)
    return path
