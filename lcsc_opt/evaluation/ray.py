"""Workers on the machines of a Ray cluster. Ray places them; retries and deaths are handled as for local workers."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lcsc_opt.base.errors import LcscError, StudySpecError
from lcsc_opt.base.progress import notice
from lcsc_opt.base.study_file import ObjectiveSpec, RayWorkers
from lcsc_opt.evaluation.file_shipping import NodeObjective, Packed, ShippedFiles, collect, software
from lcsc_opt.evaluation.pool import Link, WorkerPool
from lcsc_opt.evaluation.processes import CPU, VISIBLE
from lcsc_opt.evaluation.ray_worker import CALLS_AT_ONCE, Files, RayLink, RayWorker, Read, node_name
from lcsc_opt.evaluation.worker import WorkerSettings
from lcsc_opt.objective.contract import Objective
from lcsc_opt.trajectory import Trajectory

_CONNECT_SECONDS = 5.0
_START = "start it with `ray start --head`, or give another address (docs/cluster.md)"
_SAID_BY_RAY = "RAY_DEDUP_LOGS_SKIP_REGEX"  # hides what Ray prints for each death: pages, where we print a line
_NODE_ID = "ray.io/node-id"  # a label that every node has

_Node = dict[str, Any]
"""A node, as Ray describes it."""


@contextlib.contextmanager
def ray_cluster(
    wanted: RayWorkers,
    spec: ObjectiveSpec,
    objective: Objective,
    *,
    study: Path | None = None,
    packed: Trajectory | None = None,
) -> Iterator[Cluster]:
    """Connect to a cluster while this is open, and send the study's own files there.

    A program that is connected already stays connected, with its own runtime environment.

    Args:
        wanted: the address of the cluster, and what its workers need.
        spec: of the objective.
        objective: as it was loaded here.
        study: the study file's folder.
        packed: the objective's trajectory, if it has one that is packed.

    Raises:
        StudySpecError: there is no Ray, or no cluster.
    """
    with tempfile.TemporaryDirectory() as copies, contextlib.ExitStack() as connection:
        files = collect(spec, study, objective, Path(copies))
        ray = connection.enter_context(_connected(wanted.address, {"working_dir": copies}))
        connection = connection.pop_all()
    with connection:
        yield Cluster(ray, wanted, spec, files, objective, packed)


def check_room(wanted: RayWorkers, spec: ObjectiveSpec) -> None:
    """Refuse a cluster that is not there, or has no room for one of these workers; no files are sent to it.

    Args:
        wanted: the address of the cluster, and what its workers need.
        spec: of the objective.

    Raises:
        StudySpecError: there is no Ray, no cluster, or no room.
    """
    with _connected(wanted.address, {}) as ray:
        _Room(ray, wanted, spec).check()


def check_address(wanted: RayWorkers) -> None:
    """Refuse an address at which there is certainly no cluster, without asking Ray.

    Raises:
        StudySpecError: there is no Ray, or nothing listens there.
    """
    _import_ray()
    _listening(wanted.address)


class _Room:
    """How many workers fit on a cluster, ``gpus`` for each of them."""

    def __init__(self, ray: Any, wanted: RayWorkers, spec: ObjectiveSpec) -> None:
        self._ray, self._wanted = ray, wanted
        uses_gpus = spec.settings.get("device") != CPU and any(_has(node, "GPU") for node in self.nodes())
        self.gpus = float(uses_gpus) if wanted.gpus is None else wanted.gpus

    def nodes(self) -> list[_Node]:
        """The nodes that are alive."""
        return [node for node in self._ray.nodes() if node["Alive"]]

    def on(self, node: _Node) -> int:
        """How many workers fit on a node that has nothing else to do."""
        needed = {"CPU": self._wanted.cpus, "GPU": self.gpus}
        return min(int(_has(node, name) / amount + 1e-9) for name, amount in needed.items() if amount)

    def check(self) -> list[_Node]:
        """The nodes that have room. A notice says if there is too little room for all workers.

        Raises:
            StudySpecError: no node has room for a worker.
        """
        wanted, nodes = self._wanted, self.nodes()
        fitting = [node for node in nodes if self.on(node)]
        if not fitting:
            cpus, gpus = ([_has(node, name) for node in nodes] for name in ("CPU", "GPU"))
            raise StudySpecError(
                f"workers.ray: {wanted.ray} workers with {self.gpus:g} GPUs and {wanted.cpus:g} CPUs each are asked "
                f"for, and the cluster has {sum(gpus):g} GPUs and {sum(cpus):g} CPUs on {len(nodes)} nodes, at most "
                f"{max(gpus):g} and {max(cpus):g} on one: lower gpus and cpus, or add nodes"
            )
        room = sum(self.on(node) for node in fitting)
        if room < wanted.ray:
            notice(f"the cluster has room for {room} of {wanted.ray} workers; the others begin when nodes join it")
        return fitting


class Cluster:
    """The machines of a Ray cluster, as places where workers run.

    Args:
        ray: the module, connected.
        wanted: what each worker needs.
        spec: of the objective.
        files: those that were sent to the cluster.
        objective: as it was loaded here.
        packed: its trajectory.
    """

    elastic = True

    def __init__(
        self,
        ray: Any,
        wanted: RayWorkers,
        spec: ObjectiveSpec,
        files: ShippedFiles,
        objective: Objective,
        packed: Trajectory | None,
    ) -> None:
        self._ray, self._wanted = ray, wanted
        self._expected = objective.fingerprint()
        self._without: dict[str, LcscError] = {}  # nodes to be left out, by id
        self._room = _Room(ray, wanted, spec)
        fetched = None
        if packed is not None:  # an actor reads the trajectory on this machine
            on_this = self._on_node(ray.get_runtime_context().get_node_id())
            files_here = ray.remote(Files).options(num_cpus=0, max_restarts=-1, **on_this).remote(packed.path)
            fetched = (Packed.of(packed), Read(files_here))
        self._load = NodeObjective(spec, files, fetched, software())

    def pool(self) -> WorkerPool:
        """The workers, which begin as nodes have room for them."""
        workers = self._wanted.ray
        environments = [{} if self._room.gpus else {VISIBLE: ""}] * workers
        return WorkerPool(self._load, workers, expected=self._expected, environments=environments, machines=self)

    def check(self) -> None:
        """Refuse a cluster that could not evaluate the objective; else get its nodes ready.

        Raises:
            StudySpecError: no node has room for a worker; one has other software, or no room for the trajectory.
            LcscError: a node could not load the objective.
        """
        remote = self._ray.remote(_check_here)
        asked = []
        for identity in [node["NodeID"] for node in self._room.check()]:
            # tried again if its process is killed, but not if it raises an error itself
            options = {"num_cpus": 0, "max_retries": 2, **self._on_node(identity)}
            asked.append((identity, remote.options(**options).remote(self._load)))
        for identity, answer in asked:
            name = node_name(self._ray, identity)
            try:
                error = self._ray.get(answer)
            except self._ray.exceptions.RayError as failed:
                if identity not in [node["NodeID"] for node in self._room.nodes()]:
                    continue  # it went away meanwhile
                said = [line.strip() for line in str(failed).splitlines() if line.strip()] or [type(failed).__name__]
                raise StudySpecError(
                    f"node {name}: lcsc_opt does not run there ({said[-1]}); install what is here"
                ) from failed
            if error is not None:
                raise type(error)(f"node {name}: {error}")

    def threads(self, workers: int) -> int:  # noqa: ARG002 - as of other machines
        """The CPUs that each worker has."""
        return max(int(self._wanted.cpus), 1)

    def start(self, settings: WorkerSettings) -> RayLink:
        """Request a worker, which starts when there is room.

        Raises:
            OSError: Ray is gone.
        """
        options: dict[str, Any] = {
            **{"num_cpus": self._wanted.cpus, "num_gpus": self._room.gpus, "max_concurrency": CALLS_AT_ONCE},
            **{"max_restarts": 0, "max_task_retries": 0, "scheduling_strategy": "SPREAD"},
        }
        if self._without:
            options["label_selector"] = {_NODE_ID: f"!in({','.join(self._without)})"}
        try:
            return RayLink(self._ray, self._ray.remote(RayWorker).options(**options).remote(settings))
        except self._ray.exceptions.RayError as error:
            raise OSError(f"Ray refused it ({_first_line(error)})") from error

    def refused(self, link: Link, error: LcscError) -> LcscError | None:
        """Leave out the node of this worker from now on, if there are others."""
        assert isinstance(link, RayLink)
        said = type(error)(f"node {node_name(self._ray, link.node)}: {error}")
        known = link.node in self._without
        self._without[link.node] = error
        if not any(self._room.on(node) for node in self._room.nodes() if node["NodeID"] not in self._without):
            return said
        if not known:
            notice(f"{said}; the search goes on without it")
        return None

    def _on_node(self, identity: str) -> dict[str, Any]:
        """The options of what is to run on this node."""
        scheduling = importlib.import_module("ray.util.scheduling_strategies")
        return {"scheduling_strategy": scheduling.NodeAffinitySchedulingStrategy(identity, soft=False)}


def _check_here(load: NodeObjective) -> LcscError | None:
    return load.check()


def _has(node: _Node, resource: str) -> float:
    return float(node["Resources"].get(resource, 0.0))


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _import_ray() -> Any:
    """Ray's module.

    Raises:
        StudySpecError: it is not installed.
    """
    if "ray" not in sys.modules:
        os.environ.setdefault(_SAID_BY_RAY, ".")
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise StudySpecError(f"workers.ray: Ray cannot be imported ({error}): pip install ray") from error


@contextlib.contextmanager
def _connected(address: str, environment: Mapping[str, Any]) -> Iterator[Any]:
    """Ray's module, connected with this runtime environment; a program that is connected already stays so.

    Raises:
        StudySpecError: there is no Ray, or no cluster.
    """
    ray = _import_ray()
    if ray.is_initialized():
        yield ray
        return
    chosen = _listening(address)
    before = signal.getsignal(signal.SIGTERM)
    quiet = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    try:
        try:
            ray.init(address=chosen, runtime_env=dict(environment), **quiet)
        except Exception as error:  # of many kinds
            raise StudySpecError(
                f"workers.ray: no Ray cluster can be reached at {chosen} ({_first_line(error)}); {_START}"
            ) from error
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, before)  # since Ray replaces it
        yield ray
    finally:
        ray.shutdown()


def _listening(address: str) -> str:
    """The address, checked: something must listen there, since Ray itself would try for minutes."""
    chosen = os.environ.get("RAY_ADDRESS", address) if address == "auto" else address
    if "://" in chosen:
        raise StudySpecError(f"workers.ray: {chosen}: run lcsc on a machine of the cluster; give host:port, or auto")
    if chosen == "auto":
        return chosen
    host, _, port = chosen.rpartition(":")
    if not host or not port.isdigit():
        raise StudySpecError(f"workers.ray: address: expected host:port, or auto, got {chosen!r}")
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise StudySpecError(f"workers.ray: nothing listens at {chosen} ({error}); {_START}") from error
    return chosen
