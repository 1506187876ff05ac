"""Searches on a real Ray cluster of this machine."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lcsc_opt.base.errors import ClusterError, StudySpecError
from lcsc_opt.base.study_file import ObjectiveSpec, RayWorkers, on_ray, read_study_file
from lcsc_opt.cli import run as lcsc
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import StoredStudy, study_names
from lcsc_opt.evaluation import ProcessEvaluator
from lcsc_opt.evaluation.nodes import Packed, differences, software
from lcsc_opt.objective.loading import load_objective
from lcsc_opt.search.plan import stored_plan
from lcsc_opt.trajectory import Trajectory, TrajectoryWriter
from tests.evaluation import staged_examples
from tests.evaluation.staged_examples import candidate

ray = pytest.importorskip("ray")

from lcsc_opt.evaluation.ray import ray_cluster  # noqa: E402
from lcsc_opt.evaluation.ray_worker import Files, Read  # noqa: E402
from tests.evaluation.ray_clusters import add_node, connected, processes, small_cluster, wait_for  # noqa: E402

OBJECTIVE = """
from tests.evaluation.ray_clusters import Logged
from tests.evaluation.staged_examples import EnvironmentInLoss, Slow

KINDS = {"logged": Logged, "device": EnvironmentInLoss, "slow": Slow}


def build(settings):
    settings.pop("device", None)
    return KINDS[settings.pop("kind", "logged")](**settings)
