"""Workers on the machines of a Ray cluster. Ray places them; retries and deaths are handled as for local workers."""

from __future__ import annotations

import contextlib
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

from lcsc_opt.base.errors import LcscError, StudySpecError, text_of
from lcsc_opt.base.imports import import_extra
from lcsc_opt.base.paths import BuildContext
from lcsc_opt.base.progress import hand_notices_to, notice
from lcsc_opt.base.study_spec import ObjectiveSpec, RayWorkers
from lcsc_opt.evaluation.node_objective import NodeObjective
from lcsc_opt.evaluation.pool import WorkerPool
from lcsc_opt.evaluation.worker import NOTICE, READY, Answer, Job, WorkerSettings, load_evaluator
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.key import Key

_CONNECT_SECONDS = 5.0
_START = "start it with `ray start --head`, or give another address (docs/cluster.md)"
_CALLS_AT_ONCE = 8  # to one worker, which never has so many jobs
_NODE_SECONDS = 1.0  # until Ray reports that a node went away

_Reply = tuple[str, list[Answer]]
"""The id of a worker's node, and its answers so far."""


@contextlib.contextmanager
def ray_workers(
    settings: RayWorkers,
    spec: ObjectiveSpec,
    objective: Objective,
    *,
    expected: Key,
    context: BuildContext,
) -> Iterator[WorkerPool]:
    """Workers on a cluster, which has the study's own files while this is open; they begin as nodes have room.

    A program that is connected already stays connected, with its own runtime environment.

    Args:
        settings: where the cluster is, how many workers there are, and what each needs.
        spec: of the objective.
        objective: as this process has loaded it.
        expected: the key that each worker's objective must have.
        context: where its files are; all nodes see the folder beside the database.

    Raises:
        StudySpecError: there is no Ray, no cluster, or no node with room for a worker.
    """
    with contextlib.ExitStack() as connection:
        with tempfile.TemporaryDirectory() as copies:  # Ray has them once it is connected
            load = NodeObjective.collect(spec, context, objective, Path(copies))
            ray = connection.enter_context(_connected(settings.address, copies))
        cluster = _Cluster(ray, settings, spec)
        cluster.check()
        environment: dict[str, str] = {}
        if not cluster.gpus:  # Ray hides the GPUs of others only from workers that have one
            # not above: a worker imports this module before it sets what torch reads when it is imported
            from lcsc_opt.base.accelerator import VISIBLE

            environment = dict.fromkeys(VISIBLE.values(), "")
        pool = WorkerPool(
            load,
            settings.ray,
            expected=expected,
            environments=[environment] * settings.ray,
            threads=max(int(settings.cpus), 1),
            machines=cluster,
        )
        with contextlib.closing(pool):
            yield pool


