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

from lcsc_opt.base.catalog import find
from lcsc_opt.base.code import module_file
from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.files import only_process, replacing
from lcsc_opt.base.paths import MANIFEST, WEIGHTS, KnownCheckpoints, cache_directory
from lcsc_opt.base.progress import notice
from lcsc_opt.base.reproducibility import environment
from lcsc_opt.base.study_file import ObjectiveSpec
from lcsc_opt.coefficients.layer_groups import Rule
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.loading import load_objective

if TYPE_CHECKING:  # with torch, it would be most of the time that a worker takes to start
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
        known: the identity of its checkpoints.
        manifest: the content of its manifest now, so that checkpoints that are appended later do not matter.
        size: bytes of its weights.
        node: Ray's id of the coordinator's machine, which reads them for others.
    """

    path: Path
    in_cache: Path
    known: KnownCheckpoints
    manifest: bytes
    size: int
    node: str = ""

    @classmethod
    def of(cls, trajectory: Trajectory) -> PackedTrajectory:
        """Describe an open trajectory."""
        path, cache = trajectory.path.resolve(), cache_directory().resolve()
        own = Path("trajectories", f"{trajectory.sha256[:24]}.trajectory")
        place = path.relative_to(cache) if path.is_relative_to(cache) else own
        known = KnownCheckpoints(trajectory.sha256, trajectory.steps)
        return cls(path, place, known, (path / MANIFEST).read_bytes(), (path / WEIGHTS).stat().st_size)

    def found(self) -> Path:
        """The trajectory's path on this machine: the same path, or one in the cache. If it is missing, it is fetched.

        Raises:
            StudySpecError: it cannot be written there.
            TrajectoryError: the fetched files are damaged.
        """
        from lcsc_opt.trajectory import Trajectory

        cached = cache_directory() / self.in_cache
        for path in (self.path, cached):
            if Trajectory.holding(path, self.known) is not None:
                return path
        with only_process(cached):  # another worker on this machine fetches it: wait
            if Trajectory.holding(cached, self.known) is not None:
                return cached
            notice(f"fetching the trajectory ({self.size / 1e6:,.0f} MB) to {cached}")
            ray, scheduling = map(importlib.import_module, ("ray", "ray.util.scheduling_strategies"))
            there = scheduling.NodeAffinitySchedulingStrategy(self.node, soft=False)
            read = ray.remote(_read).options(num_cpus=0, scheduling_strategy=there)
            try:
                with replacing(cached) as pending:
                    pending.mkdir()
                    with (pending / WEIGHTS).open("xb") as file:
                        for start in range(0, self.size, _PIECE_BYTES):
                            length = min(_PIECE_BYTES, self.size - start)
                            file.write(ray.get(read.remote(self.path / WEIGHTS, start, length)))
                    (pending / MANIFEST).write_bytes(self.manifest)
                    Trajectory.open(pending, steps=self.known.steps).verify()
            except OSError as error:
                raise StudySpecError(f"the trajectory cannot be fetched to {cached}: {error.strerror}") from error
        return cached


@dataclasses.dataclass(frozen=True)
class NodeObjective:
    """Loads a study's objective on a machine of the cluster, where its code has arrived; picklable.

    Attributes:
        spec: of the objective.
        study: the study file's folder on the coordinator.
        here: the working directory of the coordinator.
        own: the objective's file on the coordinator; ``None`` if it belongs to the library.
        software: of the coordinator.
        packed: the objective's trajectory; ``None`` without one.
        rows: how layers are divided into groups with coefficients of their own.
    """

    spec: ObjectiveSpec
    study: Path | None
    here: Path
    own: Path | None
    software: dict[str, Any]
    packed: PackedTrajectory | None
    rows: Rule | None

    @classmethod
    def collect(cls, spec: ObjectiveSpec, study: Path | None, objective: Objective, copies: Path) -> NodeObjective:
        """Copy the user's own code into the empty folder ``copies``; ``study`` is the study's folder."""
        from lcsc_opt.trajectory import Trajectory

        file = find("objectives", spec.file, beside=study)
        own = file if file.name in objective.code else None
        for name in objective.code:
            path = file if name == file.name else module_file(name)
            if path is None:
                continue
            place = copies / name if path == file else copies.joinpath(*name.split(".")).with_suffix(".py")
            place = place.with_suffix("") / path.name if path.name == "__init__.py" else place
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
        trajectory, groups = objective.trajectory, objective.layer_groups
        packed = PackedTrajectory.of(trajectory) if isinstance(trajectory, Trajectory) else None
        rule = None if groups is None else groups.rule
        return cls(spec, None if study is None else study.resolve(), Path.cwd(), own, _software(), packed, rule)

    def __call__(self) -> Objective:
        """Load it, in the process's first working directory, which has the copies.

        Raises:
            StudySpecError: this machine has other software than the coordinator, which would change results.
            LcscError: the objective cannot be loaded.
        """
        wanted = self.software
        found = {name: here for name, here in _software().items() if here != wanted.get(name)}
        if set(found.get("blas", ())) <= set(wanted["blas"]):  # the coordinator may have loaded more of them
            found.pop("blas", None)
        if others := ", ".join(f"{name} {here}, not {wanted.get(name)}" for name, here in found.items()):
            raise StudySpecError(f"has other software than the coordinator: {others}; install the same there")
        packed, spec, copies = self.packed, self.spec, Path.cwd()
        known = None if packed is None else dataclasses.replace(packed.known, packed=packed.found())
        if self.own is not None and (copy := copies / self.own.name).is_file():  # a program's own connection sends none
            spec = spec.model_copy(update={"file": str(copy)})
        sys.path.append(str(copies))
        if self.here.is_dir():  # on a shared file system, paths in settings mean the same files
            os.chdir(self.here)
        try:
            return load_objective(spec, beside=self.study, checkpoints=known, rows=self.rows)
        finally:
            os.chdir(copies)


def _software() -> dict[str, Any]:
    """JSON-able: versions, BLAS, and a digest of this library's own code, which may change without its version."""
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    here = environment()
    code = digest.hexdigest()[:12]
    return {**here["packages"], "machine": here["machine"], "blas": here["blas"], "lcsc_opt's code": code}