"""
OPTIMIZERS = ["CMA", "LCSC", "LCSCGradient"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    other = {"LCSC_CACHE": str(tmp_path_factory.mktemp("other") / "cache")}
    with small_cluster(
        {"num_cpus": 2, "node_name": "one"}, {"num_cpus": 2, "node_name": "two", "env_vars": other}
    ) as c:
        c.other_cache = Path(other["LCSC_CACHE"])
        yield c


@pytest.fixture
def folder(workplace: Path) -> Path:
    (workplace / "stages_on_ray.py").write_text(OBJECTIVE)
    return workplace


def study_file(folder: Path, **changes: Any) -> str:
    own = {"objective": {"file": "stages_on_ray.py"}, "workers": {"ray": 3}}
    return staged_examples.study_file(folder, **{**own, **changes})


def trials(url: str, name: str) -> list[tuple[Any, ...]]:
    study = StoredStudy.open(open_storage(url, write=False), name)
    return [(t.number, t.user_attrs["coefficients"], t.value, t.state.name) for t in study.trials()]


def attempts(url: str, name: str) -> list[str]:
    study = StoredStudy.open(open_storage(url, write=False), name)
    return [failed["reason"] for trial in study.trials() for failed in trial.user_attrs.get("attempts", ())]


def kill_while(running: subprocess.Popen[str], cluster: Any, log: Path, kills: int) -> list[int]:
    """Kill the process that samples now and then, and a whole node once, which another one replaces."""
    victim, killed, seen = add_node(cluster, num_cpus=1, node_name="victim"), list[int](), 0
    while running.poll() is None:
        time.sleep(0.02)
        now = processes(log)
        if len(killed) < kills and len(now) >= seen + 6 and now[-1] not in killed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(now[-1], signal.SIGKILL)
                killed.append(now[-1])
            seen = len(now)
            if len(killed) == 2:
                cluster.remove_node(victim, allow_graceful=False)
                victim = add_node(cluster, num_cpus=1, node_name="later")
    cluster.remove_node(victim)
    return killed


def search(*arguments: str) -> subprocess.Popen[str]:
    """``lcsc run`` in a process of its own."""
    command = [sys.executable, "-c", "from lcsc_opt.cli import main; main()", "run", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_trials_are_those_of_local_workers_while_workers_and_a_node_are_killed(folder: Path, cluster: Any) -> None:
    shared = {"optimizers": OPTIMIZERS, "budget": {"evaluations": 10}, "failures": {"retries": 10}}
    assert lcsc(["run", study_file(folder, workers=3, **shared)]) == 0
    log = folder / "log"
    settings = {"log": str(log), "seconds": 0.03}
    file = study_file(folder, objective={"file": "stages_on_ray.py", "settings": settings}, **shared)
    with search(file, "--ray", cluster.address, "--storage", "sqlite:///r.db") as running:
        killed = kill_while(running, cluster, log, kills=4)
        assert running.stderr is not None
        said = running.stderr.read()
    assert running.returncode == 0, said
    for optimizer in OPTIMIZERS:
        assert trials("sqlite:///r.db", f"e/{optimizer}/0") == trials("sqlite:///e.db", f"e/{optimizer}/0")
    reasons = [reason for optimizer in OPTIMIZERS for reason in attempts("sqlite:///r.db", f"e/{optimizer}/0")]
    assert len(killed) == 4
    assert any(reason.startswith("the worker on node ") for reason in reasons)


@pytest.mark.slow
def test_studies_side_by_side_have_the_trials_of_local_ones(folder: Path, cluster: Any) -> None:
    shared = {"optimizers": ["CMA", "LCSCGradient"], "seeds": [0, 1]}
    assert lcsc(["run", study_file(folder, workers=2, **shared), "--one-by-one"]) == 0
    on = {"ray": 2, "address": cluster.address}
    assert lcsc(["run", study_file(folder, workers=on, **shared), "--parallel", "--storage", "sqlite:///r.db"]) == 0
    for name in ("e/CMA/0", "e/CMA/1", "e/LCSCGradient/0", "e/LCSCGradient/1"):
        assert trials("sqlite:///r.db", name) == trials("sqlite:///e.db", name)


def test_a_study_goes_on_where_it_began_and_elsewhere(folder: Path, cluster: Any) -> None:
    file = study_file(folder, workers={"ray": 2, "address": cluster.address}, budget={"evaluations": 4})
    assert lcsc(["run", file]) == 0
    stored = StoredStudy.open(open_storage("sqlite:///e.db", write=False), "e/CMA/0")
    assert stored_plan(stored).ray == RayWorkers(ray=2, address=cluster.address)  # lcsc resume goes there again
    assert lcsc(["run", file, "workers=2", "budget.evaluations=8"]) == 0
    assert stored_plan(stored).ray is None
    whole = study_file(folder, workers=2, budget={"evaluations": 8}, storage="sqlite:///w.db")
    assert lcsc(["run", whole]) == 0
    assert trials("sqlite:///e.db", "e/CMA/0") == trials("sqlite:///w.db", "e/CMA/0")


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str, **changes: Any) -> str:
    """The one line that a study is refused with; nothing of it is stored."""
    capsys.readouterr()
    assert lcsc(["run", study_file(folder, **changes), *arguments]) == 2
    assert study_names(open_storage("sqlite:///e.db", write=True)) == []
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("database: ")]
    assert len(lines) == 1
    return lines[0]


def test_addresses_where_no_cluster_is_are_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = f"127.0.0.1:{free_port()}"
    assert f"workers.ray: nothing listens at {nowhere} (" in refused(folder, capsys, "--ray", nowhere)
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
    assert "at most 0 and 2 on one" in refused(folder, capsys, workers={"ray": 2, "cpus": 3, **on})


def test_a_node_with_other_software_is_refused_by_its_name(
    folder: Path, capsys: pytest.CaptureFixture[str], cluster: Any
) -> None:
    package = folder / "installed" / "nevergrad-99.0.dist-info" / "METADATA"
    package.parent.mkdir(parents=True)
    package.write_text("Metadata-Version: 2.1\nName: nevergrad\nVersion: 99.0\n")
    path = {"PYTHONPATH": os.pathsep.join([str(package.parents[1]), str(Path(__file__).parents[2])])}
    node = add_node(cluster, num_cpus=1, node_name="other", env_vars=path)
    try:
        said = refused(folder, capsys, "--ray", cluster.address)
    finally:
        cluster.remove_node(node)
    assert "node other: has other software than the coordinator: nevergrad " in said
    assert said.endswith("→ 99.0; install the same there")


def test_workers_have_the_devices_that_ray_is_asked_for(folder: Path, cluster: Any) -> None:
    node = add_node(cluster, num_cpus=4, num_gpus=2, node_name="gpus")
    objective = {"file": "stages_on_ray.py", "settings": {"kind": "device"}}
    try:
        for name, workers, expected in (
            ("each", {"ray": 1}, ({0.0}, {1.0})),  # where there are GPUs, a worker has one of them
            ("none", {"ray": 1, "gpus": 0}, ({-1.0},)),
        ):
            settings = {"workers": {**workers, "address": cluster.address}, "objective": objective}
            assert lcsc(["run", study_file(folder, name=name, **settings)]) == 0
            assert {trial[2] for trial in trials("sqlite:///e.db", f"{name}/CMA/0")} in expected
    finally:
        cluster.remove_node(node)


def test_an_interrupt_gives_everything_back_within_ten_seconds(folder: Path, cluster: Any) -> None:
    marker = folder / "samples"
    # nodes have no such variable: the objective's file sets it
    (folder / "stages_on_ray.py").write_text(
        f"import os\nos.environ['LCSC_TEST_MARKER'] = {str(marker)!r}\n" + OBJECTIVE
    )
    file = study_file(folder, objective={"file": "stages_on_ray.py", "settings": {"kind": "slow"}})
    running = search(file, "--ray", cluster.address)
    try:
        assert wait_for(marker.exists)
        running.send_signal(signal.SIGINT)
        start = time.monotonic()
        _, said = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 130, said
    assert "interrupted" in said
    with connected(cluster):
        assert wait_for(lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"])
    assert time.monotonic() - start < 10


@pytest.fixture
def own_files(folder: Path) -> Path:
    """A study with an objective of its own, a module beside it, a file of data, and checkpoints."""
    own = folder / "own"
    own.mkdir()
    (own / "ray_own_objective.py").write_text(
        "from pathlib import Path\n"
        "from lcsc_opt.base.paths import cache_directory, given_path\n"
        "from lcsc_opt.trajectory.opening import open_or_pack\n"
        "import ray_own_module\n\n\n"
        "def build(settings):\n"
        "    number = float(given_path(settings['data']).read_text())\n"
        "    made = ray_own_module.Own(number)\n"
        "    checkpoints = str(given_path(settings['checkpoints']))\n"
        "    made.trajectory = open_or_pack(checkpoints, cache=cache_directory())\n"
        "    return made\n"
    )
    (own / "ray_own_module.py").write_text(
        "from tests.evaluation.staged_examples import Stages\n\n\n"
        "class Own(Stages):\n"
        "    def __init__(self, number):\n"
        "        super().__init__()\n"
        "        self.number = number\n\n"
        "    def score(self, candidate, parts, *, gradient=False):\n"
        "        import dataclasses\n"
        "        evaluation, back = super().score(candidate, parts, gradient=gradient)\n"
        "        return dataclasses.replace(evaluation, loss=self.number), back\n"
    )
    (own / "data").mkdir()
    (own / "data" / "number.txt").write_text("4.25")
    with TrajectoryWriter(own / "run.trajectory") as writer:
        for step in (1, 2, 3):
            writer.append(step, {"weights": torch.full((1000,), float(step))})
    return own


SPEC = ObjectiveSpec(file="ray_own_objective.py", settings={"data": "data/number.txt", "checkpoints": "run.trajectory"})


def test_the_study_s_own_files_travel_with_the_job(own_files: Path, cluster: Any) -> None:
    objective = load_objective(SPEC, beside=own_files)
    wanted = RayWorkers(ray=1, address=cluster.address)
    packed = Trajectory.open(own_files / "run.trajectory")
    with ray_cluster(wanted, SPEC, objective, study=own_files, packed=packed) as connection:
        hidden = own_files.rename(own_files.with_name("hidden"))  # nodes have no such folder, but have what travelled
        assert connection._load.packed is not None
        of_coordinator = Packed.of(Trajectory.open(hidden / "run.trajectory"))  # only what it reads has moved along
        connection._load = dataclasses.replace(connection._load, packed=(of_coordinator, connection._load.packed[1]))
        with contextlib.closing(connection.pool()) as pool:
            outcome = ProcessEvaluator(pool).submit(candidate(1.0, 0.0, 0.0)).result(timeout=120)
    assert getattr(outcome, "loss", outcome) == 4.25


def test_a_trajectory_that_a_node_does_not_see_goes_into_its_cache(own_files: Path, cluster: Any) -> None:
    trajectory = Trajectory.open(own_files / "run.trajectory")
    packed = dataclasses.replace(Packed.of(trajectory), path=Path("/not/there"))
    with connected(cluster):
        read = Read(ray.remote(Files).options(num_cpus=0).remote(trajectory.path))
        [two] = [node["NodeID"] for node in ray.nodes() if node["NodeName"] == "two" and node["Alive"]]
        strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(two, soft=False)
        there = ray.remote(found).options(num_cpus=0, scheduling_strategy=strategy)
        assert (
            ray.get(there.remote(packed, read))
            == ray.get(there.remote(packed, read))
            == cluster.other_cache / packed.in_cache
        )
    assert Trajectory.open(cluster.other_cache / packed.in_cache).sha256 == trajectory.sha256


def found(packed: Packed, read: Read) -> Path:
    return packed.found(read)


def test_a_node_without_room_for_the_trajectory_says_so(own_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LCSC_CACHE", str(own_files / "cache"))
    packed = Packed.of(Trajectory.open(own_files / "run.trajectory"))
    huge = dataclasses.replace(packed, path=Path("/not/there"), sizes={"weights.bin": 10**18})
    with pytest.raises(ClusterError, match=r"no room for the trajectory: 1000000000.00 GB, and .* GB are free"):
        huge.found(lambda *_: b"")


def test_workers_of_a_cluster_in_a_study_file(folder: Path) -> None:
    spec = read_study_file(Path(study_file(folder, workers={"ray": 16, "gpus": 1, "cpus": 4, "address": "auto"})))
    assert spec.workers == RayWorkers(ray=16, gpus=1, cpus=4)
    assert on_ray(spec.workers, "head:6379") == RayWorkers(ray=16, gpus=1, cpus=4, address="head:6379")
    assert on_ray(2, "auto") == RayWorkers(ray=2)
    with pytest.raises(StudySpecError, match="--ray: workers counts the devices of this machine; give a number"):
        on_ray("auto", "auto")


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
