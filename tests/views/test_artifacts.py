from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.views.artifacts import StoredImage, artifact_directory, mimetype, read_artifact, stored_images
from tests.study_examples import write_study

PNG = b"\x89PNG\r\n\x1a\n and the rest"
ID = "0f8fad5b-d9cb-469f-a165-70867728950e"


def test_images_beside_the_answer_are_found(url: str, tmp_path: Path) -> None:
    storage = open_storage(url, write=True)
    study = write_study(storage, "digits/LCSC/0", [4.0, 2.0])
    folder = tmp_path / "artifacts"
    folder.mkdir()
    for name, content in (("images.png", PNG), ("images.txt", b"no image"), ("curve.png", PNG)):
        (tmp_path / name).write_bytes(content)
        study.attach(study.trials()[1].number, folder, tmp_path / name)
    reader = HistoryReader(storage)
    (history,) = reader.read("digits")
    assert stored_images(reader, history, folder, prefix="images") == [StoredImage("images.png", "image/png", PNG)]
    assert [image.filename for image in stored_images(reader, history, folder)] == ["curve.png", "images.png"]
    assert stored_images(reader, history, tmp_path / "elsewhere") == []
    data = stored_images(reader, history, folder)[0].data_url
    assert data == f"data:image/png;base64,{base64.b64encode(PNG).decode()}"


@pytest.mark.parametrize(
    "artifact_id", ["../secret.png", "/etc/passwd", "secret.png", "", f"../{ID}", ID.upper(), f"{{{ID}}}"]
)
def test_an_id_that_is_none_of_ours_is_not_read(artifact_id: str, tmp_path: Path) -> None:
    folder = tmp_path / "artifacts"
    folder.mkdir()
    for name in (
        tmp_path / "secret.png",
        folder / "secret.png",
        tmp_path / ID,
        folder / ID.upper(),
        folder / f"{{{ID}}}",
    ):
        name.write_bytes(PNG)
    assert read_artifact(folder, artifact_id) is None


def test_an_id_in_the_database_cannot_leave_the_folder(url: str, tmp_path: Path) -> None:
    storage = open_storage(url, write=True)
    study = write_study(storage, "digits/LCSC/0", [4.0])
    (tmp_path / "images.png").write_bytes(PNG)
    (tmp_path / "artifacts").mkdir()
    study.attach(study.trials()[0].number, tmp_path / "artifacts", tmp_path / "images.png")
    known = f"artifacts:{study.artifacts()[0]['artifact_id']}"
    evil = {"artifact_id": "../images.png", "filename": "images.png", "trial": 0}
    storage.set_study_system_attr(study.key, known, json.dumps(evil))
    reader = HistoryReader(storage)
    (history,) = reader.read("digits")
    assert reader.artifacts(history, 0)[0]["artifact_id"] == "../images.png"
    assert stored_images(reader, history, tmp_path / "artifacts") == []


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(PNG)
    (tmp_path / ID).symlink_to(tmp_path / "secret")
    assert read_artifact(tmp_path, ID) is None
    (tmp_path / ID).unlink()
    (tmp_path / ID).write_bytes(PNG)
    assert read_artifact(tmp_path, ID) == PNG


def test_the_type_is_told_by_the_content() -> None:
    kinds = [mimetype(content) for content in (PNG, b"\xff\xd8\xff\xe0", b"RIFF1234WEBP", b"<svg onload='x'>", b"")]
    assert kinds == ["image/png", "image/jpeg", "image/webp", None, None]


def test_artifacts_lie_beside_an_sqlite_file() -> None:
    assert artifact_directory("sqlite:////data/studies.db") == Path("/data/studies.artifacts")
    assert artifact_directory("sqlite://") == Path("lcsc.artifacts")
    assert artifact_directory("postgresql://me@host/studies") == Path("lcsc.artifacts")
