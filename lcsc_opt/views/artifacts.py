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

from lcsc_opt.database.experiment import StoredExperiment
from lcsc_opt.database.report import Report
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.database.urls import sqlite_file

# Samples as they come, from the same noise, and real images.
BEFORE_SAMPLES = "samples_1_before.png"  # of the best that the user had
ANSWER_SAMPLES = "samples_2_answer.png"
REAL_SAMPLES = "samples_3_real.png"
# Of many samples, the pairs that differ most.
BEFORE_FARTHEST = "images_1_before.png"
ANSWER_FARTHEST = "images_2_answer.png"
GRID = "grid.png"  # of :mod:`lcsc_opt.base.labelled_grid`
_LARGEST_IMAGE = 32 * 2**20  # bytes
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

Shows = Literal["answer", "before", "real"]
_SHOWS: dict[str, Shows] = {
    BEFORE_SAMPLES: "before",
    ANSWER_SAMPLES: "answer",
    REAL_SAMPLES: "real",
    BEFORE_FARTHEST: "before",
    ANSWER_FARTHEST: "answer",
}


@dataclasses.dataclass(frozen=True)
class StoredImage:
    """One image, a PNG.

    Attributes:
        artifact_id: the name of its file in the folder of artifacts.
        caption: which model sampled it.
        content: the bytes of the file.
        shows: who made its images: the answer, the best that the user had before, from the same noise, or nobody, since
            they are real.
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
        if report is None or not report.is_found:  # what is stored then is of an earlier report
            return []
        best = report.best_had(report.headline_metric)
        if best is None:
            return []
        captions: dict[Shows, str] = {
            "before": f"The best you had: {best.model.title}",
            "answer": f"The answer: {report.of_answer.model.title}",
            "real": "Real images",
        }
        images = []
        for artifact in StoredExperiment.open(storage, name).record.artifacts():
            shows = _SHOWS.get(str(artifact.get("filename")))
            path = artifact_path(folder, artifact.get("artifact_id"))
            if shows is None or path is None:
                continue
            content = read_png(path)
            if content is not None:
                selected = artifact["filename"] in (BEFORE_FARTHEST, ANSWER_FARTHEST)
                images.append(cls(path.name, captions[shows], content, shows, selected))
        return sorted(images, key=lambda image: image.selected)

    @property
    def version(self) -> str:
        """Tells it from an image of another report, which has the same name and ``artifact_id``."""
        return hashlib.sha256(self.content).hexdigest()[:16]

    @property
    def data_url(self) -> str:
        """The image as a ``data:`` URL, for a page that is one file."""
        return f"data:image/png;base64,{base64.b64encode(self.content).decode()}"


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
