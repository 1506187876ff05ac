"""What a machine of a cluster needs before it evaluates: the same software, the user's own code, the trajectory.

The user's own code is the objective's file and the modules that this imports, which are sent with the job.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcsc_opt.base.errors import StudySpecError, TrajectoryError
from lcsc_opt.base.files import only_process, replacing
from lcsc_opt.base.paths import MANIFEST, WEIGHTS, KnownCheckpoints, cache_directory
from lcsc_opt.base.progress import notice
from lcsc_opt.base.reproducibility import environment
from lcsc_opt.base.study_file import ObjectiveSpec
from lcsc_opt.coefficients.layer_groups import Rule
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.loading import load_objective

if TYPE_CHECKING:  # with torch, whose import would take most of a worker's start
    from lcsc_opt.trajectory import Trajectory

_PIECE_BYTES = 16 * 2**20  # of a trajectory, fetched at once


def _read(path: Path, offset: int, length: int) -> bytes:
    """A piece of a file, read on the coordinator's machine for another one."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(length)


@dataclasses.dataclass(frozen=True)
class PackedTrajectory:
    """The packed trajectory of the coordinator.

    Attributes:
        path: the trajectory on the coordinator's machine.
        in_cache: its path inside the cache folder, on the coordinator and on other machines.
        checkpoints: their identity.
        manifest: the content of its manifest now, so that checkpoints that are appended later do not matter.
        sizes: the files of its weights, name → bytes.
        node: Ray's id of the coordinator's machine, which reads them for others.
    """

    path: Path
    in_cache: Path
    checkpoints: KnownCheckpoints
    manifest: bytes
    sizes: dict[str, int]
    node: str = ""

    @classmethod
    def of(cls, trajectory: Trajectory) -> PackedTrajectory:
        """Describe an open trajectory."""
        path = trajectory.path.resolve()
        cache = cache_directory().resolve()
        if path.is_relative_to(cache):
            in_cache = path.relative_to(cache)
        else:
            in_cache = Path("trajectories", f"{trajectory.sha256[:24]}.trajectory")
        return cls(
            path=path,
            in_cache=in_cache,
            checkpoints=KnownCheckpoints(trajectory.sha256, trajectory.steps),
            manifest=(path / MANIFEST).read_bytes(),
            sizes={WEIGHTS: (path / WEIGHTS).stat().st_size},
        )

    def on_this_machine(self) -> Path:
        """The trajectory's path here: the coordinator's path, or one in the cache, where it is fetched if necessary.

        Raises:
            TrajectoryError: it cannot be written there, or the fetched files are damaged.
        """
        from lcsc_opt.trajectory import Trajectory

        cached = cache_directory() / self.in_cache
        for path in (self.path, cached):  # machines that share a disk see the coordinator's path
            if Trajectory.holding(path, self.checkpoints) is not None:
                return path
        with only_process(cached):
            # another worker of this machine may have fetched it while this one waited for the lock
            if Trajectory.holding(cached, self.checkpoints) is None:
                self._fetch(cached)
        return cached

    def _fetch(self, cached: Path) -> None:
        """Copy the trajectory from the coordinator's machine, in pieces, and check it."""
        from lcsc_opt.trajectory import Trajectory

        notice(f"fetching the trajectory ({sum(self.sizes.values()) / 1e6:,.0f} MB) to {cached}")
        ray = importlib.import_module("ray")
        scheduling = importlib.import_module("ray.util.scheduling_strategies")
        on_coordinator = scheduling.NodeAffinitySchedulingStrategy(self.node, soft=False)
        read = ray.remote(_read).options(num_cpus=0, scheduling_strategy=on_coordinator)
        try:
            with replacing(cached) as pending:
                pending.mkdir()
                for name, size in self.sizes.items():
                    with (pending / name).open("xb") as file:
                        for start in range(0, size, _PIECE_BYTES):
                            length = min(_PIECE_BYTES, size - start)
                            file.write(ray.get(read.remote(self.path / name, start, length)))
                (pending / MANIFEST).write_bytes(self.manifest)
                Trajectory.open(pending, steps=self.checkpoints.steps).verify()
        except OSError as error:
            reason = error.strerror or error
            raise TrajectoryError(f"The trajectory cannot be fetched to {cached}: {reason}.") from error


@dataclasses.dataclass(frozen=True)
class NodeObjective:
    """Loads a study's objective on a machine of the cluster, where its code has arrived; picklable.

    Attributes:
        spec: the specification of the objective.
        study_directory: the study file's folder on the coordinator.
        working_directory: the working directory of the coordinator.
        objective_file: on the coordinator; ``None`` if it belongs to the library.
        software: the software of the coordinator.
        packed: the objective's trajectory; ``None`` without one.
        rows: how layers are divided into groups with coefficients of their own.
    """

    spec: ObjectiveSpec
    study_directory: Path | None
    working_directory: Path
    objective_file: Path | None
    software: dict[str, Any]
    packed: PackedTrajectory | None
    rows: Rule | None

    @classmethod
    def collect(
        cls,
        spec: ObjectiveSpec,
        study: Path | None,
        objective: Objective,
        copies: Path,
    ) -> NodeObjective:
        """Copy the user's own code into the empty folder ``copies``; ``study`` is the study's folder."""
        from lcsc_opt.trajectory import Trajectory

        objective_file = None
        for name, file in objective.code.items():
            if name == file.path.name:  # modules have names without a suffix
                objective_file = file.path
                shutil.copyfile(file.path, copies / name)
            else:
                _copy_module(name, file.path, copies)
        packed = None
        if isinstance(objective.trajectory, Trajectory):
            packed = PackedTrajectory.of(objective.trajectory)
        groups = objective.layer_groups
        return cls(
            spec=spec,
            study_directory=None if study is None else study.resolve(),
            working_directory=Path.cwd(),
            objective_file=objective_file,
            software=_software(),
            packed=packed,
            rows=None if groups is None else groups.rule,
        )

    def __call__(self) -> Objective:
        """Load it, in the process's first working directory, which has the copies.

        Raises:
            StudySpecError: this machine has other software than the coordinator, which would change results.
            LcscError: the objective cannot be loaded.
        """
        self._check_software()
        checkpoints = None
        if self.packed is not None:
            checkpoints = dataclasses.replace(self.packed.checkpoints, packed=self.packed.on_this_machine())
        copies = Path.cwd()
        spec = self.spec
        if self.objective_file is not None:
            copy = copies / self.objective_file.name
            if copy.is_file():  # a program that was connected to Ray before has sent none
                spec = spec.model_copy(update={"file": str(copy)})
        sys.path.append(str(copies))
        if self.working_directory.is_dir():  # on a shared file system, paths in settings mean the same files
            os.chdir(self.working_directory)
        try:
            return load_objective(
                spec,
                study_folder=self.study_directory,
                checkpoints=checkpoints,
                rows=self.rows,
                files=cache_directory(),
            )
        finally:
            os.chdir(copies)

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
    """JSON-able: versions, BLAS, and a digest of this library's own code, which may change without its version."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    current = environment()
    return {
        **current["packages"],
        "machine": current["machine"],
        "blas": current["blas"],
        "lcsc_opt's code": digest.hexdigest()[:12],
    }
