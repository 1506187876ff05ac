"""A worker that Ray runs as an actor; calls to it take the place of the connection to a local worker."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import pickle
import queue
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lcsc_opt.base.errors import LcscError
from lcsc_opt.base.progress import hand_notices_to
from lcsc_opt.evaluation.worker import NOTICE, READY, Answer, Ending, Job, WorkerSettings, load_evaluator

CALLS_AT_ONCE = 8  # to one worker, which never has so many jobs
_NODE_SECONDS = 1.0  # until a node that went away is known to be gone

_Said = tuple[str, list[Answer]]
"""The id of the worker's node, and its answers so far."""


class RayWorker:
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
        """Load the objective."""
        try:
            self._evaluator = self._thread.submit(load_evaluator, self._settings).result()  # type: ignore[assignment]
        except LcscError as error:
            return self._said(Answer.of(READY, error))
        return self._said(Answer(READY))

    def do(self, content: bytes) -> _Said:
        """Do a job, and return its answer."""
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
            self._expect(self._actor.do.remote(pickle.dumps(job)))
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


def node_name(ray: Any, identity: str) -> str:
    """The name of a node for people: its own, else that of its machine."""
    for node in ray.nodes():
        if node["NodeID"] == identity:
            named = node["NodeName"] != node["NodeManagerAddress"]
            return str(node["NodeName"] if named else node["NodeManagerHostname"])
    return identity[:8]


class Files:
    """The actor on the coordinator's machine that reads its trajectory for other nodes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Some bytes of one of its files."""
        with (self._folder / Path(name).name).open("rb") as file:
            file.seek(offset)
            return file.read(length)


@dataclasses.dataclass(frozen=True)
class Read:
    """Reads some bytes of a file of the coordinator's trajectory through Ray's object store; picklable."""

    files: Any

    def __call__(self, name: str, offset: int, length: int) -> bytes:
        """Read them."""
        ray = importlib.import_module("ray")
        content: bytes = ray.get(self.files.read.remote(name, offset, length))
        return content
