"""Where there is no Ray cluster that could evaluate a study: one line each, and nothing stored."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.evaluation.file_shipping import NodeObjective, PackedTrajectory
from lcsc_opt.objective.loading import load_objective
from lcsc_opt.trajectory import Trajectory
from tests.study_files import read_study_file

ray = pytest.importorskip("ray")

from tests.evaluation.ray_clusters import (  # noqa: E402
    SPEC,
    free_port,
    refused,
    study_file,
)


def test_addresses_where_no_cluster_is_are_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = f"127.0.0.1:{free_port()}"
    assert f"workers.ray: nothing listens at {nowhere} (" in refused(folder, capsys, "--ray", nowhere)
    assert f"nothing listens at {nowhere} (" in refused(folder, capsys, "--ray", nowhere, "--dry-run")
    assert "expected host:port, or auto, got 'head'" in refused(folder, capsys, "--ray", "head")
    assert "run lcsc on a machine of the cluster" in refused(folder, capsys, "--ray", "ray://head:10001")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install ray" in refused(folder, capsys, "--ray", nowhere)


def test_a_node_without_room_for_the_trajectory_says_so(own_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LCSC_CACHE", str(own_files / "cache"))
    packed = PackedTrajectory.of(Trajectory.open(own_files / "run.trajectory"))
    huge = dataclasses.replace(packed, path=Path("/not/there"), size=10**18)
    with pytest.raises(StudySpecError, match=r"no room for the trajectory: 1000000000.00 GB, and .* GB are free"):
        huge.found()


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


@pytest.mark.parametrize(
    ("coordinator", "said"),
    [
        ({"python": "2.7", "cores": 999}, None),
        ({"blas": []}, "has other software than the coordinator: blas "),
        ({"lcsc_opt's code": "another"}, "has other software than the coordinator: lcsc_opt's code "),
    ],
)
def test_other_software_is_what_changes_results(own_files: Path, coordinator: dict[str, Any], said: str | None) -> None:
    copies = own_files.with_name("copies")
    load = NodeObjective.collect(SPEC, own_files, load_objective(SPEC, beside=own_files), copies)
    refused = dataclasses.replace(load, software={**load.software, **coordinator}).check()
    assert refused is None if said is None else str(refused).startswith(said)
