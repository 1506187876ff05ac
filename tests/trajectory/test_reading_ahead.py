from __future__ import annotations

import io
from pathlib import Path

import pytest

from lcsc_opt.trajectory import reading_ahead
from lcsc_opt.trajectory.reading_ahead import ReadAhead


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Of 1000, 1001 and 1002 bytes."""
    paths = [tmp_path / f"{i}.pt" for i in range(3)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes(1000 + i))
    return paths


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch, files: list[Path]) -> dict[str, int]:
    """File name → how many bytes of it were read."""
    counted: dict[str, int] = {}

    class Counting(io.FileIO):
        def readinto(self, buffer):
            count = super().readinto(buffer)
            counted[Path(self.name).name] = counted.get(Path(self.name).name, 0) + (count or 0)
            return count

    monkeypatch.setattr(Path, "open", lambda self, *_, **__: Counting(self))
    monkeypatch.setattr(reading_ahead, "BUFFER", 64)
    return counted


def test_the_next_file_is_read_whole_and_one_after_the_other(files, read):
    with ReadAhead() as ahead:
        ahead.begin(files[1], like=files[0], used=900)
        ahead.begin(files[2], like=files[1], used=900)
        assert read["1.pt"] == 1001
        ahead._thread.join()
    assert read == {"1.pt": 1001, "2.pt": 1002}


@pytest.mark.parametrize("used", [700, 0])
def test_files_that_are_mostly_something_else_are_not_read_ahead(files, read, used):
    with ReadAhead() as ahead:
        ahead.begin(files[1], like=files[0], used=used)
    assert read == {}


def test_folders_and_files_that_are_gone_are_left_to_the_reader(files, read):
    with ReadAhead() as ahead:
        ahead.begin(files[0].parent, like=files[0], used=1000)
        ahead.begin(files[0].with_name("gone.pt"), like=files[0], used=1000)
    assert read == {}