class _Cluster:
    """The machines of a Ray cluster, as places where workers run, each with so many ``gpus``."""

    def __init__(self, ray: Any, settings: RayWorkers, spec: ObjectiveSpec) -> None:
        self._ray = ray
        self._settings = settings
        self.gpus = settings.gpus
        if settings.gpus is None:  # one, where there are some and the objective may use it
            has_gpus = any(_amount(node, "GPU") for node in self._nodes())
            self.gpus = float(has_gpus and spec.settings.get("device") != "cpu")

    def check(self) -> None:
        """Refuse a cluster without room for a worker. A notice says if there is too little room for all of them.

        What other programs use now counts as room: workers wait for it.

        Raises:
            StudySpecError: no node is alive, or none has room for a worker.
        """
        workers = self._settings.ray
        nodes = self._nodes()
        if not nodes:
            raise StudySpecError("workers.ray: no node of the cluster is alive; start one with `ray start`")
        most_workers = sum(self._most_workers(node) for node in nodes)
        if not most_workers:
            cpus = [_amount(node, "CPU") for node in nodes]
            gpus = [_amount(node, "GPU") for node in nodes]
            raise StudySpecError(
                f"workers.ray: {workers} workers with {self.gpus:g} GPUs and {self._settings.cpus:g} CPUs each are "
                f"asked for, and the cluster has {sum(gpus):g} GPUs and {sum(cpus):g} CPUs on {len(nodes)} nodes, at "
                f"most {max(gpus):g} and {max(cpus):g} on one: lower gpus and cpus, or add nodes"
            )
        if most_workers < workers:
            notice(f"the cluster has room for {most_workers} of {workers} workers; the others begin when nodes join it")

    def start(self, settings: WorkerSettings) -> _RayLink:
        """Ask Ray for a worker. Raises OSError if it refuses."""
        options: dict[str, Any] = {
            "num_cpus": self._settings.cpus,
            "num_gpus": self.gpus,
            "max_concurrency": _CALLS_AT_ONCE,
            "max_restarts": 0,
            "max_task_retries": 0,
            "scheduling_strategy": "SPREAD",
        }
        try:
            actor = self._ray.remote(_RayWorker).options(**options).remote(settings)
            return _RayLink(self._ray, actor)
        except self._ray.exceptions.RayError as error:
            raise OSError(f"Ray refused it ({text_of(error)[:200]})") from error

    def refused(self, link: Any, error: LcscError) -> LcscError:
        """The error of a worker that could not load the objective, with the name of its node."""
        return type(error)(f"node {link.machine}: {error}")

    def _nodes(self) -> list[dict[str, Any]]:
        """The nodes that are alive, as Ray describes them."""
        return [node for node in self._ray.nodes() if node["Alive"]]

    def _most_workers(self, node: Mapping[str, Any]) -> int:
        """How many workers fit on a node that has nothing else to do: for what others use now, workers wait.

        Shares are rounded numbers: without 1e-9, 99 workers of .07 GPUs would fit on 7.
        """
        needed = {"CPU": self._settings.cpus, "GPU": self.gpus}
        return min(int(_amount(node, resource) / amount + 1e-9) for resource, amount in needed.items() if amount)


