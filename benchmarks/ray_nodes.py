"""A Ray cluster of several nodes on this machine, for benchmarks and faults."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
MEMORY = 80 * 2**20  # bytes of each node's object store, the smallest that Ray allows
OBJECTIVE = "ray_objective.py"


class Nodes:
    """A head that evaluates nothing, and nodes that come and go."""

    def __init__(self, cluster: Any) -> None:
        self._cluster, self._nodes = cluster, list[Any]()

    @property
    def address(self) -> str:
        """The address of the head."""
        return str(self._cluster.address)

    def add(self, cpus: int) -> None:
        """Add a node with ``cpus`` CPUs."""
        self._nodes.append(self._cluster.add_node(num_cpus=cpus, object_store_memory=MEMORY))

    def kill_oldest(self) -> None:
        """Kill all processes of the oldest node at once."""
        self._cluster.remove_node(self._nodes.pop(0), allow_graceful=False)


@contextlib.contextmanager
def nodes(*cpus: int) -> Iterator[Nodes]:
    """A cluster with one node for each number of ``cpus``. Every worker takes one thread."""
    from ray.cluster_utils import Cluster

    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    head = {"num_cpus": 0, "object_store_memory": MEMORY, "include_dashboard": False}
    cluster: Any = Cluster(initialize_head=True, head_node_args=head)
    try:
        made = Nodes(cluster)
        for count in cpus:
            made.add(count)
        yield made
    finally:
        cluster.shutdown()


def study_file(folder: Path, **content: Any) -> Path:
    """Write a study file, and copy the objective beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(__file__).with_name(OBJECTIVE), folder)
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    return path
