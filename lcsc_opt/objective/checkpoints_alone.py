"""The checkpoints of an experiment without its model, functions and data: they can be merged, and nothing is scored."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcsc_opt.base.catalog import find, load_file
from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.paths import BuildContext, KnownCheckpoints
from lcsc_opt.base.records import Candidate, Evaluation
from lcsc_opt.base.settings import parse_settings
from lcsc_opt.base.study_spec import ObjectiveSpec
from lcsc_opt.checkpoints.finding import Selection
from lcsc_opt.checkpoints.weights import Renaming
from lcsc_opt.coefficients.layer_groups import Rule
from lcsc_opt.database.states import Attributes
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.loading import make_importable
from lcsc_opt.objective.of_study import patterns_in
from lcsc_opt.trajectory import Trajectory
from lcsc_opt.trajectory.continuing import changes_at, find_packed
from lcsc_opt.trajectory.packing import open_request
from lcsc_opt.trajectory.sources import PackRequest


class CheckpointsAlone(Objective):
    """Merges as the study's objective does; evaluations are refused.

    Args:
        trajectory: K checkpoints.
    """

    trajectory: Trajectory

    def __init__(self, trajectory: Trajectory) -> None:
        self.trajectory = trajectory

    @property
    def steps(self) -> tuple[int, ...]:
        """``[K]`` training steps of the trajectory."""
        return self.trajectory.steps

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
            rows: in which they are merged.
            files: the folder beside the database.

        Returns:
            ``None`` where only the whole objective can merge: it names no checkpoints, or statistics of batch
            normalization are estimated for each merge.

        Raises:
            TrajectoryError: the checkpoints are gone, or are others.
        """
        context = _context(experiment, files)
        if context is None or context.checkpoints is None:
            return None
        spec = ObjectiveSpec(**experiment["objective"])
        request = _request(spec.settings, context)
        if request is not None:
            trajectory = open_request(request)
            named = spec.settings.get("trainer_ema")
            if isinstance(named, str):
                path = context.path(named)
                trajectory.trainer_ema_at = path if path.exists() else named
        else:
            packed = find_packed(context.files, context.checkpoints)
            if packed is None:
                return None
            trajectory = packed
        has_statistics = any(name.endswith("running_var") for name in trajectory.varying)
        if has_statistics and not _merges_statistics(spec, context):
            return None
        names = experiment["problem"]["decides"]["objective"].get("names")
        alone = cls(trajectory.renamed(Renaming(*names)) if names else trajectory)
        if rows is not None:
            alone.merge_in_rows(rows)
        return alone


def checkpoints_written_again(experiment: Attributes, files: Path) -> bool:
    """Whether the files of an experiment's checkpoints are others by now, by their sizes and times."""
    context = _context(experiment, files)
    if context is None or context.checkpoints is None:
        return False
    request = _request(experiment["objective"]["settings"], context)
    return request is not None and changes_at(request, context.checkpoints).written_again


def _context(experiment: Attributes, files: Path) -> BuildContext | None:
    """Where an experiment's checkpoints are looked for; ``None`` for one without."""
    if not experiment["checkpoints"]:
        return None
    directory = None
    if experiment["directory"] is not None:
        directory = Path(experiment["directory"])
    checkpoints = KnownCheckpoints(experiment["checkpoints"], tuple(experiment["steps"]))
    return BuildContext(directory, checkpoints, files=files, places=experiment["places"])


def _request(settings: Mapping[str, Any], context: BuildContext) -> PackRequest | None:
    """The request for the setting ``checkpoints``; ``None`` for an objective without it."""
    patterns = patterns_in(settings)
    if not patterns:
        return None
    return PackRequest(
        patterns=[context.path(pattern) for pattern in patterns],
        folder=context.files,
        key=settings.get("key"),
        selection=Selection(**settings.get("select", {})),
        steps=settings.get("steps"),
        dtype=settings.get("stored"),
        study_checkpoints=context.checkpoints,
    )


def _merges_statistics(spec: ObjectiveSpec, context: BuildContext) -> bool:
    """Whether an objective merges the statistics of batch normalization as it merges weights."""
    make_importable(context.directory)
    module = load_file(find("objectives", spec.file, study_folder=context.directory))
    settings_class: Any = getattr(module, "Settings", None)
    if not hasattr(settings_class, "merges_statistics"):
        return False
    settings: Any = parse_settings(settings_class, dict(spec.settings), source="objective.settings")
    return bool(settings.merges_statistics)
