"""Worker processes on this machine, each with an objective of its own on a device of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import platform
import threading
from collections.abc import Iterator
from multiprocessing import spawn
from multiprocessing.connection import Connection
from typing import Any

from lcsc_opt.base.errors import LcscError
from lcsc_opt.evaluation.devices import cores
from lcsc_opt.evaluation.worker import Answer, Ending, Job, WorkerSettings, serve

DIED = "the worker process died (killed, or out of memory)"


class ThisMachine:
    """Workers are processes on this machine, which share the cores that this process may use."""

    elastic = False

    def threads(self, workers: int) -> int:
        """Cores for each worker."""
        return max(cores() // workers, 1)

    def start(self, settings: WorkerSettings) -> Process:
        """Start a process."""
        return Process(settings)

    def refused(self, link: object, error: LcscError) -> LcscError:  # noqa: ARG002 - as of other machines
        """The error itself, since there is no other machine."""
        return error


_preparing = threading.Lock()


@contextlib.contextmanager
def _without_script() -> Iterator[None]:
    """While this is open, started processes do not run the user's script again: they need nothing of it.

    So the script needs no ``if __name__ == "__main__"``.
    """
    with _preparing:
        prepare = spawn.get_preparation_data

        def prepare_nothing(name: str) -> dict[str, Any]:
            return {key: value for key, value in prepare(name).items() if not key.startswith("init_main")}

        spawn.get_preparation_data = prepare_nothing
        try:
            yield
        finally:
            spawn.get_preparation_data = prepare


class Process:
    """The connection to one process.

    Attributes:
        machine: this one's name.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection: Connection
        self._connection, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, settings))
        named = b"__main__" in pickle.dumps(settings)
        with contextlib.nullcontext() if named else _without_script():
            self._process.start()
        other.close()
        self.machine = platform.node()

    def send(self, job: Job) -> None:
        """Give it a job."""
        self._connection.send(job)

    def receive(self) -> Answer:
        """Wait for its next answer."""
        answer: Answer = self._connection.recv()
        return answer

    def terminate(self) -> None:
        """Stop it."""
        self._process.terminate()

    def join(self) -> Ending:
        """Wait until it is gone."""
        self._process.join()
        return Ending(f"exit code {self._process.exitcode}", DIED)
