"""A worker that Ray runs as an actor; calls to it take the place of the connection to a local worker."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import pickle
import queue
import threading
import time
import traceback
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from lcsc_opt.evaluation.worker import READY, Answer, Ending, Job, WorkerSettings, answer_jobs

CALLS_AT_ONCE = 8  # to one worker, which never has so many jobs
NODE_SECONDS = 1.0  # until a node that went away is known to be gone

Said = tuple[str, list[Answer]]
"""The id of the worker's node, and its answers so far."""


class RayWorker:
    """The actor: jobs arrive as calls, and a thread answers them as a local worker does."""

    def __init__(self, settings: WorkerSettings) -> None:
        ray = importlib.import_module("ray")
        self._node = ray.get_runtime_context().get_node_id()
        self._calls = _Calls()
        self._ready = self._calls.wait_for(READY)
        threading.Thread(target=_serve, args=(self._calls, settings), daemon=True).start()

    def ready(self) -> Said:
        """Wait until jobs may come."""
        return self._node, self._calls.answers(self._ready)

    def do(self, number: int, job: bytes) -> Said:
        """Do a job, and return its answers."""
        waiting = self._calls.wait_for(number)
        self._calls.put(job)
        return self._node, self._calls.answers(waiting)


def _serve(calls: _Calls, settings: WorkerSettings) -> None:
    try:
        answer_jobs(calls, settings)
    except BaseException:
        traceback.print_exc()  # into Ray's log
    os._exit(1)


class _Calls:
    """The connection to the coordinator: answers go back with the next call that ends."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._waiting: dict[int, Future[Answer]] = {}
        self._said: list[Answer] = []
        self._lock = threading.Lock()

    def wait_for(self, number: int) -> Future[Answer]:
        with self._lock:
            return self._waiting.setdefault(number, Future())

    def put(self, job: bytes) -> None:
        self._jobs.put(job)

    def answers(self, waiting: Future[Answer]) -> list[Answer]:
        answer = waiting.result()
        with self._lock:
            said, self._said = self._said, []
        return [*said, answer]

    def recv(self) -> Job:
        job: Job = pickle.loads(self._jobs.get())  # noqa: S301 - of our own coordinator
        return job

    def send(self, answer: Answer, /) -> None:
        with self._lock:
            waiting = self._waiting.pop(answer.number, None)
            if waiting is None:
                self._said.append(answer)
        if waiting is not None:
            waiting.set_result(answer)


class RayLink:
    """The connection to one actor.

    Attributes:
        node: the id of its node; empty until it runs there.
    """

    def __init__(self, ray: Any, actor: Any) -> None:
        self._ray, self._actor = ray, actor
        self._answers: queue.SimpleQueue[Answer | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self.node = ""
        self._named = ""
        self._expect(actor.ready.remote())

    @property
    def machine(self) -> str:
        """The name of its node; empty until it runs there."""
        if self.node and not self._named:
            self._named = node_name(self._ray, self.node)
        return self._named

    def send(self, job: Job) -> None:
        """Give it a job.

        Raises:
            OSError: Ray is gone.
        """
        try:
            self._expect(self._actor.do.remote(job.number, pickle.dumps(job)))
        except self._ray.exceptions.RayError as error:
            raise OSError(str(error)) from error

    def receive(self) -> Answer:
        """Wait for its next answer.

        Raises:
            EOFError: it is gone.
        """
        answer = self._answers.get()
        if answer is None:
            raise EOFError
        return answer

    def terminate(self) -> None:
        """Stop it, wherever it is."""
        with contextlib.suppress(Exception):  # Ray itself is gone
            self._ray.kill(self._actor, no_restart=True)
        self._answers.put(None)

    def join(self) -> Ending:
        """How the worker ended."""
        if self._error is None:  # it was stopped
            return Ending("stopped", "the worker was stopped", counts=False)
        with contextlib.suppress(Exception):  # it may only be out of reach
            self._ray.kill(self._actor, no_restart=True)
        where = f" on node {self.machine}" if self.node else ""
        if self._is_preempted():
            return Ending("its node went away", f"the worker{where} went away with its node", counts=False)
        how = "killed, or out of memory" if self.node else " ".join(str(self._error).split())[:200]
        return Ending(how, f"the worker{where} died ({how})")

    def _expect(self, reference: Any) -> None:
        reference.future().add_done_callback(self._take)

    def _take(self, done: Future[Said]) -> None:
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
        until = time.monotonic() + NODE_SECONDS
        while self.node and time.monotonic() < until:
            if all(node["NodeID"] != self.node for node in self._ray.nodes() if node["Alive"]):
                return True
            time.sleep(0.1)
        return False


def node_name(ray: Any, identity: str) -> str:
    """The name of a node for people: its own, else that of its machine."""
    for node in ray.nodes():
        if node["NodeID"] == identity:
            named = node["NodeName"] != node["NodeManagerAddress"]
            return str(node["NodeName"] if named else node["NodeManagerHostname"])
    return identity[:8]


class Files:
    """The actor beside the coordinator that reads its trajectory for other nodes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Some bytes of one of its files."""
        with (self._folder / Path(name).name).open("rb") as file:
            file.seek(offset)
            return file.read(length)


@dataclasses.dataclass(frozen=True)
class Read:
    """Reads some bytes of a file of the coordinator's trajectory; picklable."""

    files: Any

    def __call__(self, name: str, offset: int, length: int) -> bytes:
        """Read them through Ray's object store."""
        ray = importlib.import_module("ray")
        content: bytes = ray.get(self.files.read.remote(name, offset, length))
        return content
