"""Workers on the machines of a Ray cluster. Ray places them; retries and deaths are handled as for local workers."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import logging
import os
import pickle
import queue
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lcsc_opt.base.accelerator import VISIBLE
from lcsc_opt.base.errors import LcscError, StudySpecError
from lcsc_opt.base.imports import import_extra
from lcsc_opt.base.progress import hand_notices_to, notice
from lcsc_opt.base.study_file import ObjectiveSpec, RayWorkers
from lcsc_opt.evaluation.file_shipping import NodeObjective
from lcsc_opt.evaluation.pool import WorkerPool
from lcsc_opt.evaluation.worker import NOTICE, READY, Answer, Job, WorkerSettings, load_evaluator
from lcsc_opt.objective.contract import Objective

_CONNECT_SECONDS = 5.0
_START = "start it with `ray start --head`, or give another address (docs/cluster.md)"
_SAID_BY_RAY = "RAY_DEDUP_LOGS_SKIP_REGEX"  # hides what Ray prints for each death: pages, where we print a line
_NODE_ID = "ray.io/node-id"  # a label that every node has
_CALLS_AT_ONCE = 8  # to one worker, which never has so many jobs
_NODE_SECONDS = 1.0  # until a node that went away is known to be gone

_Said = tuple[str, list[Answer]]
"""The id of a worker's node, and its answers so far."""


@contextlib.contextmanager
def ray_workers(
    wanted: RayWorkers, spec: ObjectiveSpec, objective: Objective, *, study: Path | None = None
) -> Iterator[WorkerPool]:
    """Workers on a cluster, which has the study's own files while this is open; they begin as nodes have room.

    A program that is connected already stays connected, with its own runtime environment. ``study`` is the study file's
    folder.

    Raises:
        StudySpecError: there is no Ray, no cluster, or no node with room for a worker.
    """
    with tempfile.TemporaryDirectory() as copies, contextlib.ExitStack() as connection:
        load = NodeObjective.collect(spec, study, objective, Path(copies))
        ray = connection.enter_context(_connected(wanted.address, {"working_dir": copies}))
        connection = connection.pop_all()
    with connection:
        cluster = _Cluster(ray, wanted, spec)
        cluster.check()
        if load.packed is not None:
            load = dataclasses.replace(
                load, packed=dataclasses.replace(load.packed, node=ray.get_runtime_context().get_node_id())
            )
        environments = [{} if cluster.gpus else dict.fromkeys(VISIBLE.values(), "")] * wanted.ray
        expected = objective.fingerprint()
        pool = WorkerPool(
            load,
            wanted.ray,
            expected=expected,
            environments=environments,
            threads=max(int(wanted.cpus), 1),
            machines=cluster,
        )
        with contextlib.closing(pool):
            yield pool


def check_cluster(wanted: RayWorkers, spec: ObjectiveSpec) -> None:
    """Refuse a cluster without room for a worker of the objective; no files are sent there.

    Raises:
        StudySpecError: there is no Ray, no cluster, or no room.
    """
    with _connected(wanted.address, {}) as ray:
        _Cluster(ray, wanted, spec).check()


class _Cluster:
    """The machines of a Ray cluster, as places where workers run, each with so many ``gpus``."""

    def __init__(self, ray: Any, wanted: RayWorkers, spec: ObjectiveSpec) -> None:
        self._ray, self._wanted = ray, wanted
        self._without: set[str] = set()  # ids of nodes to be left out
        uses_gpus = spec.settings.get("device") != "cpu" and any(_has(node, "GPU") for node in self._nodes().values())
        self.gpus = float(uses_gpus) if wanted.gpus is None else wanted.gpus

    def check(self) -> None:
        """Refuse a cluster without room for a worker. A notice says if there is too little room for all of them.

        Raises:
            StudySpecError: no node has room for a worker.
        """
        wanted, nodes = self._wanted, self._nodes()
        room = sum(self._room(node) for node in nodes.values())
        if not room:
            cpus, gpus = ([_has(node, name) for node in nodes.values()] for name in ("CPU", "GPU"))
            raise StudySpecError(
                f"workers.ray: {wanted.ray} workers with {self.gpus:g} GPUs and {wanted.cpus:g} CPUs each are asked "
                f"for, and the cluster has {sum(gpus):g} GPUs and {sum(cpus):g} CPUs on {len(nodes)} nodes, at most "
                f"{max(gpus):g} and {max(cpus):g} on one: lower gpus and cpus, or add nodes"
            )
        if room < wanted.ray:
            notice(f"the cluster has room for {room} of {wanted.ray} workers; the others begin when nodes join it")

    def start(self, settings: WorkerSettings) -> _RayLink:
        options: dict[str, Any] = {
            **{"num_cpus": self._wanted.cpus, "num_gpus": self.gpus, "max_concurrency": _CALLS_AT_ONCE},
            **{"max_restarts": 0, "max_task_retries": 0, "scheduling_strategy": "SPREAD"},
        }
        if self._without:
            options["label_selector"] = {_NODE_ID: f"!in({','.join(self._without)})"}
        try:
            return _RayLink(self._ray, self._ray.remote(_RayWorker).options(**options).remote(settings))
        except self._ray.exceptions.RayError as error:
            raise OSError(f"Ray refused it ({_first_line(error)})") from error

    def refused(self, link: Any, error: LcscError) -> LcscError | None:
        """Leave out the node of this worker from now on, if there are others."""
        said, known = type(error)(f"node {link.machine}: {error}"), link.node in self._without
        self._without.add(link.node)
        if not any(self._room(node) for name, node in self._nodes().items() if name not in self._without):
            return said
        if not known:
            notice(f"{said}; the search goes on without it")
        return None

    def _nodes(self) -> dict[str, dict[str, Any]]:
        """The nodes that are alive, by id, as Ray describes them."""
        return {node["NodeID"]: node for node in self._ray.nodes() if node["Alive"]}

    def _room(self, node: Mapping[str, Any]) -> int:
        """How many workers fit on a node that has nothing else to do."""
        needed = {"CPU": self._wanted.cpus, "GPU": self.gpus}
        return min(int(_has(node, name) / amount + 1e-9) for name, amount in needed.items() if amount)


