"""Searches from Python: run the studies of a study file, open their results, compare them.

What imports Nevergrad is imported where it is needed, since that takes as long as importing torch.

The command line does the same with the same database. A study that was begun here can be continued there, and the other
way round. Progress goes to stderr, and so do messages unless the application has configured ``logging``.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from optuna.trial import FrozenTrial
from torch import Tensor

from lcsc_opt.base.catalog import find
from lcsc_opt.base.errors import ObjectiveError, StudySpecError, StudyStoreError
from lcsc_opt.base.inputs import read_arguments
from lcsc_opt.base.paths import BuildContext
from lcsc_opt.base.progress import each_notice_once, messages_by_default
from lcsc_opt.base.records import Coefficients
from lcsc_opt.base.settings import check_options, excerpt
from lcsc_opt.base.study_file import StudyFile, parse_study_file, read_study_file
from lcsc_opt.base.study_spec import Budget
from lcsc_opt.coefficients.profiles import check_coefficients, index_of_trainer_ema
from lcsc_opt.database.arrays import coefficients_of, has_coefficients
from lcsc_opt.database.connection import reading
from lcsc_opt.database.history import Standing, as_known
from lcsc_opt.database.names import split_name
from lcsc_opt.database.opened import Database
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy, read_contents
from lcsc_opt.database.urls import files_directory, storage_url
from lcsc_opt.objective import loading
from lcsc_opt.objective.checkpoints_alone import CheckpointsAlone
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.of_study import ObjectiveLoader, found_checkpoints, say_found
from lcsc_opt.views.tables import comparison_rows

if TYPE_CHECKING:
    from lcsc_opt.study.loop import TrialCallback


class TemporaryFolder:
    """A folder of a database that is deleted as soon as nobody refers to this object.

    ``tempfile.TemporaryDirectory`` warns when it is deleted in this way.

    Attributes:
        path: of the folder.
    """

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="lcsc-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class Study:
    """One stored study: one optimizer and one seed of a study file. It may be read while it runs.

    It answers what a table leaves out: which coefficients a trial had, and what they merge to.

    >>> import lcsc_opt
    >>> settings = {"callable": "numpy.linalg:norm", "steps": [100, 200]}
    >>> study_file = {"name": "norm", "objective": {"file": "function.py", "settings": settings}}
    >>> (study,) = lcsc_opt.run({**study_file, "optimizers": ["LCSC"]}, budget=4)
    >>> study.name, study.state, len(study.trials)
    ('norm/LCSC/0', 'finished', 4)
    >>> float(study.coefficients.sum())
    1.0

    Every property but :attr:`objective` is read anew at each access, and raises a ``StudyStoreError`` if the study was
    deleted, or the database cannot be read.

    Attributes:
        name: ``experiment/optimizer/seed``.
        storage: the URL of the database.
        functions: those that :func:`lcsc_opt.search` was given as objects, and that the objective calls.
        folder: of a temporary database, which lives as long as this.
    """

    name: str
    storage: str
    functions: Mapping[str, Callable[..., Any]] = dataclasses.field(default_factory=dict, repr=False, compare=False)
    folder: TemporaryFolder | None = dataclasses.field(default=None, repr=False, compare=False)

    @functools.cached_property
    def objective(self) -> Objective:
        """The objective that was searched, loaded as its study file says. Loading may train or read a model.

        Raises:
            LcscError: the objective's file cannot be loaded; or its checkpoints, its data or the study are gone.
        """
        from lcsc_opt.experiment.stored import objective_of

        with reading(self.storage) as storage:
            return objective_of(storage, self.name, self.functions)

    @property
    def state(self) -> str:
        """``finished`` once the search has ended, reported or not; else ``running``, ``interrupted`` or ``empty``."""
        return self._summary.state

    @property
    def steps(self) -> tuple[int, ...]:
        """``[K]`` training steps of the checkpoints."""
        return self._summary.steps

    @property
    def searched(self) -> float | None:
        """The lowest loss of the search, or the highest score if one is maximized; ``None`` while there is none."""
        return self._summary.searched

    @property
    def held_out(self) -> float | None:
        """The same of its best trial, on noise that no search and no choice saw; ``None`` before the report."""
        return self._summary.reported

    @property
    def coefficients(self) -> Coefficients:
        """``[K]`` of the study's own best model: what the report chose of it (a trial, or a mean), else its best trial.

        They sum to one. ``[S, K]``, if the study file asks for ``rows``: one for each of :attr:`layer_groups`. The
        experiment's answer may be another model, such as the last checkpoint: ``lcsc_opt.search(…).coefficients``.

        Raises:
            StudyStoreError: no trial that compares is complete yet, or the study was deleted.
        """
        with reading(self.storage) as storage:
            reader = HistoryReader(storage)
            coefficients = reader.answer(reader.read_study(self.name))
        if coefficients is None:
            raise StudyStoreError(f"{self.name}: no comparable trial has finished yet; continue the search")
        return coefficients

    @property
    def layer_groups(self) -> Mapping[str, int]:
        """Layer → how many rows of coefficients it has, in their order; empty where all layers have the same."""
        return self._summary.layer_groups

    @property
    def trials(self) -> list[dict[str, Any]]:
        """A row for each trial, by its number, for people and for ``pandas.DataFrame``.

        Keys: ``number``, ``state`` (``COMPLETE``, ``FAIL``, ``RUNNING``; ``PRUNED`` if the loss does not compare with
        others), ``loss`` (the score, if one is maximized), ``coefficients`` (a list, ``[K]`` or ``[S, K]``;
        ``None`` for a step of many rows),
        ``metrics`` (name → value), ``images``, ``seconds``, and the ``reason`` of a failure; ``None`` if unknown.
        """
        with reading(self.storage) as storage:
            study = StoredStudy.open(storage, self.name)
            return [_row(trial, study.sign) for trial in study.trials()]

    def merge(self, coefficients: npt.ArrayLike | None = None) -> dict[str, Tensor]:
        """The merged state dict, on the CPU, as it was scored.

        A network with batch normalization samples some images for this: its statistics are estimated, not merged.

        Args:
            coefficients: ``[K]`` or ``[S, K]``, sum to one; ``[0, …, 0, 1]`` of K + 1 numbers is the trainer's own EMA.
                ``None`` uses :attr:`coefficients`.

        Raises:
            StudySpecError: another number of coefficients, or another sum.
            ObjectiveError: the objective has no weights to merge.
            StudyStoreError: no trial is complete yet.
            LcscError: the checkpoints, or the trainer's own EMA, are not there; or the objective cannot be loaded.
        """
        objective = self._mergeable
        trajectory = objective.trajectory
        if trajectory is None:
            raise ObjectiveError(f"{self.name}: its objective combines no weights, so there is nothing to merge")
        if coefficients is None:
            coefficients = self.coefficients
        checked = np.asarray(coefficients)
        # an average of the trainer's has more numbers than a search's coefficients
        if index_of_trainer_ema(coefficients, len(self.steps)) is None:
            checked = check_coefficients(coefficients, len(self.steps), rows=objective.layer_groups)
        merged = trajectory.merge(checked) | dict(objective.statistics(checked))
        return {name: tensor.cpu() for name, tensor in merged.items()}  # some trajectories merge on a GPU

    @property
    def _mergeable(self) -> Objective:
        """The checkpoints alone where they suffice, since loading the whole objective runs the user's code.

        Raises:
            LcscError: as :attr:`objective`.
        """
        from lcsc_opt.experiment.stored import spec_of

        with reading(self.storage) as storage:
            contents = read_contents(storage)
        rows = spec_of(self.name, contents).space.rows
        experiment = contents.experiment(split_name(self.name)[0])
        alone = CheckpointsAlone.of(experiment, rows, files_directory(self.storage))
        if alone is None:
            return self.objective
        return alone

    @property
    def _summary(self) -> Standing:
        """The study without its trials, as it is now; raises as every property does."""
        with reading(self.storage) as storage:
            return HistoryReader(storage).read_study(self.name)


def run(
    study_file: str | Path | Mapping[str, Any],
    *,
    optimizers: str | Sequence[str | Mapping[str, Any]] | Mapping[str, Any] | None = None,
    seeds: int | Sequence[int] | npt.NDArray[np.integer[Any]] | None = None,
    budget: Budget | None = None,
    storage: str | Path | None = None,
    accept_changes: bool = False,
    callbacks: Sequence[TrialCallback] = (),
) -> list[Study]:
    """Run the studies of a study file: unfinished ones continue, finished ones are skipped.

    >>> import lcsc_opt
    >>> norm = {"file": "function.py", "settings": {"callable": "numpy.linalg:norm", "steps": [100, 200, 300]}}
    >>> study_file = {"name": "norm", "objective": norm, "optimizers": ["LCSC"], "budget": {"evaluations": 5}}
    >>> [study] = lcsc_opt.run(study_file)
    >>> study.name, study.state, len(study.trials)
    ('norm/LCSC/0', 'finished', 5)

    Args:
        study_file: a path, the name of a file in ``studies/``, or the contents of a study file.
        optimizers: only these: a name, several, or mappings from a name to its options. A name alone has the options
            that the file lists for it, else the default ones.
        seeds: only these, or only this one; the file need not list them. A grid takes the first alone.
        budget: another total for each study, in the unit of the file's budget; or a time, as for :func:`search`.
        storage: the file of the database, or its URL; ``None`` uses ``LCSC_STORAGE``, ``OPTUNA_STORAGE``, the study
            file's or ``sqlite:///studies.db``, whichever comes first.
        accept_changes: continue although the code, the versions or the reference have changed since a study began.
        callbacks: called as ``callback(study, trial)`` after each trial that ends now, in the order of their numbers
            and in this process, with an ``optuna.Study`` and a ``FrozenTrial``. ``study.stop()`` ends the search after
            the trials that are running; the same call again continues it (docs/api.md).

    Returns:
        A study for each optimizer and seed, in the order of the file.

    Raises:
        LcscError: something is wrong with the study file, the objective, a study or the database; the line says what.
        SearchFailedError: a study failed, or is run by another process. The others were still run, and all evaluations
            are in the database.
        Exception: what a callback raises; all evaluations are in the database.
    """
    options = read_arguments("lcsc_opt.run", accept_changes=accept_changes, callbacks=callbacks)
    read, directory = _read(study_file)
    read = read.with_choices(optimizers=optimizers, seeds=seeds, budget=budget)
    url = storage_url(storage, read.storage)
    with messages_by_default(), each_notice_once():
        database = Database(url)
        objectives = ObjectiveLoader(BuildContext(directory, files=database.files))
        say_found(found_checkpoints(read.objective, objectives.context))
        # these import Nevergrad, which takes seconds: only after the first line is said
        from lcsc_opt.experiment.outcome import SAME_CALL
        from lcsc_opt.experiment.running import experiment_of, run_studies

        experiment = experiment_of(read, database, objectives, accept_changes=options.accept_changes)
        run_studies(experiment, callbacks=options.callbacks, how_to_continue=SAME_CALL)
    return [Study(name, url) for name in experiment.specs]


def load_study(name: str, storage: str | Path | None = None) -> Study:
    """Open one study.

    >>> import lcsc_opt
    >>> norm = {"file": "function.py", "settings": {"callable": "numpy.linalg:norm", "steps": [100, 200, 300]}}
    >>> budget = {"evaluations": 5}
    >>> _ = lcsc_opt.run({"name": "norm", "objective": norm, "optimizers": ["LCSC"], "budget": budget})
    >>> study = lcsc_opt.load_study("norm/LCSC/0")
    >>> study.steps, study.coefficients.shape
    ((100, 200, 300), (3,))

    Args:
        name: ``experiment/optimizer/seed``.
        storage: the database's file or URL, as for :func:`run`.

    Raises:
        StudySpecError: an argument is of another type.
        StudyStoreError: there is no such study, or the database cannot be read.
    """
    check_options(load_study, {"name": name}, source="lcsc_opt.load_study", positional=("storage",))
    url = storage_url(storage)
    with reading(url) as opened:
        StoredStudy.open(opened, name)  # raises now, and not at the first use of the study
    return Study(name, url)


def load_objective(study_file: str | Path | Mapping[str, Any]) -> Objective:
    """The objective of a study file, as for :func:`run`: ``objective(coefficients) -> float``, lower is better.

    It takes ``[K]`` coefficients, also where the study file asks for ``rows``: for ``[S, K]``, see
    :attr:`Study.objective`.

    Raises:
        LcscError: the study file is wrong, or its objective cannot be built.
    """
    read, directory = _read(study_file)
    files = files_directory(storage_url(None, read.storage))
    return loading.load_objective(read.objective, BuildContext(directory, files=files))


def compare(experiment: str, storage: str | Path | None = None) -> list[dict[str, Any]]:
    """The results of an experiment's studies, a row each, for people and for ``pandas.DataFrame``.

    >>> import lcsc_opt
    >>> norm = {"file": "function.py", "settings": {"callable": "numpy.linalg:norm", "steps": [100, 200, 300]}}
    >>> budget = {"evaluations": 5}
    >>> _ = lcsc_opt.run({"name": "norm", "objective": norm, "optimizers": ["CMA", "LCSC"], "budget": budget})
    >>> [(row["optimizer"], row["evaluations"]) for row in lcsc_opt.compare("norm")]
    [('CMA', 5), ('LCSC', 5)]

    Args:
        experiment: the name in the study file.
        storage: the database's file or URL, as for :func:`run`.

    Returns:
        What ``lcsc compare --format json`` prints: ``study``, ``optimizer``, ``seed``, ``state``, ``maximized``,
        ``searched`` and ``held_out`` (losses; scores where ``maximized`` is true), ``held_out_images`` (how many images
        ``held_out`` is from), ``evaluations``, ``images``, ``seconds``, ``sampler`` (how the report's images were
        sampled), ``held_out_rows`` (the loss and other metrics, each compared with EMA*'s). Once there is a
        report, the last row is the answer: its ``optimizer`` is ``answer``, its ``study`` the experiment, its rows are
        compared with the best that was there before; it also has ``model`` and ``warnings``.

    Raises:
        StudySpecError: an argument is of another type.
        StudyStoreError: there is no such experiment, or the database cannot be read.
    """
    check_options(compare, {"experiment": experiment}, source="lcsc_opt.compare", positional=("storage",))
    with reading(storage_url(storage)) as opened:
        return comparison_rows(HistoryReader(opened).read(experiment))


def _read(study_file: str | Path | Mapping[str, Any]) -> tuple[StudyFile, Path]:
    """The study file, and its folder; of one from Python, the working folder.

    Raises:
        StudySpecError: there is no such file, or it is wrong.
    """
    if isinstance(study_file, Mapping):
        return parse_study_file(study_file, source="study"), Path.cwd()
    if not isinstance(study_file, (str, Path)):
        raise StudySpecError(f"study_file: expected its name, its path or its contents, got {excerpt(study_file)}")
    path = find("studies", str(study_file))
    return read_study_file(path), path.absolute().parent


def _row(trial: FrozenTrial, sign: int) -> dict[str, Any]:
    """A row of :attr:`Study.trials`; ``sign`` is the study's. A trial that runs has no cost yet."""
    attributes = trial.user_attrs
    cost = attributes.get("cost") or {}
    return {
        "number": trial.number,
        "state": trial.state.name,
        "loss": as_known(trial.value, sign),
        "coefficients": coefficients_of(trial).tolist() if has_coefficients(trial) else None,
        "metrics": attributes.get("metrics"),
        "images": cost.get("images"),
        "seconds": cost.get("seconds"),
        "reason": attributes.get("reason"),
    }
