"""A study's objective on a machine of a cluster, which has the same software and sees the same files.

The user's own code, which is the objective's file and the modules that this imports, comes with the job.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from lcsc_opt.base.errors import StudySpecError, TrajectoryError
from lcsc_opt.base.files import same_working_folder
from lcsc_opt.base.paths import BuildContext, KnownCheckpoints
from lcsc_opt.base.reproducibility import environment
from lcsc_opt.base.study_spec import ObjectiveSpec, Rule
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.loading import load_objective


@dataclasses.dataclass(frozen=True)
class NodeObjective:
    """Loads a study's objective on a machine of the cluster, where its code has arrived; picklable.

    Attributes:
        spec: the specification of the objective.
        context: where its files are on the coordinator, and the checkpoints of its trajectory, with their path there.
        working_directory: the working directory of the coordinator.
        objective_file: on the coordinator; ``None`` if it belongs to the library.
        software: the software of the coordinator.
        rows: how layers are divided into groups with coefficients of their own.
        layout: of the network's weights, which the search has chosen.
    """

    spec: ObjectiveSpec
    context: BuildContext
    working_directory: Path
    objective_file: Path | None
    software: dict[str, Any]
    rows: Rule | None
    layout: str

    @classmethod
    def collect(cls, spec: ObjectiveSpec, context: BuildContext, objective: Objective, copies: Path) -> NodeObjective:
        """Copy the user's own code into the empty folder ``copies``; ``context`` is that of the study."""
        from lcsc_opt.trajectory import Trajectory

        objective_file = None
        for name, file in objective.code.items():
            if name == file.path.name:  # the objective's own file; modules have names without a suffix
                objective_file = file.path
                shutil.copyfile(file.path, copies / name)
            else:
                _copy_module(name, file.path, copies)
        checkpoints = None
        trajectory = objective.trajectory
        if isinstance(trajectory, Trajectory):
            checkpoints = KnownCheckpoints(trajectory.sha256, trajectory.steps, packed=trajectory.path.resolve())
        directory = None if context.directory is None else context.directory.resolve()
        return cls(
            spec=spec,
            context=BuildContext(directory, checkpoints, files=context.files.absolute()),
            working_directory=Path.cwd(),
            objective_file=objective_file,
            software=_software(),
            rows=objective.row_rule,
            layout=objective.layout,
        )

    def __call__(self) -> Objective:
        """Load it, in the process's first working directory, which has the copies.

        Raises:
            StudySpecError: this machine has other software than the coordinator, which would change results.
            TrajectoryError: the trajectory is not at its path here.
            LcscError: the objective cannot be loaded.
        """
        self._check_software()
        self._check_trajectory()
        copies = Path.cwd()
        spec = self.spec
        if self.objective_file is not None:
            copy = copies / self.objective_file.name
            if copy.is_file():  # a program that was connected to Ray before has sent none
                spec = spec.model_copy(update={"file": str(copy)})
        sys.path.append(str(copies))
        with same_working_folder():
            if self.working_directory.is_dir():  # on a shared file system, paths in settings mean the same files
                os.chdir(self.working_directory)
            return load_objective(spec, self.context, rows=self.rows, layout=self.layout)

    def _check_trajectory(self) -> None:
        checkpoints = self.context.checkpoints
        if checkpoints is None or checkpoints.packed is None:
            return
        from lcsc_opt.trajectory import Trajectory  # with torch, whose import would take most of a worker's start

        if Trajectory.holding(checkpoints.packed, checkpoints) is None:
            raise TrajectoryError(
                f"has no {checkpoints.packed} with the checkpoints of the search; "
                "put it, or the study's database, on a file system that all nodes share"
            )

    def _check_software(self) -> None:
        differences = []
        for name, version in _software().items():
            expected = self.software.get(name)
            if version == expected:
                continue
            if name == "blas" and set(version) <= set(expected or ()):  # the coordinator may have loaded more of them
                continue
            differences.append(f"{name} {version}, not {expected}")
        if differences:
            raise StudySpecError(
                f"has other software than the coordinator: {', '.join(differences)}; install the same there"
            )


def _copy_module(name: str, path: Path, copies: Path) -> None:
    """Copy a module, with the folders of its packages."""
    module = copies.joinpath(*name.split("."))
    copy = module / path.name if path.name == "__init__.py" else module.with_suffix(".py")
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, copy)


def _software() -> dict[str, Any]:
    """What must be the same on all machines, as JSON: packages, kind of processor, BLAS."""
    current = environment()
    return {**current["packages"], "machine": current["machine"], "blas": current["blas"]}
