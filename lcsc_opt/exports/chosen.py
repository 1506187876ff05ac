"""Which model of an experiment is handed out: its answer, the best of one search, or one trial."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optuna.storages import RDBStorage

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.study_spec import Rule
from lcsc_opt.database.arrays import coefficients_of
from lcsc_opt.database.experiment import StoredExperiment
from lcsc_opt.database.history import best_searched
from lcsc_opt.database.measurement import Model
from lcsc_opt.database.names import has_study_form, split_name
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.report import Report
from lcsc_opt.database.states import row_rule_of
from lcsc_opt.database.store import Contents, StoredStudy, read_contents
from lcsc_opt.database.urls import files_directory
from lcsc_opt.objective.checkpoints_alone import CheckpointsAlone

# what says how to sample again, of all that a sampler describes; a function's settings may be private
_SAMPLING = ("sampler", "scheduler", "schedule", "steps", "step_options", "timestep_scale", "labels", "guidance_scale")


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A model of an experiment, with what was measured of it.

    Attributes:
        experiment: its name.
        model: what is handed out.
        measured: ``loss``, ``metrics`` and ``sampler`` of the search, and ``held_out`` of the report, as far as they
            are known.
        report: of the experiment; ``None`` before there is one.
        stored: the attributes of the experiment.
        rows: the rule of the model's rows of coefficients, such as ``layers``; ``None`` for one row.
        files: the folder beside the database.
        study: the name of the search that found the model; where none did, of the experiment's first one.
    """

    experiment: str
    model: Model
    measured: Mapping[str, Any]
    report: Report | None
    stored: Mapping[str, Any]
    rows: Rule | None
    files: Path
    study: str

    @classmethod
    def of(cls, storage: RDBStorage, name: str, trial: int | None = None) -> Chosen:
        """The answer of an experiment, or the best of a study, or one trial of it.

        Before there is a report, an experiment's is the trial of the lowest searched loss.

        Args:
            storage: the database.
            name: of an experiment, or of a study.
            trial: the number of a study's trial.

        Raises:
            StudyStoreError: there is no such experiment, study or trial, or no comparable trial has finished.
        """
        contents = read_contents(storage)
        if has_study_form(name):
            return cls._of_study(storage, contents, name, trial)
        reader = HistoryReader(storage)
        studies = reader.read(name)  # raises where there is no such experiment
        report = studies[0].report
        if report is not None:
            return cls._of(storage, contents, name, report.of_answer.model, report)
        best = best_searched(studies)
        if best is None:
            raise StudyStoreError(f"{name}: no comparable trial has finished yet; continue the search")
        return cls._of_study(storage, contents, best.study, None)

    @classmethod
    def _of_study(cls, storage: RDBStorage, contents: Contents, name: str, number: int | None) -> Chosen:
        """A trial of a study; without a number the one that the report measured, else the best one searched."""
        study = StoredStudy.open(storage, name)
        experiment = split_name(name)[0]
        contents.experiment(experiment)  # raises where it was deleted
        report = StoredExperiment.open(storage, experiment).report
        measured = None
        if report is not None:
            measured = report.of_study(name)
        if measured is not None and number in (None, measured.model.trial):
            return cls._of(storage, contents, experiment, measured.model, report)
        trial = study.trial_or_best(number)
        model = Model(f"trial {trial.number}", coefficients_of(trial), study=name, trial=trial.number)
        return cls._of(storage, contents, experiment, model, report)

    @classmethod
    def _of(
        cls, storage: RDBStorage, contents: Contents, experiment: str, model: Model, report: Report | None
    ) -> Chosen:
        """This model, with what is stored of its trial, its report and its experiment."""
        measured: dict[str, Any] = {}
        if model.study is not None and model.trial is not None:  # else no search measured it
            trial = StoredStudy.open(storage, model.study).trial(model.trial)
            measured = {"loss": trial.value, "metrics": trial.user_attrs.get("metrics", {})}
        if report is not None:
            on_held_out = report.measured(model.name)
            if on_held_out is not None:
                measured["held_out"] = {**on_held_out.means(report.sign), "sampler": report.parts[0].sampler}
        stored = contents.experiment(experiment)
        if stored["sampling"] is not None:
            measured["sampler"] = {name: stored["sampling"][name] for name in _SAMPLING if name in stored["sampling"]}
        files = files_directory(storage.url)
        rows = row_rule_of(model.study, contents.studies)
        study = model.study or next(iter(contents.of(experiment)))
        return cls(experiment, model, measured, report, stored, rows, files, study)

    @property
    def steps(self) -> tuple[int, ...]:
        """``[K]`` training steps of the checkpoints."""
        return tuple(self.stored["steps"])

    @property
    def trajectory_sha256(self) -> str | None:
        """The SHA-256 of the packed checkpoints; ``None`` if its objective merges none."""
        sha256: str | None = self.stored["checkpoints"]
        return sha256

    @property
    def title(self) -> str:
        """Which model of which experiment, for people."""
        return f"{self.model.title} of {self.experiment}"

    def checkpoints_alone(self) -> CheckpointsAlone | None:
        """The checkpoints without model and data, in the model's rows; ``None`` where these do not suffice to merge.

        Raises:
            TrajectoryError: the checkpoints are gone, or are others.
        """
        return CheckpointsAlone.of(self.stored, self.rows, self.files)
