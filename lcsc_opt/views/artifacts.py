"""Reads the images that are stored with trials, never from outside of the folder of artifacts."""

from __future__ import annotations

import base64
import dataclasses
import uuid
from pathlib import Path
from typing import Literal

import sqlalchemy as sa

from lcsc_opt.database.history import Standing
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.database.urls import sqlite_file

# Samples as they come, from the same noise, and real images.
SAMPLES = "samples"
EMA_SAMPLES = f"{SAMPLES}_1_EMA.png"
OWN_SAMPLES = f"{SAMPLES}_2_{{optimizer}}.png"  # of a study's answer
REAL_SAMPLES = f"{SAMPLES}_3_real.png"
# Of many samples, the pairs that differ most.
FARTHEST = "images"
EMA_FARTHEST = f"{FARTHEST}_1_EMA.png"
OWN_FARTHEST = f"{FARTHEST}_2_{{optimizer}}.png"
_LARGEST_IMAGE = 32 * 2**20  # bytes
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


Shows = Literal["answer", "baseline", "real", "other"]


@dataclasses.dataclass(frozen=True)
class StoredImage:
    """One image, a PNG.

    Attributes:
        artifact_id: the name of its file in the folder of artifacts.
        caption: which model sampled it.
        content: the bytes of the file.
        shows: who made its images: the study's answer, EMA* from the same noise, or nobody, since they are real;
            ``other`` for a file of the user's.
        selected: whether they are not the first ones, but those that differ most.
    """

    artifact_id: str
    caption: str
    content: bytes
    shows: Shows
    selected: bool

    @classmethod
    def of_answer(cls, reader: HistoryReader, study: Standing, folder: Path) -> list[StoredImage]:
        """The images of a study's answer, samples as they come first; what :func:`read_png` refuses is left out."""
        if study.chosen is None:
            return []
        baseline = f"EMA*, from the same noise as {study.study}"
        answer = f"{study.study}, trial {study.chosen}"
        known: dict[str, tuple[str, Shows]] = {
            EMA_SAMPLES: (baseline, "baseline"),
            OWN_SAMPLES.format(optimizer=study.optimizer): (answer, "answer"),
            REAL_SAMPLES: ("Real images", "real"),
            EMA_FARTHEST: (baseline, "baseline"),
            OWN_FARTHEST.format(optimizer=study.optimizer): (answer, "answer"),
        }
        images = []
        for artifact in StoredStudy(reader.storage, study.study, study.study_id).artifacts(study.chosen):
            name = str(artifact.get("filename"))
            path = artifact_path(folder, artifact.get("artifact_id"))
            if path is None or not name.startswith((SAMPLES, FARTHEST)):
                continue
            content = read_png(path)
            if content is not None:
                other: tuple[str, Shows] = (name, "other")
                caption, shows = known.get(name, other)
                images.append(cls(path.name, caption, content, shows, selected=not name.startswith(SAMPLES)))
        return sorted(images, key=lambda image: image.selected)

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
    if canonical_id != artifact_id:
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
    return content if content.startswith(_PNG_SIGNATURE) else None
