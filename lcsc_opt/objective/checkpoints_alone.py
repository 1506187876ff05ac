"""The checkpoints of a study whose functions only another process has: they can be merged, and nothing is scored."""

from __future__ import annotations

from typing import Any

from lcsc_opt.base.catalog import find, load_file
from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.live_code import LIVE
from lcsc_opt.base.paths import BuildContext
from lcsc_opt.base.records import Candidate, Evaluation
from lcsc_opt.base.settings import parse_settings
from lcsc_opt.base.study_file import ObjectiveSpec
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.settings import CheckpointSettings, ImageObjectiveSettings
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
        raise ObjectiveError("only the process that called lcsc_opt.search has the functions of this study")

    def describe(self) -> dict[str, Any]:
        """The trajectory's hash."""
        return {"trajectory": self.trajectory.sha256}

    @classmethod
    def of(cls, spec: ObjectiveSpec, context: BuildContext) -> CheckpointsAlone | None:
        """The checkpoints, if functions of the objective were handed to :func:`lcsc_opt.search` as objects.

        Args:
            spec: the objective's file and settings, one of which then begins with :data:`LIVE`.
            context: has the checkpoints that the study was begun with, and no functions.

        Returns:
            ``None`` if all functions can be imported; or if statistics of batch normalization belong to the merged
            model, which only the functions can estimate.

        Raises:
            TrajectoryError: the checkpoints are gone, or are others.
        """
        if not any(isinstance(value, str) and value.startswith(LIVE) for value in spec.settings.values()):
            return None
        settings_class = load_file(find("objectives", spec.file, study_folder=context.directory)).Settings
        settings: CheckpointSettings = parse_settings(settings_class, dict(spec.settings), source="objective.settings")
        trajectory = settings.trajectory(context)
        if getattr(settings, "batch_norm", None) is not None:
            return None
        if isinstance(settings, ImageObjectiveSettings) and any(
            name.endswith("running_var") for name in trajectory.varying
        ):
            return None
        return cls(trajectory)