class _RayWorker:
    """The actor: each call is a job, whose answer goes back with the notices since the last one.

    One thread loads the objective and begins every job, as a local worker's main thread does.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        self._node = importlib.import_module("ray").get_runtime_context().get_node_id()
        self._settings = settings
        self._evaluator: Any = None
        self._notices: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self._thread = ThreadPoolExecutor(1)
        os.environ.update(settings.variables())
        hand_notices_to(lambda message: self._notices.put(Answer.of(NOTICE, message)))

    def ready(self) -> _Reply:
        """Load the objective; an error of ours is part of the reply."""
        try:
            self._evaluator = self._thread.submit(load_evaluator, self._settings).result()
        except LcscError as error:
            return self._reply(Answer.of(READY, error))
        return self._reply(Answer(READY))

    def do(self, content: bytes) -> _Reply:
        """Do a job, which is pickled."""
        job: Job = pickle.loads(content)  # noqa: S301 - of our own coordinator
        begin = getattr(self._evaluator, job.kind)
        future: Future[Any] = self._thread.submit(begin, *job.arguments).result()
        return self._reply(Answer.of_future(job.number, future))

    def _reply(self, answer: Answer) -> _Reply:
        """The answer, behind the notices that were given before it."""
        answers = []
        with contextlib.suppress(queue.Empty):
            while True:
                answers.append(self._notices.get_nowait())
        answers.append(answer)
        return self._node, answers


class _RayLink:
    """The connection to one actor, by calls to it; used like the connection to a local worker.

    Attributes:
        node: the id of its node; empty until it runs there.
    """

    def __init__(self, ray: Any, actor: Any) -> None:
        self._ray = ray
        self._actor = actor
        self._answers: queue.SimpleQueue[Answer | None] = queue.SimpleQueue()  # None: the worker is gone
        self._error: BaseException | None = None
        self.node = ""
        self._expect(actor.ready.remote())

    @property
    def machine(self) -> str:
        """The node's own name, else that of its machine; Ray still knows nodes that went away."""
        return next((_name(node) for node in self._ray.nodes() if node["NodeID"] == self.node), "")

    def send(self, pickled_job: bytes) -> None:
        """Call the actor. Raises OSError if Ray refuses."""
        try:
            self._expect(self._actor.do.remote(pickled_job))
        except self._ray.exceptions.RayError as error:
            raise OSError(str(error)) from error

    def receive(self) -> Answer:
        """Wait for its next answer. Raises EOFError if it is gone."""
        answer = self._answers.get()
        if answer is None:
            raise EOFError
        return answer

    def terminate(self) -> None:
        """Kill the actor; :meth:`receive` ends now, whenever Ray reports the death."""
        self._kill()
        self._answers.put(None)

    def join(self) -> tuple[str, bool]:
        """How it ended, and whether that counts: not if its machine went away."""
        if self._error is None:
            return "the worker was stopped", False
        self._kill()  # it may only be out of reach
        where = ""
        if self.node:
            where = f" on node {self.machine}"
        if isinstance(self._error, self._ray.exceptions.RayTaskError):  # such as a job that cannot be unpickled
            error = self._error.cause
            return f"the worker{where} died ({type(error).__name__}: {text_of(error)[:200]})", True
        if self._is_preempted():
            return f"the worker{where} went away with its node", False
        cause = "killed, or out of memory"
        if not self.node:  # it never ran: Ray says why
            cause = text_of(self._error)[:200]
        return f"the worker{where} died ({cause})", True

    def _kill(self) -> None:
        with contextlib.suppress(Exception):  # Ray itself is gone
            self._ray.kill(self._actor, no_restart=True)

    def _expect(self, reference: Any) -> None:
        """Let :meth:`_take` have the reply to a call that has just begun."""
        reference.future().add_done_callback(self._take)

    def _take(self, done: Future[_Reply]) -> None:
        """Queue the answers of one call, or the end of the worker."""
        if self._error is None:
            self._error = done.exception()
        if self._error is not None:
            self._answers.put(None)
            return
        self.node, answers = done.result()
        for answer in answers:
            self._answers.put(answer)

    def _is_preempted(self) -> bool:
        """Whether the machine went away; a worker that never ran had none. Ray may report it after the worker's end."""
        if isinstance(self._error, self._ray.exceptions.ActorUnavailableError):
            return True
        if getattr(self._error, "preempted", False):
            return True
        until = time.monotonic() + _NODE_SECONDS
        while self.node and time.monotonic() < until:
            alive = {node["NodeID"] for node in self._ray.nodes() if node["Alive"]}
            if self.node not in alive:
                return True
            time.sleep(0.1)
        return False


def _name(node: Mapping[str, Any]) -> str:
    """The name that a node was given, else that of its machine."""
    if node["NodeName"] != node["NodeManagerAddress"]:
        return str(node["NodeName"])
    return str(node["NodeManagerHostname"])


def _amount(node: Mapping[str, Any], resource: str) -> float:
    return float(node["Resources"].get(resource, 0.0))


@contextlib.contextmanager
def _connected(address: str, copies: str) -> Iterator[Any]:
    """Ray's module, connected so that jobs run in a copy of this folder; a program that is connected already stays so.

    Raises:
        StudySpecError: there is no Ray, or no cluster.
    """
    # hides what Ray prints for each death: pages, where we print a line; read when Ray is imported
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    ray = import_extra("ray")
    if ray.is_initialized():
        yield ray
        return
    checked_address = _listening(address)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        try:
            ray.init(
                address=checked_address,
                runtime_env={"working_dir": copies},
                log_to_driver=False,
                logging_level=logging.CRITICAL,
            )
        except Exception as error:  # of many kinds
            reason = f"no Ray cluster can be reached at {checked_address} ({text_of(error)[:200]})"
            raise StudySpecError(f"workers.ray: {reason}; {_START}") from error
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)  # since Ray replaces it
        yield ray
    finally:
        ray.shutdown()


def _listening(address: str) -> str:
    """The address, checked: something must listen there, since Ray itself would try for minutes."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", address)
    if address == "auto":  # Ray knows the cluster of this machine
        return address
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise StudySpecError(f"workers.ray: address: expected host:port, or auto, got {address!r}")
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:  # ports above 65535 overflow
        raise StudySpecError(f"workers.ray: nothing listens at {address} ({error}); {_START}") from error
    return address