class _RayWorker:
    """The actor: each call is a job, whose answer goes back with the notices since the last one.

    One thread loads the objective and begins every job, as a local worker's main thread does.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        self._node = importlib.import_module("ray").get_runtime_context().get_node_id()
        self._settings, self._evaluator = settings, None
        self._notices: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self._thread = ThreadPoolExecutor(1)
        os.environ.update(settings.environment)
        hand_notices_to(lambda message: self._notices.put(Answer.of(NOTICE, message)))

    def ready(self) -> _Said:
        try:
            self._evaluator = self._thread.submit(load_evaluator, self._settings).result()  # type: ignore[assignment]
        except LcscError as error:
            return self._said(Answer.of(READY, error))
        return self._said(Answer(READY))

    def do(self, content: bytes) -> _Said:
        job: Job = pickle.loads(content)  # noqa: S301 - of our own coordinator
        begin = getattr(self._evaluator, job.kind)
        future: Future[Any] = self._thread.submit(begin, *job.arguments, **job.options).result()
        return self._said(Answer.of_future(job.number, future))

    def _said(self, answer: Answer) -> _Said:
        notices = []
        with contextlib.suppress(queue.Empty):
            while True:
                notices.append(self._notices.get_nowait())
        return self._node, [*notices, answer]


class _RayLink:
    """The connection to one actor; calls to it take the place of the connection to a local worker.

    Attributes:
        node: the id of its node; empty until it runs there.
    """

    def __init__(self, ray: Any, actor: Any) -> None:
        self._ray, self._actor = ray, actor
        self._answers: queue.SimpleQueue[Answer | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self.node = self._named = ""
        self._expect(actor.ready.remote())

    @property
    def machine(self) -> str:
        """The node's own name, else that of its machine."""
        for node in [] if self._named else self._ray.nodes():
            if node["NodeID"] == self.node:
                named = node["NodeName"] != node["NodeManagerAddress"]
                self._named = node["NodeName"] if named else node["NodeManagerHostname"]
        return self._named

    def send(self, job: Job) -> None:
        try:
            self._expect(self._actor.do.remote(pickle.dumps(job)))
        except self._ray.exceptions.RayError as error:
            raise OSError(str(error)) from error

    def receive(self) -> Answer:
        answer = self._answers.get()
        if answer is None:
            raise EOFError
        return answer

    def terminate(self) -> None:
        with contextlib.suppress(Exception):  # Ray itself is gone
            self._ray.kill(self._actor, no_restart=True)
        self._answers.put(None)

    def join(self) -> tuple[str, bool]:
        if self._error is None:
            return "the worker was stopped", False
        with contextlib.suppress(Exception):  # it may only be out of reach
            self._ray.kill(self._actor, no_restart=True)
        where = f" on node {self.machine}" if self.node else ""
        if self._is_preempted():
            return f"the worker{where} went away with its node", False
        how = "killed, or out of memory" if self.node else " ".join(str(self._error).split())[:200]
        return f"the worker{where} died ({how})", True

    def _expect(self, reference: Any) -> None:
        reference.future().add_done_callback(self._take)

    def _take(self, done: Future[_Said]) -> None:
        self._error = self._error or done.exception()
        if self._error is not None:
            self._answers.put(None)
            return
        self.node, answers = done.result()
        for answer in answers:
            self._answers.put(answer)

    def _is_preempted(self) -> bool:
        """Whether the machine went away. Ray may report that later than the end of the worker."""
        errors = self._ray.exceptions
        if isinstance(self._error, errors.ActorUnavailableError) or getattr(self._error, "preempted", False):
            return True
        until = time.monotonic() + _NODE_SECONDS
        while self.node and time.monotonic() < until:
            if all(node["NodeID"] != self.node for node in self._ray.nodes() if node["Alive"]):
                return True
            time.sleep(0.1)
        return False


def _has(node: Mapping[str, Any], resource: str) -> float:
    return float(node["Resources"].get(resource, 0.0))


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


@contextlib.contextmanager
def _connected(address: str, environment: Mapping[str, Any]) -> Iterator[Any]:
    """Ray's module, connected with this runtime environment; a program that is connected already stays so.

    Raises:
        StudySpecError: there is no Ray, or no cluster.
    """
    os.environ.setdefault(_SAID_BY_RAY, ".")  # read when Ray is imported
    ray = import_extra("ray")
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
            said = f"no Ray cluster can be reached at {chosen} ({_first_line(error)})"
            raise StudySpecError(f"workers.ray: {said}; {_START}") from error
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, before)  # since Ray replaces it
        yield ray
    finally:
        ray.shutdown()


def _listening(address: str) -> str:
    """The address, checked: something must listen there, since Ray itself would try for minutes."""
    chosen = os.environ.get("RAY_ADDRESS", address) if address == "auto" else address
    if chosen == "auto":
        return chosen
    host, _, port = chosen.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        raise StudySpecError(f"workers.ray: address: expected host:port, or auto, got {chosen!r}")
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise StudySpecError(f"workers.ray: nothing listens at {chosen} ({error}); {_START}") from error
    return chosen
