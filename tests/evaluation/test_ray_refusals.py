"""Clusters of Ray that cannot evaluate a study: one line each, and nothing stored."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lcsc_opt.base.errors import ClusterError, StudySpecError
from lcsc_opt.base.study_file import RayWorkers, read_study_file
from lcsc_opt.cli import run as lcsc
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.evaluation.nodes import Packed, differences, software
from lcsc_opt.search.plan import stored_plan
from lcsc_opt.trajectory import Trajectory

ray = pytest.importorskip("ray")

from tests.evaluation.ray_clusters import (  # noqa: E402
    ROOT,
    SPEC,
    add_node,
    study_file,
)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str, **changes: Any) -> str:
    """The one line that a study is refused with; nothing of it is stored."""
    capsys.readouterr()
    assert lcsc(["run", study_file(folder, **changes), *arguments]) == 2
    assert not list(folder.glob("*.db*"))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_addresses_where_no_cluster_is_are_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = f"127.0.0.1:{free_port()}"
    assert f"workers.ray: nothing listens at {nowhere} (" in refused(folder, capsys, "--ray", nowhere)
    assert f"nothing listens at {nowhere} (" in refused(folder, capsys, "--ray", nowhere, "--dry-run")
    assert "expected host:port, or auto, got 'head'" in refused(folder, capsys, "--ray", "head")
    assert "run lcsc on a machine of the cluster" in refused(folder, capsys, "--ray", "ray://head:10001")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install 'lcsc-opt[ray]'" in refused(folder, capsys, "--ray", nowhere)


def test_a_cluster_that_is_too_small_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], cluster: Any
) -> None:
    on = {"address": cluster.address}
    said = refused(folder, capsys, workers={"ray": 2, "gpus": 1, **on})
    assert "2 workers with 1 GPUs and 1 CPUs each are asked for, and the cluster has 0 GPUs and 4 CPUs" in said
    assert "lower gpus and cpus, or add nodes" in said
    assert said == refused(folder, capsys, "--dry-run", workers={"ray": 2, "gpus": 1, **on})
    assert "at most 0 and 2 on one" in refused(folder, capsys, workers={"ray": 2, "cpus": 3, **on})


def test_a_dry_run_looks_at_the_cluster_and_leaves_nothing_behind(
    folder: Path, capsys: pytest.CaptureFixture[str], cluster: Any
) -> None:
    file = study_file(folder, workers={"ray": 9, "address": cluster.address})
    assert lcsc(["run", file, "--dry-run"]) == 0
    assert "the cluster has room for 4 of 9 workers" in capsys.readouterr().err
    assert not list(folder.glob("*.db*"))
    assert not ray.is_initialized()


def test_a_study_stays_on_its_cluster_where_another_one_is_refused(folder: Path, cluster: Any) -> None:
    file = study_file(folder, workers={"ray": 1, "address": cluster.address}, budget={"evaluations": 2})
    assert lcsc(["run", file]) == 0
    nowhere = f"127.0.0.1:{free_port()}"
    assert lcsc(["run", file, "budget.evaluations=4", "--ray", nowhere]) == 2
    stored = StoredStudy.open(open_storage("sqlite:///e.db", write=False), "e/CMA/0")
    assert stored_plan(stored).ray == RayWorkers(ray=1, address=cluster.address)
    assert len(stored.trials()) == 2


def test_a_node_with_other_software_is_refused_by_its_name(
    folder: Path, capsys: pytest.CaptureFixture[str], cluster: Any
) -> None:
    package = folder / "installed" / "nevergrad-99.0.dist-info" / "METADATA"
    package.parent.mkdir(parents=True)
    package.write_text("Metadata-Version: 2.1\nName: nevergrad\nVersion: 99.0\n")
    with other_node(cluster, package.parents[1]):
        said = refused(folder, capsys, "--ray", cluster.address)
    assert "node other: has other software than the coordinator: nevergrad " in said
    assert said.endswith("→ 99.0; install the same there")


@pytest.mark.slow
def test_a_node_with_other_code_is_refused_by_its_name(
    folder: Path, capsys: pytest.CaptureFixture[str], cluster: Any
) -> None:
    copied = folder / "installed"
    shutil.copytree(ROOT / "lcsc_opt", copied / "lcsc_opt", ignore=shutil.ignore_patterns("__pycache__"))
    with (copied / "lcsc_opt" / "base" / "records.py").open("a") as file:
        file.write("OF_ANOTHER_VERSION = 1\n")
    with other_node(cluster, copied):
        said = refused(folder, capsys, "--ray", cluster.address)
    assert "node other: has other software than the coordinator: lcsc_opt's code " in said


@contextlib.contextmanager
def other_node(cluster: Any, first: Path) -> Iterator[None]:
    """A node where Python finds this folder first."""
    path = {"PYTHONPATH": os.pathsep.join([str(first), str(ROOT)])}
    node = add_node(cluster, num_cpus=1, node_name="other", env_vars=path)
    try:
        yield
    finally:
        cluster.remove_node(node)


def test_a_node_without_room_for_the_trajectory_is_refused_by_its_name(
    own_files: Path, capsys: pytest.CaptureFixture[str], cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = Packed.of(Trajectory.open(own_files / "run.trajectory"))
    huge = dataclasses.replace(packed, path=Path("/not/there"), in_cache=Path("no"), sizes={"weights.bin": 10**18})
    monkeypatch.setattr(Packed, "of", classmethod(lambda *_: huge))  # no node has the place, or the room
    monkeypatch.chdir(own_files)
    objective = {"file": SPEC.file, "settings": dict(SPEC.settings)}
    said = refused(own_files, capsys, "--ray", cluster.address, objective=objective)
    assert re.search(r"node (one|two): no room for the trajectory: 1000000000.00 GB, and .* GB are free in ", said)


def test_a_node_without_room_for_the_trajectory_says_so(own_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LCSC_CACHE", str(own_files / "cache"))
    packed = Packed.of(Trajectory.open(own_files / "run.trajectory"))
    huge = dataclasses.replace(packed, path=Path("/not/there"), sizes={"weights.bin": 10**18})
    with pytest.raises(ClusterError, match=r"no room for the trajectory: 1000000000.00 GB, and .* GB are free"):
        huge.found(lambda *_: b"")


@pytest.mark.parametrize(
    ("workers", "said"),
    [
        ({"ray": 0}, "workers: ray: expected greater than or equal to 1, got 0"),
        ({"ray": 2, "gpu": 1}, "workers: gpu: unknown key (did you mean 'gpus'?)"),
        ({"ray": 2, "gpus": 1.5}, "workers: gpus: expected a part of one, or a whole number, got 1.5"),
    ],
)
def test_wrong_workers_of_a_cluster_are_one_line(folder: Path, workers: dict[str, Any], said: str) -> None:
    with pytest.raises(StudySpecError) as error:
        read_study_file(Path(study_file(folder, workers=workers)))
    assert said in str(error.value)


def test_other_software_is_what_changes_results() -> None:
    here = software()
    assert differences(here, {**here, "python": "2.7", "cores": 999, "blas": []}) == ""
    assert differences(here, {**here, "blas": ["openblas 1 SkylakeX"]}).startswith("blas ")
    assert differences(here, {**here, "lcsc_opt's code": "another"}).startswith("lcsc_opt's code ")
