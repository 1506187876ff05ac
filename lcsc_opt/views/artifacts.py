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
from lcsc_opt.views.pictures import ROLES, Shows, captions_of, pair_of, picture_line, pictured

Kind = Literal["samples", "farthest", "grid"]
SAMPLES: dict[Shows, str] = {role: f"samples_{role}.png" for role in ROLES}
"""Samples as they come, from the same noise; and real images."""
FARTHEST: dict[Shows, str] = {role: f"images_{role}.png" for role in ROLES}
"""Of many samples, the pairs that differ most."""
GRID = "grid.png"  # of :mod:`lcsc_opt.base.labelled_grid`
GRID_OF = "grid_of"  # an attribute of an experiment: the key of the answer when its grid was made
_LARGEST_IMAGE = 32 * 2**20  # bytes
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclasses.dataclass(frozen=True)
class StoredImage:
    """One PNG that is stored with an experiment.

    Attributes:
        artifact_id: the name of its file in the folder of artifacts.
        kind: ``samples`` as they come; the ``farthest`` ones, the pairs that differ most; or the ``grid`` of
            ``lcsc images``.
        caption: what it shows, as which model sampled it.
        content: the bytes of the file.
        shows: who made its images; ``None`` of a grid, which has several.
        measured: what the report has of the model that it shows, as text; empty of real images and of a grid.
    """

    artifact_id: str
    kind: Kind
    caption: str
    content: bytes
    shows: Shows | None = None
    measured: str = ""

    @classmethod
    def of_experiment(cls, storage: RDBStorage, name: str, report: Report | None, folder: Path) -> list[StoredImage]:
        """The images of an experiment, samples as they come first; what :func:`_read_png` refuses is left out."""
        experiment = StoredExperiment.open(storage, name)
        stored = {str(found.get("filename")): found for found in experiment.record.artifacts()}
        named: list[tuple[str, Kind, Shows | None]] = []
        captions: dict[Shows | None, str] = {None: "All rows; open it to see it in full"}
        lines: dict[Shows | None, str] = {}
        if report is not None:
            if experiment.attributes.get(GRID_OF) not in (None, report.of_answer.model.key):
                captions[None] = f"Made before the present answer: lcsc images {name} makes it again"
            for role, caption in captions_of(report).items():
                captions[role] = caption
                named.append((SAMPLES[role], "samples", role))
            named += [(FARTHEST[role], "farthest", role) for role in pair_of(report)]
            lines = {role: picture_line(report, role, measured) for role, measured in pictured(report).items()}
        named.append((GRID, "grid", None))
        images = []
        for filename, kind, shows in named:
            path = _artifact_path(folder, stored.get(filename, {}).get("artifact_id"))
            content = None if path is None else _read_png(path)
            if path is not None and content is not None:
                images.append(cls(path.name, kind, captions[shows], content, shows, lines.get(shows, "")))
        return images

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
    paths = [_artifact_path(folder, artifact.get("artifact_id")) for artifact in study.artifacts()]
    return [path for path in paths if path is not None]


def lacks_files(study: StoredStudy, report: Report) -> bool:
    """Whether an image of this report was stored and is not beside the database's file, which was moved alone.

    A server's lie in the working directory, which may be another one each time: then nothing is lacking.
    """
    if sqlite_file(sa.make_url(study.storage.url)) is None:
        return False
    folder = artifact_directory(study.storage.url)
    names = {SAMPLES[role] for role in captions_of(report)} | {FARTHEST[role] for role in pair_of(report)}
    of_report = [artifact for artifact in study.artifacts() if artifact.get("filename") in names]
    paths = [_artifact_path(folder, artifact.get("artifact_id")) for artifact in of_report]
    return any(path is not None and not path.is_file() for path in paths)


def artifact_directory(url: str) -> Path:
    """The artifacts folder of a study database: next to an SQLite file, else in the working directory."""
    file = sqlite_file(sa.make_url(url))
    if file is None:
        return Path("lcsc.artifacts")
    return file.with_name(f"{file.name}.artifacts")  # the whole name: a copy, as studies.bak, has pictures of its own


def _artifact_path(folder: Path, artifact_id: object) -> Path | None:
    """The file of an artifact; ``None`` if the id is not a UUID, since a database could name any path."""
    try:
        canonical_id = str(uuid.UUID(str(artifact_id)))
    except ValueError:
        return None
    if canonical_id != artifact_id:  # in braces or capitals it is a UUID, too, and no name that we give
        return None
    return folder / canonical_id


def _read_png(path: Path) -> bytes | None:
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
