from __future__ import annotations

import base64
import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.experiment import StoredExperiment
from lcsc_opt.database.names import LAST_CHECKPOINT
from lcsc_opt.views.artifacts import GRID, GRID_OF, SAMPLES, StoredImage, artifact_directory, lacks_files
from lcsc_opt.views.pictures import pair_of, pictured
from tests.history_examples import measured, report_of
from tests.study_examples import PNG, attach, write_experiment, write_images

ID = "0f8fad5b-d9cb-469f-a165-70867728950e"


def test_images_of_the_answer_and_of_the_best_before_are_found(url: str, tmp_path: Path) -> None:
    storage = open_storage(url, write=True)
    report = report_of({"digits/LCSC/0": measured(2.0, trial=1)}, measured(9.0, name=LAST_CHECKPOINT))
    write_images(storage)
    for name, content in {"curve.png": PNG, "images.svg": b"<svg onload='x'>"}.items():
        folder = attach(storage, name, content).parent
    found = StoredImage.of_experiment(storage, "digits", report, folder)
    pair = ["The best you had: last checkpoint", "The answer: LCSC, trial 1"]
    assert [image.caption for image in found] == [*pair, "Real images", *pair]
    assert [image.kind for image in found] == 3 * ["samples"] + 2 * ["farthest"]
    assert [image.shows for image in found] == ["before", "answer", "real", "before", "answer"]
    assert found[0].data_url == f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
    assert (folder / found[0].artifact_id).read_bytes() == found[0].content == PNG
    assert StoredImage.of_experiment(storage, "digits", report, tmp_path / "elsewhere") == []
    attach(storage, SAMPLES["real"], b"no image")
    assert len(StoredImage.of_experiment(storage, "digits", report, folder)) == 4


def test_after_a_veto_the_answer_and_what_was_found_have_pictures(url: str) -> None:
    storage = open_storage(url, write=True)
    report = report_of({"digits/LCSC/0": measured(2.0, trial=1)}, measured(9.0, name=LAST_CHECKPOINT))
    write_images(storage)
    vetoed = dataclasses.replace(report, answer=LAST_CHECKPOINT)
    folder = attach(storage, SAMPLES["found"]).parent
    shown = StoredImage.of_experiment(storage, "digits", vetoed, folder)
    titles = ["The answer: last checkpoint", "The best that was found, not the answer: LCSC, trial 1", "Real images"]
    assert [image.caption for image in shown if image.kind == "samples"] == titles, (
        "nothing of an earlier report's before"
    )
    assert pair_of(vetoed) == ("answer", "found")


@pytest.mark.parametrize(
    "evil", ["../secret.png", "{folder}/../secret.png", "secret.png", "", f"../{ID}", ID.upper(), f"{{{ID}}}", "link"]
)
def test_an_id_in_the_database_cannot_leave_the_folder(url: str, tmp_path: Path, evil: str) -> None:
    storage = open_storage(url, write=True)
    report = report_of({"digits/LCSC/0": measured(2.0)}, measured(9.0, name=LAST_CHECKPOINT))
    record = write_experiment(storage, "digits").record
    folder = tmp_path / "artifacts"
    folder.mkdir()
    for path in (tmp_path / "secret.png", folder / "secret.png", tmp_path / ID, folder / ID.upper()):
        path.write_bytes(PNG)
    if evil == "link":
        (folder / ID).symlink_to(tmp_path / "secret.png")
    wanted = ID if evil == "link" else evil.replace("{folder}", str(folder))
    meta = {"artifact_id": wanted, "filename": SAMPLES["answer"]}
    storage.set_study_system_attr(record.key, f"artifacts:{ID}", json.dumps(meta))
    assert record.artifacts()[0]["artifact_id"] == wanted
    assert StoredImage.of_experiment(storage, "digits", report, folder) == []


def test_artifacts_lie_next_to_an_sqlite_file() -> None:
    assert artifact_directory("sqlite:////data/studies.db") == Path("/data/studies.db.artifacts")
    assert {artifact_directory(url) for url in ("sqlite://", "postgresql://me@host/studies")} == {
        Path("lcsc.artifacts")
    }


def test_the_best_of_a_grid_is_nothing_that_a_search_found() -> None:
    """A report showed the same epoch twice, as the answer and as "the best that was found, not the answer"."""
    found = {"digits/Grid/0": measured(1.0, fid=145.0, trial=15), "digits/LCSC/0": measured(1.3, fid=49.0)}
    last = measured(1.0, name="last checkpoint", fid=145.0)
    report = report_of(found, last, answer="last checkpoint")
    assert {role: one.model.name for role, one in pictured(report).items()} == {
        "answer": "last checkpoint",
        "found": "LCSC, trial 0",
    }
    assert list(pictured(report_of({"digits/Grid/0": found["digits/Grid/0"]}, last, answer="last checkpoint"))) == [
        "answer"
    ]


def test_a_copy_of_a_database_has_a_folder_of_its_own_and_knows_that_its_pictures_are_not_there(tmp_path: Path) -> None:
    storage = open_storage(f"sqlite:///{tmp_path / 'studies.db'}", write=True)
    report = report_of({"digits/LCSC/0": measured(2.0, trial=1)}, measured(9.0, name=LAST_CHECKPOINT))
    write_images(storage)
    for of_no_report in (GRID, SAMPLES["found"]):
        attach(storage, of_no_report).unlink()
    shutil.copy(tmp_path / "studies.db", tmp_path / "studies.bak")
    copy = open_storage(f"sqlite:///{tmp_path / 'studies.bak'}", write=True)
    assert artifact_directory(copy.url) != artifact_directory(storage.url)
    of_both = [StoredExperiment.open(database, "digits").record for database in (storage, copy)]
    assert [lacks_files(record, report) for record in of_both] == [False, True]


@pytest.mark.parametrize("is_of_answer", [True, False])
def test_a_grid_that_was_made_before_the_answer_says_so(url: str, is_of_answer: bool) -> None:
    storage = open_storage(url, write=True)
    report = report_of({"digits/LCSC/0": measured(2.0, trial=1)}, measured(9.0, name=LAST_CHECKPOINT))
    folder = attach(storage, GRID).parent
    key = report.of_answer.model.key if is_of_answer else "0123456789abcdef"
    StoredExperiment.open(storage, "digits").set_attribute(GRID_OF, key)
    [grid] = StoredImage.of_experiment(storage, "digits", report, folder)
    assert ("Made before the present answer: lcsc images digits" in grid.caption) != is_of_answer
