"""Reads the images that are stored with trials, never from outside of the folder of artifacts."""

from __future__ import annotations

import base64
import dataclasses
import uuid
from pathlib import Path

import sqlalchemy as sa

from lcsc_opt.database.history import SummarizedStudy
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.database.urls import sqlite_file

PREFIX = "images"
EMA_IMAGES = f"{PREFIX}_1_EMA.png"
OWN_IMAGES = f"{PREFIX}_2_{{optimizer}}.png"  # of a study's answer
_LARGEST_IMAGE = 32 * 2**20  # bytes
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclasses.dataclass(frozen=True)
class StoredImage:
    """One image, a PNG.

    Attributes:
        artifact_id: the name of its file in the folder of artifacts.
        caption: which model sampled it.
        content: the bytes of the file.
        is_answer: whether the study's answer sampled it.
        is_baseline: whether EMA* did, from the same noise.
    """

    artifact_id: str
    caption: str
    content: bytes
    is_answer: bool
    is_baseline: bool

    @classmethod
    def of_answer(cls, reader: HistoryReader, study: SummarizedStudy, folder: Path) -> list[StoredImage]:
        """The images of a study's answer; what :func:`read_png` refuses is left out."""
        if study.chosen is None:
            return []
        answer_name = OWN_IMAGES.format(optimizer=study.optimizer)
        captions = {
            EMA_IMAGES: f"EMA*, from the same noise as {study.study}",
            answer_name: f"{study.study}, trial {study.chosen}",
        }
        images = []
        for artifact in StoredStudy(reader.storage, study.study, study.study_id).artifacts(study.chosen):
            name = str(artifact.get("filename"))
            path = artifact_path(folder, artifact.get("artifact_id"))
            if path is None or not name.startswith(PREFIX):
                continue
            content = read_png(path)
            if content is not None:
                caption = captions.get(name, name)
                is_answer = name == answer_name
                images.append(cls(path.name, caption, content, is_answer, is_baseline=name == EMA_IMAGES))
        return images

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
