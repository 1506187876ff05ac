"""Reads the images that are stored with experiments, never from outside of the folder of artifacts."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import uuid
from pathlib import Path
from typing import Literal

import sqlalchemy as sa
from optuna.storages import RDBStorage

from lcsc_opt.base.labelled_grid import bands_of
from lcsc_opt.database.experiment import StoredExperiment
from lcsc_opt.database.measurement import Measurement
from lcsc_opt.database.report import Report
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.database.urls import sqlite_file

Shows = Literal["before", "answer", "found", "real"]
"""Who made images: the best that the user had, the answer, the best that was found where that is not the answer; or
nobody, since they are real."""
ROLES: tuple[Shows, ...] = ("before", "answer", "found", "real")
SAMPLES: dict[Shows, str] = {role: f"samples_{role}.png" for role in ROLES}
"""Samples as they come, from the same noise; and real images."""
FARTHEST: dict[Shows, str] = {role: f"images_{role}.png" for role in ROLES}
"""Of many samples, the pairs that differ most."""
GRID = "grid.png"  # of :mod:`lcsc_opt.base.labelled_grid`
_LARGEST_IMAGE = 32 * 2**20  # bytes
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclasses.dataclass(frozen=True)
class StoredImage:
    """One image, a PNG.

    Attributes:
        artifact_id: the name of its file in the folder of artifacts.
        caption: which model sampled it.
        content: the bytes of the file.
        shows: who made its images.
        selected: whether they are not the first ones, but those that differ most.
    """

    artifact_id: str
    caption: str
    content: bytes
    shows: Shows
    selected: bool

    @classmethod
    def of_experiment(cls, storage: RDBStorage, name: str, report: Report | None, folder: Path) -> list[StoredImage]:
        """The images of an experiment, samples as they come first; what :func:`read_png` refuses is left out."""
        if report is None:
            return []
        captions: dict[Shows, str] = {"real": "Real images"}
        for role, measured in pictured(report).items():
            captions[role] = f"{_TITLES[role]}: {measured.model.title}"
        samples = {SAMPLES[role]: role for role in captions}
        farthest = {FARTHEST[role]: role for role in pair_of(report)}
        images = []
        for artifact in StoredExperiment.open(storage, name).record.artifacts():
            filename = str(artifact.get("filename"))
            role_of_file = samples.get(filename) or farthest.get(filename)
            path = artifact_path(folder, artifact.get("artifact_id"))
            if role_of_file is None or path is None:
                continue
            content = read_png(path)
            if content is not None:
                selected = filename in farthest
                images.append(cls(path.name, captions[role_of_file], content, role_of_file, selected))
        return sorted(images, key=lambda image: (image.selected, ROLES.index(image.shows)))

    @property
    def version(self) -> str:
        """Tells it from an image of another report, which has the same name and ``artifact_id``."""
        return hashlib.sha256(self.content).hexdigest()[:16]

    @property
    def data_url(self) -> str:
        """The image as a ``data:`` URL, for a page that is one file."""
        return f"data:image/png;base64,{base64.b64encode(self.content).decode()}"


_TITLES: dict[Shows, str] = {
    "before": "The best you had",
    "answer": "The answer",
    "found": "The best that was found, not the answer",
}


def pictured(report: Report) -> dict[Shows, Measurement]:
    """The models of a report that have pictures, each once: the best that the user had, the answer, the best found."""
    models: dict[Shows, Measurement | None] = {
        "before": report.best_had(report.headline_metric),
        "answer": report.of_answer,
        "found": report.best_found,
    }
    return {
        role: measured
        for role, measured in models.items()
        if measured is not None and (role == "answer" or measured.model.name != report.answer)
    }


def pair_of(report: Report) -> tuple[Shows, ...]:
    """The two models whose images are compared one by one: before and after; after a veto, the answer and what was
    found; empty if the user had the only one.
    """
    models = pictured(report)
    if not report.is_found:
        return ("answer", "found") if "found" in models else ()
    return ("before", "answer") if "before" in models else ()


@dataclasses.dataclass(frozen=True)
class StoredGrid:
    """The picture that ``lcsc images`` stored with an experiment.

    Attributes:
        artifact_id: the name of its file in the folder of artifacts.
        content: the bytes of the file.
        titles: of its rows.
    """

    artifact_id: str
    content: bytes
    titles: tuple[str, ...]

    @classmethod
    def of_experiment(cls, storage: RDBStorage, name: str, folder: Path) -> StoredGrid | None:
        """The grid of an experiment; ``None`` if there is none."""
        for artifact in StoredExperiment.open(storage, name).record.artifacts():
            path = artifact_path(folder, artifact.get("artifact_id"))
            if artifact.get("filename") != GRID or path is None:
                continue
            content = read_png(path)
            if content is not None:
                return cls(path.name, content, tuple(row.title for row in bands_of(content)))
        return None

    @property
    def version(self) -> str:
        """Tells it from another picture of the experiment."""
        return hashlib.sha256(self.content).hexdigest()[:16]


def files_of(study: StoredStudy) -> list[Path]:
    """The study's files in the folder of artifacts, some of which may be missing."""
    folder = artifact_directory(study.storage.url)
    paths = [artifact_path(folder, artifact.get("artifact_id")) for artifact in study.artifacts()]
    return [path for path in paths if path is not None]


def artifact_directory(url: str) -> Path:
    """The artifacts folder of a study database: next to an SQLite file, else in the working directory."""
    file = sqlite_file(sa.make_url(url))
    if file is None:
        return Path("lcsc.artifacts")
    return file.with_suffix(".artifacts")


def artifact_path(folder: Path, artifact_id: object) -> Path | None:
    """The file of an artifact; ``None`` if the id is not a UUID, since a database could name any path."""
    try:
        canonical_id = str(uuid.UUID(str(artifact_id)))
    except ValueError:
        return None
    if canonical_id != artifact_id:  # in braces or capitals it is a UUID, too, and no name that we give
        return None
    return folder / canonical_id


def read_png(path: Path) -> bytes | None:
    """The bytes of a PNG; ``None`` for a missing file, a link, another kind of file, or one above 32 MiB."""
    try:
        if path.is_symlink() or path.stat().st_size > _LARGEST_IMAGE:
            return None
        content = path.read_bytes()
    except OSError:
        return None
    if content.startswith(_PNG_SIGNATURE):
        return content
    return None
