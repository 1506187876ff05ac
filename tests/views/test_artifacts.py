from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.views.artifacts import StoredImage, artifact_directory
from tests.study_examples import PNG, attach, write_study

ID = "0f8fad5b-d9cb-469f-a165-70867728950e"


def test_images_of_the_answer_are_found(url: str, tmp_path: Path) -> None:
    storage = open_storage(url, write=True)
    study = write_study(storage, "digits/LCSC/0", [4.0, 2.0])
    contents = {
        **{"images_1_EMA.png": PNG, "images_2_LCSC.png": PNG, "images_3.png": PNG, "curve.png": PNG},
        **{"samples_1_EMA.png": PNG, "samples_2_LCSC.png": PNG, "samples_3_real.png": PNG},
        **{"images.txt": b"no image", "images.svg": b"<svg onload='x'>", "images_empty.png": b""},
    }
    for name, content in contents.items():
        folder = attach(study, 1, name, content).parent
    reader = HistoryReader(storage)
    (history,) = reader.read("digits")
    found = StoredImage.of_answer(reader, history, folder)
    pair = ["EMA*, from the same noise as digits/LCSC/0", "digits/LCSC/0, trial 1"]
    assert [image.caption for image in found] == [*pair, "Real images", *pair, "images_3.png"]
    assert [image.selected for image in found] == 3 * [False] + 3 * [True]
    assert [image.shows for image in found] == ["baseline", "answer", "real", "baseline", "answer", "other"]
    assert found[0].data_url == f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
    assert (folder / found[0].artifact_id).read_bytes() == found[0].content == PNG
    assert StoredImage.of_answer(reader, history, tmp_path / "elsewhere") == []


@pytest.mark.parametrize(
    "evil", ["../secret.png", "{folder}/../secret.png", "secret.png", "", f"../{ID}", ID.upper(), f"{{{ID}}}", "link"]
)
def test_an_id_in_the_database_cannot_leave_the_folder(url: str, tmp_path: Path, evil: str) -> None:
    storage = open_storage(url, write=True)
    study = write_study(storage, "digits/LCSC/0", [4.0])
    folder = tmp_path / "artifacts"
    folder.mkdir()
    for path in (tmp_path / "secret.png", folder / "secret.png", tmp_path / ID, folder / ID.upper()):
        path.write_bytes(PNG)
    if evil == "link":
        (folder / ID).symlink_to(tmp_path / "secret.png")
    wanted = ID if evil == "link" else evil.replace("{folder}", str(folder))
    meta = {"artifact_id": wanted, "filename": "images.png", "trial": 0}
    storage.set_study_system_attr(study.key, f"artifacts:{ID}", json.dumps(meta))
    reader = HistoryReader(storage)
    (history,) = reader.read("digits")
    assert study.artifacts(0)[0]["artifact_id"] == wanted
    assert StoredImage.of_answer(reader, history, folder) == []


def test_artifacts_lie_next_to_an_sqlite_file() -> None:
    assert artifact_directory("sqlite:////data/studies.db") == Path("/data/studies.artifacts")
    assert {artifact_directory(url) for url in ("sqlite://", "postgresql://me@host/studies")} == {
        Path("lcsc.artifacts")
    }
