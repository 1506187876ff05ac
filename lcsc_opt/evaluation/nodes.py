"""What a machine of a cluster does before it evaluates: it compares its software, and gets the trajectory."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lcsc_opt.base.code import library_sha256
from lcsc_opt.base.errors import LcscError, StudySpecError
from lcsc_opt.base.files import only_process, replacing
from lcsc_opt.base.paths import KnownCheckpoints, cache_directory
from lcsc_opt.base.progress import notice
from lcsc_opt.base.reproducibility import describe_difference, environment
from lcsc_opt.base.study_file import ObjectiveSpec
from lcsc_opt.checkpoints.names import MANIFEST, REFERENCE, WEIGHTS
from lcsc_opt.evaluation.travelling import Travelling
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.loading import check_objective, load_objective
from lcsc_opt.trajectory import Trajectory
from lcsc_opt.trajectory.opening import part_of

PIECE_BYTES = 16 * 2**20  # of a trajectory, fetched at once

Read = Callable[[str, int, int], bytes]
"""Name of a file of the trajectory, offset, and length → those bytes, read at the coordinator; picklable."""


@dataclasses.dataclass(frozen=True)
class Packed:
    """The packed trajectory of the coordinator.

    Attributes:
        path: the trajectory on the coordinator's machine.
        in_cache: its path inside the cache folder, on the coordinator and on other machines.
        sha256: the identity of its checkpoints.
        steps: ``[K]`` of training.
        manifest: the content of its manifest now, so that checkpoints that are appended later do not matter.
        sizes: file → bytes, without the manifest.
    """

    path: Path
    in_cache: Path
    sha256: str
    steps: tuple[int, ...]
    manifest: bytes
    sizes: dict[str, int]

    @classmethod
    def of(cls, trajectory: Trajectory) -> Packed:
        """Describe an open trajectory."""
        path, cache = trajectory.path.resolve(), cache_directory().resolve()
        own = Path("trajectories", f"{trajectory.sha256[:24]}.trajectory")
        place = path.relative_to(cache) if path.is_relative_to(cache) else own
        sizes = {name: (path / name).stat().st_size for name in (WEIGHTS, REFERENCE) if (path / name).exists()}
        return cls(path, place, trajectory.sha256, trajectory.steps, (path / MANIFEST).read_bytes(), sizes)

    def found(self, read: Read) -> Path:
        """The trajectory's path on this machine: the same path, or one in the cache. If it is missing, it is fetched.

        Args:
            read: reads parts of its files on the coordinator.

        Raises:
            StudySpecError: there is no room for it.
            TrajectoryError: the fetched files are damaged.
        """
        known, cached = KnownCheckpoints(self.sha256, self.steps), cache_directory() / self.in_cache
        for path in (self.path, cached):
            if part_of(path, known) is not None:
                return path
        with only_process(cached, busy=lambda: None):  # a worker beside this one fetches it: wait
            if part_of(cached, known) is None:
                self._fetch(cached, read)
        return cached

    def _fetch(self, out: Path, read: Read) -> None:
        size, free = sum(self.sizes.values()), shutil.disk_usage(out.parent).free
        if size > free:
            raise StudySpecError(
                f"no room for the trajectory: {size / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free in {out.parent}; "
                "free some, or set LCSC_CACHE to another folder there"
            )
        notice(f"fetching the trajectory ({size / 1e6:,.0f} MB) to {out}")
        with replacing(out) as pending:
            pending.mkdir()
            for name, length in self.sizes.items():
                with (pending / name).open("xb") as file:
                    for start in range(0, length, PIECE_BYTES):
                        file.write(read(name, start, min(PIECE_BYTES, length - start)))
            (pending / MANIFEST).write_bytes(self.manifest)
            Trajectory.open(pending, steps=self.steps).verify()


@dataclasses.dataclass(frozen=True)
class NodeObjective:
    """Loads a study's objective on a machine of the cluster; picklable.

    Attributes:
        spec: of the objective.
        files: the study's own files.
        packed: its trajectory and what reads it; ``None`` without a trajectory.
        software: what :func:`software` gives on the coordinator.
    """

    spec: ObjectiveSpec
    files: Travelling
    packed: tuple[Packed, Read] | None
    software: dict[str, Any]

    def __call__(self) -> Objective:
        """Load it.

        Raises:
            StudySpecError: this machine has other software, or no room for the trajectory.
            LcscError: the objective cannot be loaded.
        """
        known = self._prepared()
        with self.files.arrived() as beside:
            return load_objective(self.spec, beside=beside, checkpoints=known)

    def check(self) -> LcscError | None:
        """Fetch what loading needs, and return the error that loading would raise, if it is known without a model."""
        try:
            known = self._prepared()
            with self.files.arrived() as beside:
                check_objective(self.spec, beside=beside, checkpoints=known)
        except LcscError as error:
            return error
        return None

    def _prepared(self) -> KnownCheckpoints | None:
        if difference := differences(self.software, software()):
            raise StudySpecError(f"has other software than the coordinator: {difference}; install the same there")
        if self.packed is None:
            return None
        packed, read = self.packed
        return KnownCheckpoints(packed.sha256, packed.steps, selected=True, packed=packed.found(read))


def software() -> dict[str, Any]:
    """JSON-able: versions, BLAS, and this library's own code."""
    return {**environment(), "lcsc_opt's code": library_sha256()[:12]}


def differences(coordinator: dict[str, Any], machine: dict[str, Any]) -> str:
    """The differences in software that would change results, in words; empty where there is none.

    The coordinator may have loaded more BLAS libraries than the machine.
    """
    other_blas = set(machine["blas"]) - set(coordinator["blas"])
    keys = ("packages", "machine", "lcsc_opt's code", *(["blas"] if other_blas else []))
    return describe_difference(*({key: known[key] for key in keys} for known in (coordinator, machine)))
