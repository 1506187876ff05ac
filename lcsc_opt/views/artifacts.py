"""The images that are stored with trials, read without ever leaving their folder."""

from __future__ import annotations

import base64
import dataclasses
import uuid
from pathlib import Path

import sqlalchemy as sa

from lcsc_opt.database.history import StudyHistory
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.database.urls import sqlite_file

PREFIX = "images"
EMA_IMAGES, OWN_IMAGES = f"{PREFIX}_1_EMA.png", f"{PREFIX}_2_{{optimizer}}.png"  # of EMA*, and of a study's answer
_MOST_BYTES = 32 * 2**20  # of one image


@dataclasses.dataclass(frozen=True)
class StoredImage:
    """One image, a PNG.

    Attributes:
        artifact_id: the name of its file in the folder of artifacts.
        caption: which model sampled it.
        content: the bytes of the file.
    """

    artifact_id: str
    caption: str
    content: bytes

    @classmethod
    def of_answer(cls, reader: HistoryReader, study: StudyHistory, folder: Path) -> list[StoredImage]:
        """The images of a study's answer; what :func:`read_png` refuses is left out."""
        captions = {
            EMA_IMAGES: f"EMA*, from the same noise as {study.study}",
            OWN_IMAGES.format(optimizer=study.optimizer): f"{study.study}, trial {study.chosen}",
        }
        stored, found = StoredStudy(reader.storage, study.study, study.study_id), []
        for meta in [] if study.chosen is None else stored.artifacts(study.chosen):
            name, path = str(meta.get("filename")), artifact_path(folder, meta.get("artifact_id"))
            if path is not None and name.startswith(PREFIX) and (content := read_png(path)) is not None:
                found.append(cls(path.name, captions.get(name, name), content))
        return found

    @property
    def data_url(self) -> str:
        """The image as a ``data:`` URL, for a page that is one file."""
        return f"data:image/png;base64,{base64.b64encode(self.content).decode()}"


def artifact_directory(url: str) -> Path:
    """The artifacts folder of a study database: next to an SQLite file, else in the working directory."""
    file = sqlite_file(sa.make_url(url))
    return Path("lcsc.artifacts") if file is None else file.with_suffix(".artifacts")


def artifact_path(folder: Path, artifact_id: object) -> Path | None:
    """The file of an artifact; ``None`` if it is no id of ours, since a database may name anything."""
    try:
        return folder / str(artifact_id) if str(uuid.UUID(str(artifact_id))) == artifact_id else None
    except ValueError:
        return None


def read_png(path: Path) -> bytes | None:
    """The bytes of a PNG; ``None`` for a file that is not there, a link, another kind of file, or one above 32 MiB."""
    try:
        content = b"" if path.is_symlink() or path.stat().st_size > _MOST_BYTES else path.read_bytes()
    except OSError:
        return None
    return content if content.startswith(b"\x89PNG\r\n\x1a\n") else None
