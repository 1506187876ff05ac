"""Studies that 0.2.0 stored are read and continued.

``tests/stored_by_0_2_0`` holds the database that 0.2.0 wrote for three study files, with 10 to 12 evaluations a study,
and the losses of the same studies after 0.2.0 continued them to 16 and 20 evaluations. Keys of study files that are
gone since are removed from it first.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import shutil
import sqlite3
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

import lcsc_opt
from lcsc_opt.base.errors import SearchFailedError
from tests.commands import Typed

STORED = Path(__file__).parents[1] / "stored_by_0_2_0"
CONTINUED: dict[str, list[float]] = json.loads((STORED / "continued.json").read_text())
URL = "sqlite:///studies.db"
REMOVED = ("spread", "pipeline", "tells")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The study files, their checkpoints and real images, and the database."""
    for file in STORED.iterdir():
        shutil.copy(file, tmp_path)
    (tmp_path / "studies.db").write_bytes(gzip.decompress((STORED / "studies.db.gz").read_bytes()))
    remove_keys(tmp_path / "studies.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("LCSC_CACHE", str(tmp_path / "cache"))
    import stored_parts  # type: ignore[import-not-found]  # it was copied to the temporary folder

    stored_parts.write_checkpoints(tmp_path / "checkpoints")
    stored_parts.write_images(tmp_path / "reference")
    sys.modules.pop("stored_parts")
    return tmp_path


def remove_keys(path: Path) -> None:
    """Take the keys of study files that are no longer there out of the stored specifications."""
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        rows = database.execute(
            "SELECT study_user_attribute_id, value_json FROM study_user_attributes WHERE key = 'specification'"
        ).fetchall()
        for row, text in rows:
            specification = {key: value for key, value in json.loads(text).items() if key not in REMOVED}
            database.execute(
                "UPDATE study_user_attributes SET value_json = ? WHERE study_user_attribute_id = ?",
                (json.dumps(specification), row),
            )


def losses(name: str) -> list[float | None]:
    """As plain Optuna reads them."""
    return [trial.value for trial in optuna.load_study(study_name=name, storage=URL).trials]


def test_are_listed_and_compared(folder: Path, typed: Typed) -> None:
    listed: list[dict[str, Any]] = typed.json("list")
    assert {study["study"] for study in listed} == set(CONTINUED)
    assert {study["state"] for study in listed} == {"finished"}
    compared = {row["study"]: row for row in typed.json("compare", "stored-keep")}
    assert compared["stored-keep/LCSCGradient/0"]["held_out"] == pytest.approx(6.738, abs=1e-3)
    assert compared["stored-keep/LCSCGradient/0"]["held_out_rows"]


def test_losses_with_an_unknown_penalty_are_marked(folder: Path, typed: Typed) -> None:
    said = typed("compare", "stored-keep")
    (line,) = [line for line in said.err.splitlines() if "penalty whose bound was not stored" in line]
    assert line.startswith("stored-keep/EMAGrid/0, stored-keep/LCSCGradient/0: ")
    assert "%" not in said.out, "shares of EMA*'s loss would be shares of a penalty"
    for row in typed.json("compare", "stored-keep"):
        assert "compare metrics, not losses" in row["warnings"][0]
    assert "penalty" not in typed("compare", "stored-images").err
    assert "penalty" in typed("show", "stored-keep/EMAGrid/0").out


@pytest.mark.parametrize(("file", "budget"), [("functions.yaml", 20), ("images.yaml", 16)])
def test_continue_as_0_2_0_continued_them(folder: Path, file: str, budget: int) -> None:
    experiment = yaml.safe_load(Path(file).read_text())["name"]
    continued = [name for name in CONTINUED if name.startswith(f"{experiment}/")]
    refusal = ""
    try:
        lcsc_opt.run(file, budget=budget, accept_changes=True)
    except SearchFailedError as failure:
        refusal = str(failure)
    if refusal:  # least squares have other last bits with other kernels of BLAS, and then the search must say so
        assert refusal.startswith("1 of 5 studies did not finish: stored/LCSCQuadratic/0. stored/LCSCQuadratic/0: ")
        assert "asks other coefficients" in refusal
        assert "Changed since it began: " in refusal
        assert "environment.blas was" in refusal
        continued.remove("stored/LCSCQuadratic/0")
    for name in continued:
        assert losses(name) == pytest.approx(CONTINUED[name], rel=1e-4)
        assert lcsc_opt.load_study(name, URL).held_out is not None


def test_with_keep_are_read_and_not_continued(folder: Path, typed: Typed) -> None:
    line = typed.refused("run", "keep.yaml", "--budget", "16", "--accept-changes", "--optimizer", "LCSCGradient")
    assert "an older version bounded its losses by an EMA* that it did not store" in line
    assert "lcsc run FILE name=..." in line
    options = ("--images", "200", "--accept-changes", "--storage", URL)
    said = typed("evaluate", "stored-keep/LCSCGradient/0", *options, status=2)
    assert "can be read, but not evaluated on other noise" in said.err
    assert "continues with changes" not in said.err, "nothing of it was stored"
    said = typed("run", "keep.yaml")
    assert said.err.count("finished already") == 2


def test_with_keep_repeat_no_failed_trials_and_have_no_new_landscape(folder: Path, typed: Typed) -> None:
    with sqlite3.connect("studies.db") as database:
        database.execute(
            "UPDATE trials SET state = 'FAIL' WHERE number = 9 AND study_id = "
            "(SELECT study_id FROM studies WHERE study_name = 'stored-keep/LCSCGradient/0')"
        )
    before = losses("stored-keep/LCSCGradient/0")
    options = ("--retry-failed", "--accept-changes", "--storage", URL)
    said = typed("resume", "stored-keep/LCSCGradient/0", *options, status=2)
    assert "can be read, but not continued" in said.err
    assert losses("stored-keep/LCSCGradient/0") == before
    assert {study["state"] for study in typed.json("list")} == {"finished"}
    said = typed("landscape", "stored-keep/LCSCGradient/0", "--storage", URL, status=2)
    assert "can be read, but not drawn as a landscape" in said.err
