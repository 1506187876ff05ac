from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lcsc_opt.base.errors import LcscError, MetricError
from lcsc_opt.base.files import (
    is_pending,
    only_process,
    replacing,
    shown_size,
    try_lock,
    write_atomically,
)
from tests.processes import wait_until


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (999, "999 B"),
        (1000, "1 KB"),
        (9996, "10 KB"),
        (999_400, "999 KB"),
        (999_600, "1 MB"),
        (8e9, "8 GB"),
    ],
)
def test_sizes_have_three_digits_and_a_unit(count: float, shown: str) -> None:
    assert shown_size(count) == shown


def test_a_file_and_a_folder_are_replaced_when_all_of_it_is_there(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    write_atomically(path, b"old", error=MetricError)
    with replacing(path) as pending:
        pending.write_bytes(b"new")
        assert path.read_bytes() == b"old"
        assert is_pending(pending.name)
    assert path.read_bytes() == b"new"
    assert names(path.parent) == ["file"]
    for name in ("old", "new"):
        with replacing(tmp_path / "folder") as pending:
            pending.mkdir()
            (pending / name).write_text(name)
    assert names(tmp_path) == ["deep", "folder"]
    assert names(tmp_path / "folder") == ["new"]


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "old").touch()
    (tmp_path / "folder").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "file").symlink_to(tmp_path / "deep")
    with replacing(tmp_path / "folder") as pending:
        pending.mkdir()
        (pending / "new").touch()
    write_atomically(tmp_path / "file", b"new", error=MetricError)
    assert names(tmp_path) == ["deep", "elsewhere", "file", "folder"]
    assert names(tmp_path / "elsewhere") == ["new"]
    assert (tmp_path / "folder").is_symlink()
    assert (tmp_path / "file").is_symlink()
    assert (tmp_path / "deep").read_bytes() == b"new"


def fail(path: Path) -> None:
    with replacing(path) as pending:
        pending.write_text("half")
        raise KeyError


def test_text_that_is_no_utf_8_is_escaped(tmp_path: Path) -> None:
    write_atomically(tmp_path / "text", "Übung caf\udce9", b" and bytes", error=LcscError)
    assert (tmp_path / "text").read_text(encoding="utf-8") == r"Übung caf\udce9 and bytes"


def test_a_failure_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(KeyError):
        fail(tmp_path / "file")
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_contents_are_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    plain_sync, plain_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append("fsync"), plain_sync(descriptor))[1])
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), plain_replace(*paths))[1])
    write_atomically(tmp_path / "file", b"x", error=MetricError)
    assert calls == ["fsync", "replace", "fsync"]
    calls.clear()
    with replacing(tmp_path / "folder") as pending:
        (pending / "inner").mkdir(parents=True)
        (pending / "inner" / "file").touch()
    assert calls == ["fsync", "fsync", "fsync", "replace", "fsync"]


def test_a_lock_keeps_others_out_until_it_is_released_and_leaves_no_file(tmp_path: Path) -> None:
    for _ in range(2):
        lock = try_lock(tmp_path / "lock")
        assert lock is not None
        assert lock.is_in_place
        assert try_lock(tmp_path / "lock") is None
        lock.release()
        assert names(tmp_path) == []


def test_who_holds_a_lock_whose_file_was_removed_leaves_the_next_ones_file(tmp_path: Path) -> None:
    lock = try_lock(tmp_path / "lock")
    (tmp_path / "lock").unlink()
    other_lock = try_lock(tmp_path / "lock")
    assert lock is not None
    assert other_lock is not None
    assert not lock.is_in_place
    lock.release()
    assert other_lock.is_in_place
    other_lock.release()


def test_who_comes_second_is_told_and_waits_or_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told: list[str] = []

    def second() -> None:
        with only_process(tmp_path / "out", busy="busy"):
            told.append("made")

    with ThreadPoolExecutor() as pool:
        with only_process(tmp_path / "out", busy="never"):
            with pytest.raises(LcscError), only_process(tmp_path / "out", busy=LcscError("refused")):
                pass
            later = pool.submit(second)
            wait_until(lambda: "busy" in capsys.readouterr().err)
            told.append("first is done")
        later.result(120)
    assert told == ["first is done", "made"]
    assert names(tmp_path) == []
