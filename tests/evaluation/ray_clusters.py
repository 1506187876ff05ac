"""A small Ray cluster on this machine, and an objective that says where it runs."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from lcsc_opt.base.records import Candidate, Coefficients, Cost
from lcsc_opt.base.study_file import ObjectiveSpec
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import StoredStudy
from tests.evaluation import staged_examples
from tests.evaluation.staged_examples import Part, Stages

OBJECTIVE = """
from tests.evaluation.ray_clusters import Logged
from tests.evaluation.staged_examples import EnvironmentInLoss, Slow

KINDS = {"logged": Logged, "device": EnvironmentInLoss, "slow": Slow}


def build(settings):
    settings.pop("device", None)
    return KINDS[settings.pop("kind", "logged")](**settings)
"""
SPEC = ObjectiveSpec(file="ray_own_objective.py", settings={"data": "data/number.txt", "checkpoints": "run.trajectory"})
ROOT = Path(__file__).parents[2]
MEMORY = 80 * 2**20  # bytes of each node's object store, the least that Ray takes
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}  # other tests are not nice


@contextlib.contextmanager
def small_cluster(*nodes: dict[str, Any]) -> Iterator[Cluster]:
    """A head that evaluates nothing, and these nodes."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    head = {"num_cpus": 0, "object_store_memory": MEMORY, "node_name": "head", "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={**head, "env_vars": ENVIRONMENT})
    try:
        for node in nodes:
            add_node(cluster, **node)
        yield cluster
    finally:
        cluster.shutdown()


def add_node(cluster: Cluster, *, env_vars: dict[str, str] | None = None, **node: Any) -> Any:
    """One more machine."""
    return cluster.add_node(**{"object_store_memory": MEMORY, "env_vars": {**ENVIRONMENT, **(env_vars or {})}, **node})


@contextlib.contextmanager
def connected(cluster: Cluster) -> Iterator[None]:
    """This process asks the cluster something."""
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.CRITICAL)
    try:
        yield
    finally:
        ray.shutdown()


LINE = 12  # characters of a line of the log


class Logged(Stages):
    """Takes a moment; writes down which process samples; samples again what another process has sampled.

    The samples of all processes are counted: that with a number in ``dies`` kills its process, and from the
    ``waits``-th on they wait until ``go`` is there.
    """

    def __init__(self, log: str = "", dies: Sequence[int] = (), waits: int = 0, go: str = "") -> None:
        super().__init__()
        self.log_file, self.dies, self.waits, self.go = log, dies, waits, Path(go)

    def sample(
        self, candidate: Candidate, prepared: Coefficients, first: int, last: int, *, gradient: bool = False
    ) -> Part:
        if self.log_file:
            number = self._written()
            if number in self.dies:
                os.kill(os.getpid(), signal.SIGKILL)
            assert not self.waits or number < self.waits or wait_for(self.go.exists)
        return super().sample(candidate, prepared, first, last, gradient=gradient)

    def _written(self) -> int:
        with Path(self.log_file).open("ab", buffering=0) as file:
            file.write(f"{os.getpid():{LINE - 1}}\n".encode())
            return file.tell() // LINE  # where this line ends, whatever others have written since

    def slope(self, candidate: Candidate, first: int, last: int, back: float) -> tuple[Coefficients, Cost]:
        self.kept = candidate
        return super().slope(candidate, first, last, back)


def processes(log: Path) -> list[int]:
    """Those that have sampled so far, in order."""
    return [int(line) for line in log.read_text().splitlines()] if log.exists() else []


def wait_for(what: Any, seconds: float = 600.0) -> bool:
    """Whether it came true."""
    until = time.monotonic() + seconds
    while not what():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def study_file(folder: Path, **changes: Any) -> str:
    own = {"objective": {"file": "stages_on_ray.py"}, "workers": {"ray": 3}}
    return staged_examples.study_file(folder, **{**own, **changes})


def trials(url: str, name: str) -> list[tuple[Any, ...]]:
    study = StoredStudy.open(open_storage(url, write=False), name)
    return [(t.number, t.user_attrs["coefficients"], t.value, t.state.name) for t in study.trials()]
