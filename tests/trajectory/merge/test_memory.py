"""How much memory a process may fill, by files of the system as they are on machines and in containers."""

from __future__ import annotations

from pathlib import Path

import pytest

from lcsc_opt.trajectory.merge.memory import available_bytes

MIB = 2**20


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text(
        "MemTotal: 2048 kB\nMemFree: 1 kB\nMemAvailable:    1024 kB\nHugePages: 0\n"
    )
    return tmp_path / "proc"


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_a_machine_without_limits_says_what_is_available(proc: Path, tmp_path: Path) -> None:
    assert available_bytes(proc, tmp_path / "none") == MIB
    (proc / "self" / "cgroup").write_text("0::/user.slice\n")
    group(tmp_path / "cgroup" / "user.slice", memory__max="max\n")
    assert available_bytes(proc, tmp_path / "cgroup") == MIB


def test_a_limit_leaves_what_it_allows_less_what_cannot_be_dropped(proc: Path, tmp_path: Path) -> None:
    (proc / "self" / "cgroup").write_text("0::/job/step\n")
    group(tmp_path / "job" / "step", memory__max="max\n", memory__stat="anon 0\nfile 0\n")
    group(tmp_path / "job", memory__max="500000\n", memory__stat="anon 100000\nfile 390000\nshmem 10000\n")
    assert available_bytes(proc, tmp_path) == 390_000
    group(tmp_path / "job", memory__max="90000\n")
    assert available_bytes(proc, tmp_path) == 0


def test_version_one_has_the_same_under_other_names(proc: Path, tmp_path: Path) -> None:
    (proc / "self" / "cgroup").write_text("5:cpu:/elsewhere\n4:memory:/limited\n0::/\n")
    group(tmp_path / "memory", memory__limit_in_bytes="9223372036854771712\n")
    stat = "cache 5\nrss 7\ntotal_cache 400000\ntotal_rss 50000\ntotal_shmem 0\n"
    group(tmp_path / "memory" / "limited", memory__limit_in_bytes="400000\n", memory__stat=stat)
    assert available_bytes(proc, tmp_path) == 350_000


def test_in_a_container_the_groups_path_is_that_of_the_host(proc: Path, tmp_path: Path) -> None:
    (proc / "self" / "cgroup").write_text("0::/docker/0123456789\n")
    group(tmp_path / "cgroup", memory__max="300000\n", memory__stat="anon 1\n")
    assert available_bytes(proc, tmp_path / "cgroup") == 299_999


def test_systems_that_do_not_say(tmp_path: Path) -> None:
    assert available_bytes(tmp_path, tmp_path) is None
