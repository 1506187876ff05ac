"""The images that are stored with trials, read without ever leaving their folder."""

from __future__ import annotations

import base64
import dataclasses
import uuid
from pathlib import Path

import sqlalchemy as sa

from lcsc_opt.database.history import StudyHistory
from lcsc_opt.database.reader import HistoryReader

MOST_BYTES = 32 * 2**20  # of one image
PREFIX = "images"
EMA_IMAGES, OWN_IMAGES = f"{PREFIX}_1_EMA.png", f"{PREFIX}_2_{{optimizer}}.png"  # of EMA*, and of a study's answer
PNG = b"\x89PNG\r\n\x1a\n"
_SIGNATURES = {PNG: "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif"}


@dataclasses.dataclass(frozen=True)
class StoredImage:
    """One image.

    Attributes:
        artifact_id: the name of its file in the folder of artifacts.
        caption: which model sampled it.
        mimetype: found from its content.
        content: the bytes of the file.
    """

    artifact_id: str
    caption: str
    mimetype: str
    content: bytes

    @classmethod
    def of_answer(cls, reader: HistoryReader, study: StudyHistory, folder: Path) -> list[StoredImage]:
        """The images of a study's answer, without files that are missing, links, too large or no image."""
        found = []
        for meta in [] if study.chosen is None else reader.artifacts(study, study.chosen):
            name, path = str(meta.get("filename")), artifact_path(folder, meta.get("artifact_id"))
            content = None if path is None or not name.startswith(PREFIX) else _content(path)
            kind = None if content is None else _mimetype(content)
            if path is not None and content is not None and kind is not None:
                captions = {
                    EMA_IMAGES: f"EMA*, from the same noise as {study.study}",
                    OWN_IMAGES.format(optimizer=study.optimizer): f"{study.study}, trial {study.chosen}",
                }
                found.append(cls(path.name, captions.get(name, name), kind, content))
        return found

    @property
    def data_url(self) -> str:
        """The image as a ``data:`` URL, for a page that is one file."""
        return f"data:{self.mimetype};base64,{base64.b64encode(self.content).decode()}"


def artifact_directory(url: str) -> Path:
    """The artifacts folder of a study database: next to an SQLite file, else in the working directory."""
    parsed = sa.make_url(url)
    if parsed.get_backend_name() == "sqlite" and parsed.database not in (None, "", ":memory:"):
        return Path(str(parsed.database)).with_suffix(".artifacts")
    return Path("lcsc.artifacts")


def artifact_path(folder: Path, artifact_id: object) -> Path | None:
    """The file of an artifact; ``None`` if it is no id of ours, since a database may name anything."""
    try:
        return folder / str(artifact_id) if str(uuid.UUID(str(artifact_id))) == artifact_id else None
    except ValueError:
        return None


def _content(path: Path) -> bytes | None:
    try:
        return None if path.is_symlink() or path.stat().st_size > MOST_BYTES else path.read_bytes()
    except OSError:
        return None


def _mimetype(content: bytes) -> str | None:
    """The type of an image by its first bytes; ``None`` if it is no image. The database's own type is not trusted."""
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "image/webp"
    return next((kind for signature, kind in _SIGNATURES.items() if content.startswith(signature)), None)
