"""A small Ray cluster on this machine, and an objective that says where it runs."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import ray
from ray.cluster_utils import Cluster

from lcsc_opt.base.study_spec import ObjectiveSpec
from lcsc_opt.database.arrays import coefficients_of
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import StoredStudy, read_contents
from tests.commands import Typed
from tests.evaluation import staged_examples

OBJECTIVE = """
from tests.evaluation.staged_examples import Counted, Slow

KINDS = {"counted": Counted, "slow": Slow}


def build(settings):
    settings.pop("device", None)
    return KINDS[settings.pop("kind", "counted")](**settings)
"""
SPEC = ObjectiveSpec(file="ray_own_objective.py", settings={"number": 4.25, "checkpoints": "run.trajectory"})
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "RAY_worker_niceness": "0",  # other tests are not nice
    "RAY_prestart_worker_first_driver": "0",  # a process for each CPU at the start of each job, which nobody asked for
}
NODE = {"object_store_memory": 80 * 2**20, "env_vars": ENVIRONMENT}  # bytes, the least that Ray takes


@contextlib.contextmanager
def small_cluster(**head: Any) -> Iterator[Cluster]:
    """One of a single node."""
    without = {"include_dashboard": False, "no_monitor": True, "include_log_monitor": False}
    with (
        tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder,
        mock.patch.dict(os.environ, RAY_USAGE_STATS_ENABLED="0", RAY_TMPDIR=folder),
    ):
        cluster = Cluster(initialize_head=True, head_node_args={**NODE, **head, **without})
        try:
            yield cluster
        finally:
            cluster.shutdown()


def add_node(cluster: Cluster, **node: Any) -> Any:
    """One more machine."""
    return cluster.add_node(**{**NODE, **node})


@contextlib.contextmanager
def connected(cluster: Cluster) -> Iterator[None]:
    """This process asks the cluster something."""
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.CRITICAL)
    try:
        yield
    finally:
        ray.shutdown()


def study_file(folder: Path, **changes: Any) -> str:
    own = {"objective": {"file": "stages_on_ray.py"}, "workers": {"ray": 3}}
    return staged_examples.study_file(folder, **{**own, **changes})


def refused(folder: Path, typed: Typed, *arguments: str, **changes: Any) -> str:
    """The one line that a study is refused with; nothing of it is stored."""
    said = typed.refused("run", study_file(folder, **changes), *arguments)
    for file in folder.glob("*.db"):
        assert not read_contents(open_storage(f"sqlite:///{file}", write=False)).studies
    return said


def trials(url: str, name: str) -> list[tuple[Any, ...]]:
    study = StoredStudy.open(open_storage(url, write=False), name)
    return [(t.number, coefficients_of(t).tolist(), t.value, t.state.name) for t in study.trials()]
