"""The checkpoints of an experiment without its model, functions and data: they can be merged, and nothing is scored."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcsc_opt.base.catalog import find, load_file
from lcsc_opt.base.errors import ObjectiveError, StudySpecError
from lcsc_opt.base.paths import BuildContext, KnownCheckpoints
from lcsc_opt.base.records import Candidate, Evaluation
from lcsc_opt.base.settings import parse_settings
from lcsc_opt.base.study_spec import ObjectiveSpec, Rule
from lcsc_opt.checkpoints.weights import Renaming, varying_statistics
from lcsc_opt.database.states import Attributes
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.loading import make_importable
from lcsc_opt.objective.settings import CheckpointSettings
from lcsc_opt.sampling.network import NetworkSettings
from lcsc_opt.trajectory import Trajectory
from lcsc_opt.trajectory.continuing import Changes, changes_at, find_packed


class CheckpointsAlone(Objective):
    """Merges as the study's objective does; evaluations are refused.

    Args:
        trajectory: K checkpoints.
    """

    trajectory: Trajectory

    def __init__(self, trajectory: Trajectory) -> None:
        self.trajectory = trajectory

    def evaluate(self, candidate: Candidate) -> Evaluation:  # noqa: ARG002 - refused
        """Raise an error.

        Raises:
            ObjectiveError: always.
        """
        raise ObjectiveError("only the checkpoints of this experiment were loaded, which cannot be scored")

    def describe(self) -> dict[str, Any]:
        """The trajectory's hash."""
        return {"trajectory": self.trajectory.sha256}

    @classmethod
    def of(cls, experiment: Attributes, rows: Rule | None, files: Path) -> CheckpointsAlone | None:
        """The checkpoints that an experiment was begun with, where nothing but they and its record is needed to merge.

        The objective's file is run only for checkpoints with batch normalization, to read one of its settings.

        Args:
            experiment: its attributes.
            rows: how layers are divided into groups with coefficients of their own; ``None`` for one row of all.
            files: the folder beside the database.

        Returns:
            ``None`` where only the whole objective can merge: it names no checkpoints, or statistics of batch
            normalization are estimated for each merge.

        Raises:
            TrajectoryError: the checkpoints are gone, or are others.
        """
        context = stored_context(experiment, files)
        if context.checkpoints is None:
            return None
        spec = ObjectiveSpec(**experiment["objective"])
        settings = _checkpoint_settings(spec.settings)
        trajectory: Trajectory | None
        if settings is not None:
            trajectory = settings.trajectory(context)
        else:
            trajectory = find_packed(context.files, context.checkpoints)
        if trajectory is None:
            return None
        if varying_statistics(trajectory.names, trajectory.varying) and not _merges_statistics(spec, context):
            return None
        names = experiment["renaming"]  # as the network renamed the files' tensors
        alone = cls(trajectory.renamed(Renaming(*names)) if names else trajectory)
        if rows is not None:
            alone.merge_in_rows(rows)
        return alone


def checkpoint_changes(experiment: Attributes, files: Path) -> Changes:
    """What has changed of the files of an experiment's checkpoints, by their sizes and times; none is read."""
    context = stored_context(experiment, files)
    if context.checkpoints is None:
        return Changes()
    settings = _checkpoint_settings(experiment["objective"]["settings"])
    if settings is None:
        return Changes()
    return changes_at(settings.pack_request(context), context.checkpoints)


def stored_context(experiment: Attributes, files: Path) -> BuildContext:
    """Where a stored experiment found its files, and its checkpoints, if its objective merges any."""
    directory = None
    if experiment["directory"] is not None:
        directory = Path(experiment["directory"])
    checkpoints = None
    if experiment["checkpoints"]:
        checkpoints = KnownCheckpoints(experiment["checkpoints"], tuple(experiment["steps"]))
    return BuildContext(directory, checkpoints, files=files, places=experiment["places"])


def _checkpoint_settings(settings: Mapping[str, Any]) -> CheckpointSettings | None:
    """The settings that say which checkpoints are merged, without those that say how the network runs.

    ``None`` for a user's own objective that has none of them, or means something else by their names.
    """
    names = CheckpointSettings.model_fields.keys() - NetworkSettings.model_fields.keys()
    named = {name: value for name, value in settings.items() if name in names}
    try:
        return parse_settings(CheckpointSettings, named, source="objective.settings")
    except StudySpecError:
        return None


def _merges_statistics(spec: ObjectiveSpec, context: BuildContext) -> bool:
    """Whether an objective merges the statistics of batch normalization as it merges weights."""
    make_importable(context.directory)
    module = load_file(find("objectives", spec.file, study_folder=context.directory))
    settings_class: Any = getattr(module, "Settings", None)
    if not hasattr(settings_class, "merges_statistics"):
        return False
    settings: Any = parse_settings(settings_class, dict(spec.settings), source="objective.settings")
    return bool(settings.merges_statistics)
