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
EMA_IMAGES = "images_1_EMA.png"
_SIGNATURES = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif"}


@dataclasses.dataclass(frozen=True)
class StoredImage:
    """One image: the name of its file, its type (found from its content), and its content."""

    filename: str
    mimetype: str
    content: bytes

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


def stored_images(reader: HistoryReader, study: StudyHistory, folder: Path, *, prefix: str = "") -> list[StoredImage]:
    """The images that are stored with a study's answer. Files that are missing, too large or no image are left out.

    Args:
        reader: of the study's database.
        study: the study.
        folder: of the artifacts.
        prefix: only images whose file names begin with this.
    """
    if study.chosen is None:
        return []
    named = [meta for meta in reader.artifacts(study, study.chosen) if str(meta.get("filename")).startswith(prefix)]
    read = ((str(meta["filename"]), read_artifact(folder, str(meta.get("artifact_id")))) for meta in named)
    found = ((name, content, mimetype(content)) for name, content in read if content is not None)
    return [StoredImage(name, kind, content) for name, content, kind in found if kind is not None]


def own_images(optimizer: str) -> str:
    """The name of the file with the images of an optimizer's answer; those of EMA* are in :data:`EMA_IMAGES`."""
    return f"images_2_{optimizer}.png"


def caption(study: StudyHistory, filename: str) -> str:
    """Which model sampled the images that are stored with a study's answer under this file name."""
    if filename == EMA_IMAGES:
        return f"EMA*, from the same noise as {study.study}"
    return f"{study.study}, trial {study.chosen}" if filename == own_images(study.optimizer) else filename


def is_artifact_id(text: str) -> bool:
    """Whether this can be the name of a file in the folder of artifacts. A database may name anything."""
    try:
        return str(uuid.UUID(text)) == text
    except ValueError:
        return False


def read_artifact(folder: Path, artifact_id: str) -> bytes | None:
    """The content of an artifact; ``None`` if its id is not valid, or the file is missing, a link, or too large."""
    if not is_artifact_id(artifact_id):
        return None
    try:
        path = folder / artifact_id
        if path.is_symlink() or path.stat().st_size > MOST_BYTES:
            return None
        return path.read_bytes()
    except OSError:
        return None


def mimetype(content: bytes) -> str | None:
    """The type of an image by its first bytes; ``None`` if it is no image. The database's own type is not trusted."""
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "image/webp"
    return next((kind for signature, kind in _SIGNATURES.items() if content.startswith(signature)), None)
