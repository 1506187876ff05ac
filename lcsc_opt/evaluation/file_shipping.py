"""What a machine of a cluster needs before it evaluates: the same software, the study's own files, its trajectory.

The study's own files are its objective, the modules that this imports, and files that the settings name. On a shared
file system, a machine sees the same files at the same paths and uses them. Elsewhere it uses copies that were sent with
the job.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from lcsc_opt.base.catalog import ORIGINALS, find
from lcsc_opt.base.code import module_file
from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.files import only_process, replacing
from lcsc_opt.base.paths import MANIFEST, WEIGHTS, KnownCheckpoints, cache_directory, given_path, study_directory
from lcsc_opt.base.progress import notice
from lcsc_opt.base.reproducibility import differences, environment
from lcsc_opt.base.study_file import ObjectiveSpec
from lcsc_opt.coefficients.layer_groups import Rule
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.loading import load_objective

if TYPE_CHECKING:  # with torch, it would be most of the time that a worker takes to start
    from lcsc_opt.trajectory import Trajectory

_MOST_BYTES = 100 * 2**20  # of data that settings name; larger data has to be on every machine
_PIECE_BYTES = 16 * 2**20  # of a trajectory, fetched at once
_CHECKPOINTS = "checkpoints"  # the setting whose files are sent in another way
_STUDY, _HERE = "lcsc-study", "lcsc-here"  # folders of the copies


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
    """Loads a study's objective on a machine of the cluster, where its files have arrived; picklable.

    Attributes:
        spec: of the objective.
        study: the study file's folder on the coordinator.
        here: the working directory of the coordinator.
        files: path among the copies → (path on the coordinator, SHA-256).
        own: the path of the objective's file among the copies; empty if it belongs to the library.
        software: of the coordinator.
        packed: the objective's trajectory; ``None`` without one.
        rows: how layers are divided into groups with coefficients of their own.
    """

    spec: ObjectiveSpec
    study: Path | None
    here: Path
    files: Mapping[str, tuple[Path, str]]
    own: str
    software: dict[str, Any]
    packed: PackedTrajectory | None
    rows: Rule | None

    @classmethod
    def collect(cls, spec: ObjectiveSpec, study: Path | None, objective: Objective, copies: Path) -> NodeObjective:
        """Copy the files that other machines need into the empty folder ``copies``; ``study`` is the study's folder."""
        from lcsc_opt.trajectory import Trajectory

        study, here = None if study is None else study.resolve(), Path.cwd()
        file = find("objectives", spec.file, beside=study)

        def place_of(path: Path) -> str:
            """Its path among the copies; empty if it is not in the study's or the working folder."""
            for folder, copied in ((study, _STUDY), (here, _HERE)):
                if folder is not None and path.is_relative_to(folder):
                    return str(PurePosixPath(copied, *path.relative_to(folder).parts))
            return ""

        with study_directory(study):
            data = [given_path(text) for name, v in spec.settings.items() if name != _CHECKPOINTS for text in _texts(v)]
        code = [file if name == file.name else module_file(name) for name in objective.code]
        found = {place_of(path.resolve()): path for path in (*code, *_small(data)) if path is not None}
        found.pop("", None)
        for place, path in found.items():
            (copies / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copies / place)
        files = {place: (path.resolve(), _sha256(path)) for place, path in found.items()}
        trajectory = objective.trajectory
        packed = PackedTrajectory.of(trajectory) if isinstance(trajectory, Trajectory) else None
        groups = objective.layer_groups
        rule, own = None if groups is None else groups.rule, place_of(file)
        return cls(spec, study, here, files, own if own in files else "", _software(), packed, rule)

    def __call__(self) -> Objective:
        """Load it.

        Raises:
            StudySpecError: this machine has other software than the coordinator, which would change results.
            LcscError: the objective cannot be loaded.
        """
        machine = _software()
        other_blas = set(machine["blas"]) - set(self.software["blas"])  # the coordinator may have loaded more of them
        keys = ("packages", "machine", "lcsc_opt's code", *(["blas"] if other_blas else []))
        before, now = ({key: known[key] for key in keys} for known in (self.software, machine))
        if found := "; ".join(differences(before, now)):
            raise StudySpecError(f"has other software than the coordinator: {found}; install the same there")
        packed = self.packed
        known = None if packed is None else dataclasses.replace(packed.known, packed=packed.found())
        with self._arrived() as beside:
            return load_objective(self.spec, beside=beside, checkpoints=known, rows=self.rows)

    @contextlib.contextmanager
    def _arrived(self) -> Iterator[Path | None]:
        """While this is open, the study's files are found on this machine. Yields the folder in place of the study's.

        Copies are below the working directory that the process was started in.
        """
        before = Path.cwd()
        study, here = self.study, self.here
        if not all(_sha256(original) == sha256 for original, sha256 in self.files.values()):
            here = before / (_STUDY if study == here else _HERE)
            here.mkdir(exist_ok=True)  # missing if none of its files were sent
            study = None if study is None else before / _STUDY
            if self.own:
                ORIGINALS[(before / self.own).resolve()] = self.files[self.own][0]
        if here.is_dir():
            os.chdir(here)
        try:
            yield study
        finally:
            os.chdir(before)


def _texts(value: Any) -> Iterator[str]:
    """Every text in a setting."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(part)


def _small(paths: Iterable[Path]) -> Iterator[Path]:
    """These files and the files in these folders, up to a total size; a folder that contains all others is left out."""
    left = _MOST_BYTES
    for path in paths:
        try:
            inside = path.is_dir() and not Path.cwd().is_relative_to(path.resolve())
            files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()] if inside else []
            size = sum(file.stat().st_size for file in files)
        except (OSError, ValueError):  # the text is no path
            continue
        if size <= left:
            left -= size
            yield from files


def _sha256(path: Path) -> str:
    """In hex; empty if the file cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def _software() -> dict[str, Any]:
    """JSON-able: versions, BLAS, and a digest of this library's own code, which may change without its version."""
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return {**environment(), "lcsc_opt's code": digest.hexdigest()[:12]}
