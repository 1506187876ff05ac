"""The checkpoints of a study without its model, functions and data: they can be merged, and nothing is scored."""

from __future__ import annotations

from typing import Any

from lcsc_opt.base.catalog import find, load_file
from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.paths import BuildContext
from lcsc_opt.base.records import Candidate, Evaluation
from lcsc_opt.base.settings import parse_settings
from lcsc_opt.base.study_file import ObjectiveSpec
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.loading import make_importable
from lcsc_opt.objective.settings import CheckpointSettings
from lcsc_opt.trajectory import Trajectory


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

    def evaluate(self, candidate: Candidate, *, gradient: bool = False) -> Evaluation:  # noqa: ARG002 - refused
        """Raise an error.

        Raises:
            ObjectiveError: always.
        """
        raise ObjectiveError("only the checkpoints of this study were loaded, which cannot be scored")

    def describe(self) -> dict[str, Any]:
        """The trajectory's hash."""
        return {"trajectory": self.trajectory.sha256}

    @classmethod
    def of(cls, spec: ObjectiveSpec, context: BuildContext) -> CheckpointsAlone | None:
        """The checkpoints, if nothing else of the objective is needed to merge them.

        Args:
            spec: the objective's file and settings.
            context: has the checkpoints that the study was begun with, and no functions.

        Returns:
            ``None`` where only the whole objective can merge.

        Raises:
            TrajectoryError: the checkpoints are gone, or are others.
        """
        make_importable(context.directory)
        module = load_file(find("objectives", spec.file, study_folder=context.directory))
        settings_class = getattr(module, "Settings", None)
        if not (isinstance(settings_class, type) and issubclass(settings_class, CheckpointSettings)):
            return None
        settings = parse_settings(settings_class, dict(spec.settings), source="objective.settings")
        trajectory = settings.trajectory_alone(context)
        return None if trajectory is None else cls(trajectory)
