"""Deleting studies, and what lies in the cache."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa

from lcsc_opt.base.files import replacing
from lcsc_opt.cli import run as lcsc
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import StoredStudy, our_studies
from lcsc_opt.maintenance.cleaning import UNFINISHED, cache_entries
from lcsc_opt.metrics.extractors.bundled import feature_network
from lcsc_opt.views.artifacts import files_of
from tests import model_studies
from tests.commands import Typed
from tests.study_examples import attach, write_study

NAME, OTHER = "digits/LCSC/0", "digits/CMA/0"
URL = "sqlite:///studies.db"


def rows(url: str) -> dict[str, list[Any]]:
    """Everything in Optuna's tables."""
    with open_storage(url, write=False).engine.connect() as connection:
        (known := sa.MetaData()).reflect(connection)
        return {table.name: sorted(map(str, connection.execute(sa.select(table)))) for table in known.sorted_tables}


def answer(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody at a terminal will answer so."""
    stream = io.StringIO(f"{text}\n")
    stream.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stdin", stream)


# studies


def deleted(url: str, *names: str) -> int:
    return lcsc(["delete", *names, "--yes", "--storage", url])


def test_a_deleted_study_leaves_no_row_and_no_file_and_others_as_they_were(
    any_url: str, workplace: Path, tmp_path: Path
) -> None:
    storage = open_storage(any_url, write=True)
    kept = attach(write_study(storage, OTHER, [2.0, None]), 0, "images.png", b"x" * 5000)
    before = rows(any_url)
    study = write_study(storage, NAME, [1.0, None, 3.0], running=1, held_out={"loss": 1.5})
    file, mine = attach(study, 0, "images.png", b"x" * 5000), tmp_path / "thesis.tex"
    mine.write_text("mine")
    storage.set_study_system_attr(study.key, "artifacts:x", json.dumps({"artifact_id": "../thesis.tex"}))
    assert files_of(study) == [file]
    assert deleted(any_url, NAME) == 0
    assert rows(any_url) == before
    assert kept.exists()
    assert mine.exists(), "a database may name anything"
    assert not file.exists()
    write_study(storage, NAME, [1.0])  # the name is free
    with StoredStudy.open(storage, NAME).hold():
        pass


def test_a_study_that_is_being_run_is_not_deleted(url: str, typed: Typed) -> None:
    storage = open_storage(url, write=True)
    for name in (OTHER, NAME):
        write_study(storage, name, [1.0])
    with StoredStudy.open(open_storage(url, write=True), NAME).hold():
        assert "is being run" in typed.refused("delete", OTHER, NAME, "--yes", "--storage", url)
    assert list(our_studies(storage)) == [OTHER, NAME], "all or none"
    assert deleted(url, OTHER, NAME) == 0


def test_the_command_asks_and_says_what_it_deleted(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, typed: Typed
) -> None:
    storage = open_storage(URL, write=True)
    write_study(storage, NAME, [3.0, 2.0])
    write_study(storage, OTHER, [1.0])
    optuna.create_study(storage=storage, study_name="digits/TPE/0")
    assert "give --yes" in typed.refused("delete", NAME)
    answer("n", monkeypatch)
    assert f"{NAME}: 2 trials" in typed("delete", NAME).err
    assert list(our_studies(storage)) == [NAME, OTHER]
    answer("y", monkeypatch)
    assert f"deleted: {NAME}\n" in typed("delete", NAME).err
    assert list(our_studies(storage)) == [OTHER]
    for other in ("nothing/LCSC/0", "digits/TPE/0"):
        typed.refused("delete", OTHER, other, "--yes")
    assert list(our_studies(storage)) == [OTHER], "all or none"
    typed("delete", OTHER, OTHER, "--yes")  # named twice
    assert list(our_studies(storage)) == []


# the cache


@pytest.fixture(scope="module")
def packed_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the database of two studies, and the cache that they have packed their checkpoints into."""
    made = tmp_path_factory.mktemp("packed")
    file = model_studies.write_model_study(made, budget={"evaluations": 3})
    opened = "open_or_pack(path, cache=cache_directory())"
    imports = "from lcsc_opt.base.paths import cache_directory\nfrom lcsc_opt.trajectory.packing import open_or_pack\n"
    (made / "small_model.py").write_text(imports + model_studies.OBJECTIVE.replace("Trajectory.open(path)", opened))
    file.write_text(file.read_text().replace("run.trajectory", "checkpoints"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        patch.setenv("LCSC_CACHE", str(made / "cache"))
        assert lcsc(["run", str(file), "--storage", URL]) == 0
    return made


@pytest.fixture
def packed(packed_once: Path, workplace: Path) -> Path:
    """A copy of the database here, and of the cache where it is looked for, which is returned."""
    shutil.copy(packed_once / "studies.db", workplace)
    return Path(shutil.copytree(packed_once / "cache", os.environ["LCSC_CACHE"], dirs_exist_ok=True))


def listed(typed: Typed, *options: str) -> dict[str, dict[str, Any]]:
    return {row["path"]: row for row in typed.json("cache", *options)}


def test_the_cache_is_listed_with_its_users(packed: Path, typed: Typed) -> None:
    [(path, row)] = listed(typed).items()
    size = sum(file.stat().st_size for file in (packed / path).iterdir())
    assert (row["kind"], row["bytes"]) == ("trajectory", size)
    assert sorted(row["studies"]) == ["small/EMAGrid/0", "small/LCSC/0"]
    assert listed(typed, "--storage", "sqlite:///other.db")[path]["studies"] == []
    assert path in typed("cache").out


def test_trajectories_stay_since_studies_of_any_database_may_need_them(
    packed: Path, typed: Typed, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [path] = listed(typed)
    network = packed / f"digits-network-{16 * '0'}.safetensors"
    network.write_bytes(b"made again")
    another_project = workplace / "another_project"
    another_project.mkdir()
    monkeypatch.chdir(another_project)
    write_study(open_storage(URL, write=True), NAME, [1.0])
    said = typed("cache", "--clear", "--yes").err
    assert ((packed / path).exists(), network.exists()) == (True, False)
    assert "removed: 1" in said
    assert "kept: 1" in said


def test_a_trajectory_is_removed_by_its_name_once_no_study_of_the_database_uses_it(packed: Path, typed: Typed) -> None:
    [path] = listed(typed)
    assert "used by small/" in typed.refused("cache", "--clear", path, "--yes")
    typed.refused("cache", "--clear", path, "--yes", "--storage", "sqlite:///other.db")
    typed("delete", "small/EMAGrid/0", "small/LCSC/0", "--yes")
    typed("cache", "--clear", "--yes")
    assert (packed / path).exists()
    assert "give --yes" in typed.refused("cache", "--clear", path)
    assert "trajectories/none" in typed.refused("cache", "--clear", "trajectories/none", "--yes")
    assert "removed: 1" in typed("cache", "--clear", path, "--yes").err
    assert not (packed / path).exists()


def test_trained_models_are_listed_and_kept(packed: Path, typed: Typed) -> None:
    trained = [f"digits-cd-{16 * '0'}.{ending}" for ending in ("trajectory", "model", "state", "jsonl", "yaml")]
    for name in (*trained, f"digits-{16 * '1'}-half.trajectory"):
        (packed / name).mkdir()
    rows = listed(typed)
    assert {name: rows[name]["kind"] for name in trained} == dict.fromkeys(trained, "trained model")
    assert rows[f"digits-{16 * '1'}-half.trajectory"]["kind"] == "trained model"
    typed("cache", "--clear", "--yes")
    assert all((packed / name).exists() for name in trained), "to train again takes long"
    typed("cache", "--clear", trained[0], "--yes")
    assert [(packed / name).exists() for name in trained[:2]] == [False, True]


@pytest.mark.parametrize(
    "name", [f"trajectories/{24 * '0'}.trajectory.partial", f"digits-{16 * '0'}.trajectory.partial"]
)
def test_what_a_killed_process_left_is_removed_and_what_a_living_one_makes_is_not(
    packed: Path, typed: Typed, name: str
) -> None:
    (packed / name).mkdir()
    weights = packed / name / "weights.bin"
    weights.write_bytes(b"x" * 100)
    assert "not removed: 1" in typed("cache", "--clear", "--yes").err
    row = listed(typed)[name]
    assert (row["kind"], row["bytes"], row["studies"]) == (UNFINISHED, 100, [])
    os.utime(weights, (1e9, 1e9))  # long ago
    typed("cache", "--clear", "--yes")
    assert not (packed / name).exists()


def test_a_file_that_is_being_written_is_none_that_was_left(packed: Path, typed: Typed) -> None:
    folder = packed / "references"
    folder.mkdir()
    with replacing(folder / f"{32 * '0'}.npz") as pending:
        pending.write_bytes(b"half")
        name = pending.relative_to(packed).as_posix()
        assert name in listed(typed)
        typed("cache", "--clear", "--yes")
        assert pending.exists()
        os.utime(pending, (1e9, 1e9))  # long ago
        typed("cache", "--clear", "--yes")
        assert not pending.exists()
        pending.write_bytes(b"for the one who has begun it")


def test_other_files_of_the_folder_are_neither_listed_nor_removed(packed: Path, typed: Typed) -> None:
    others = [
        *("thesis.tex", "run.trajectory/weights.bin", "run.trajectory.partial/weights.bin", "datasets/imagenet/1.png"),
        *("references/real.npz", "trajectories/mine.trajectory/weights.bin", ".notes.partial"),
    ]
    for name in others:
        (packed / name).parent.mkdir(parents=True, exist_ok=True)
        (packed / name).write_text("mine")
    assert len(listed(typed)) == 1
    typed("cache", "--clear", "--yes")
    assert all((packed / name).read_text() == "mine" for name in others)


def test_the_names_are_those_that_are_given(tmp_path: Path) -> None:
    feature_network("digits", epochs=1, cache=tmp_path)
    assert [entry.kind for entry in cache_entries(tmp_path, {})] == ["feature network"]
    assert cache_entries(tmp_path / "nothing", {}) == []
