"""Searches on a real Ray cluster of this machine, and clusters that cannot evaluate them."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shutil
import signal
import sys
import time
import types
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lcsc_opt.base.errors import StudySpecError, TrajectoryError
from lcsc_opt.base.paths import BuildContext
from lcsc_opt.base.records import CHANNELS_LAST
from lcsc_opt.base.reproducibility import environment
from lcsc_opt.base.study_spec import RayWorkers
from lcsc_opt.cli import run as lcsc
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import StoredStudy, read_contents
from lcsc_opt.evaluation import node_objective
from lcsc_opt.evaluation.node_objective import NodeObjective
from lcsc_opt.evaluation.pool import ProcessEvaluator
from lcsc_opt.experiment.stored import spec_of
from lcsc_opt.objective.loading import load_objective
from lcsc_opt.trajectory import TrajectoryWriter
from tests.commands import Typed
from tests.database_servers import free_port
from tests.evaluation.staged_examples import SLOW_SECONDS, candidate, evaluated, expect_no_lost_node
from tests.processes import Lcsc, lcsc_process, wait_until

ray = pytest.importorskip("ray")

from lcsc_opt.evaluation.ray import _RayLink, ray_workers  # noqa: E402
from tests.evaluation.ray_clusters import (  # noqa: E402
    OBJECTIVE,
    SPEC,
    connected,
    refused,
    study_file,
    trials,
)

pytestmark = pytest.mark.skipif(" " in sys.executable, reason="Ray starts no Python whose path has a space")


@pytest.mark.slow
def test_trials_are_those_of_this_process_although_a_worker_is_killed(folder: Path, cluster: Any) -> None:
    """And the study goes on where it began, or elsewhere."""
    shared = {"optimizers": ["LCSCGradient"], "budget": {"evaluations": 6}}
    assert lcsc(["run", study_file(folder, workers=1, **shared)]) == 0
    objective = {"file": "stages_on_ray.py", "settings": {"log": str(folder / "log"), "dies": [22]}}
    file = study_file(folder, objective=objective, workers={"ray": 2, "gpus": 0}, **shared)
    on_cluster = ("--ray", cluster.address, "--storage", "sqlite:///r.db")
    ended = lcsc_process("run", file, *on_cluster, first=expect_no_lost_node)
    assert ended.status == 0, ended
    assert "raylet" not in ended.out + ended.err, "Ray's own reports of deaths"
    name = "e/LCSCGradient/0"
    for there, here in zip(trials("sqlite:///r.db", name), trials("sqlite:///e.db", name), strict=True):
        np.testing.assert_allclose(there[1], here[1], rtol=1e-9)
        assert there[2] == pytest.approx(here[2], rel=1e-9)
    study = StoredStudy.open(open_storage("sqlite:///r.db", write=False), name)
    [reason] = [failed["reason"] for trial in study.trials() for failed in trial.user_attrs.get("attempts", ())]
    assert reason.startswith("the worker on node ")

    more = ["run", file, "--storage", "sqlite:///r.db", "budget.evaluations=7"]
    assert lcsc([*more, "--ray", f"127.0.0.1:{free_port()}"]) == 2
    stored = spec_of(name, read_contents(study.storage))
    assert stored.ray == RayWorkers(ray=2, gpus=0, address=cluster.address)  # lcsc run goes there again
    assert len(study.trials()) == 6
    assert lcsc([*more, "workers=2"]) == 0
    assert spec_of(name, read_contents(study.storage)).ray is None


def test_a_worker_without_gpus_sees_none_and_an_interrupt_gives_everything_back(folder: Path, cluster: Any) -> None:
    marker, seen = folder / "samples", folder / "seen"
    # nodes have no such variable: the objective's file sets it
    (folder / "stages_on_ray.py").write_text(
        "import os\nimport pathlib\n"
        f"os.environ['LCSC_TEST_MARKER'] = {str(marker)!r}\n"
        f"pathlib.Path({str(seen)!r}).write_text(os.environ.get('CUDA_VISIBLE_DEVICES', 'all'))\n" + OBJECTIVE
    )
    workers = {"ray": 2, "cpus": 2, "gpus": 0}
    file = study_file(folder, objective={"file": "stages_on_ray.py", "settings": {"kind": "slow"}}, workers=workers)
    running = Lcsc("run", file, "--ray", cluster.address)
    wait_until(lambda: marker.exists() or running.process.exitcode is not None)
    assert running.process.exitcode is None, running.wait()
    assert seen.read_text() == ""
    running.signal(signal.SIGINT)
    start = time.monotonic()
    ended = running.wait()
    assert ended.status == 130, ended
    assert "the cluster has room for 1 of 2 workers" in ended.err
    assert "interrupted" in ended.err
    with connected(cluster):
        wait_until(lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"])
    assert time.monotonic() - start < SLOW_SECONDS / 2


def test_the_study_s_own_code_travels_with_the_job_to_a_worker_with_a_gpu(own_files: Path, cluster: Any) -> None:
    packed = (own_files / "run.trajectory").rename(own_files.with_name("run.trajectory"))  # nodes see it
    spec = SPEC.model_copy(update={"settings": {**SPEC.settings, "checkpoints": str(packed)}})
    objective = load_objective(spec, BuildContext(own_files))
    wanted = RayWorkers(ray=1, cpus=2, address=cluster.address)
    expected = objective.key
    with ray_workers(wanted, spec, objective, expected=expected, context=BuildContext(own_files)) as pool:
        own_files.rename(own_files.with_name("hidden"))  # nodes have no such folder, but have what travelled
        found = evaluated(ProcessEvaluator(pool).submit(candidate(1.0, 0.0, 0.0)))
    assert found.loss == 4.25
    assert found.metrics["gpu"] in (0.0, 1.0)  # where there are GPUs, a worker has one of them


@pytest.mark.parametrize("has_others", [False, True])
def test_a_node_without_the_checkpoints_at_the_place_is_one_line(own_files: Path, has_others: bool) -> None:
    copies = own_files.with_name("copies")
    load = NodeObjective.collect(SPEC, BuildContext(own_files), load_objective(SPEC, BuildContext(own_files)), copies)
    assert load().trajectory is not None
    shutil.rmtree(own_files / "run.trajectory")
    if has_others:
        with TrajectoryWriter(own_files / "run.trajectory") as writer:
            for step in (1, 2, 3):
                writer.append(step, {"weights": torch.full((1000,), 2.0 * step)})
    place = re.escape(str(own_files / "run.trajectory"))
    said = rf"^has no {place} with the checkpoints of the search; put it, or the study's database,"
    with pytest.raises(TrajectoryError, match=said):
        load()


def test_a_node_lays_the_weights_out_as_the_search_does(own_files: Path) -> None:
    objective = load_objective(SPEC, BuildContext(own_files), layout=CHANNELS_LAST)
    load = NodeObjective.collect(SPEC, BuildContext(own_files), objective, own_files.with_name("copies"))
    assert load().layout == CHANNELS_LAST


def test_a_cluster_that_is_too_small_is_one_line(folder: Path, typed: Typed, cluster: Any) -> None:
    on = {"address": cluster.address}
    said = refused(folder, typed, workers={"ray": 2, "gpus": 3, **on})
    assert "2 workers with 3 GPUs and 1 CPUs each are asked for, and the cluster has 2 GPUs and 3 CPUs" in said
    assert "at most 2 and 2 on one" in refused(folder, typed, "--dry-run", workers={"ray": 2, "cpus": 3, **on})
    assert not list(folder.glob("*.db*"))
    assert not ray.is_initialized()


def test_a_job_that_a_worker_cannot_read_is_the_cause_of_its_end() -> None:
    unread: Future[Any] = Future()
    called = types.SimpleNamespace(future=lambda: unread)
    actor = types.SimpleNamespace(ready=types.SimpleNamespace(remote=lambda: called))
    kills: list[Any] = []
    there = [{"NodeID": "1", "NodeName": "one", "NodeManagerAddress": "", "Alive": True}]
    cluster = types.SimpleNamespace(
        exceptions=ray.exceptions, nodes=lambda: there, kill=lambda actor, **_: kills.append(actor)
    )
    link = _RayLink(cluster, actor)
    link.node = "1"
    error = FileNotFoundError("no such file: prompts.txt")
    unread.set_exception(ray.exceptions.RayTaskError("do", "Traceback …", error).as_instanceof_cause())
    assert link.join() == ("the worker on node one died (FileNotFoundError: no such file: prompts.txt)", True)
    assert kills == [actor]


def test_a_node_with_other_software_is_refused_by_its_name(
    folder: Path, typed: Typed, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = environment()
    known["packages"]["nevergrad"] = "99.0"
    monkeypatch.setattr(node_objective, "environment", lambda: known)  # of the coordinator
    workers = {"ray": 1, "gpus": 0, "address": cluster.address}
    said = typed("run", study_file(folder, workers=workers), status=2).err
    assert re.search("node (one|two): has other software than the coordinator: nevergrad .*, not 99.0; install", said)


def test_addresses_where_no_cluster_is_are_one_line(
    folder: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = f"127.0.0.1:{free_port()}"
    assert f"workers.ray: nothing listens at {nowhere} (" in refused(folder, typed, "--ray", nowhere)
    assert f"nothing listens at {nowhere} (" in refused(folder, typed, "--ray", nowhere, "--dry-run")
    assert "expected host:port, or auto, got 'head'" in refused(folder, typed, "--ray", "head")
    assert "expected host:port, or auto, got 'ray://head:10001'" in refused(folder, typed, "--ray", "ray://head:10001")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "lcsc-opt[ray]" in refused(folder, typed, "--ray", nowhere)


@pytest.mark.parametrize(
    ("coordinator", "said"),
    [
        ({"python": "2.7", "cores": 999}, None),
        ({"blas": []}, "has other software than the coordinator: blas "),
    ],
)
def test_other_software_is_what_changes_results(own_files: Path, coordinator: dict[str, Any], said: str | None) -> None:
    copies = own_files.with_name("copies")
    load = NodeObjective.collect(SPEC, BuildContext(own_files), load_objective(SPEC, BuildContext(own_files)), copies)
    load = dataclasses.replace(load, software={**load.software, **coordinator})
    with contextlib.nullcontext() if said is None else pytest.raises(StudySpecError, match=said):
        load()
