"""Worker processes on this machine, each with an objective of its own, a device of its own and a share of the cores."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import platform
import threading
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import spawn
from multiprocessing.connection import Connection
from typing import Any

from lcsc_opt.evaluation.worker import Answer, Job, WorkerSettings, serve


def cores() -> int:
    """How many cores this process may use: under a batch system often fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def environments(workers: int, devices: Sequence[str] = ()) -> list[Mapping[str, str]]:
    """The environment variables of each worker, with which ``auto`` and a name without a number mean its device.

    Args:
        workers: how many.
        devices: the device of each worker, such as ``cuda:0`` or ``cpu``; empty spreads workers evenly over the
            accelerators.

    Raises:
        ObjectiveError: there is no such device.
    """
    from lcsc_opt.base import accelerator

    there = accelerator.names()
    if not devices and len(there) < 2:
        return [{}] * workers
    chosen = devices or [there[worker % len(there)] for worker in range(workers)]
    return [accelerator.only(accelerator.find(device)) for device in chosen]


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


class ProcessLink:
    """The connection to one process."""

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
        """Hand it a job."""
        self._connection.send(job)

    def receive(self) -> Answer:
        """Wait for its next answer."""
        answer: Answer = self._connection.recv()
        return answer

    def terminate(self) -> None:
        """Stop it, also in the middle of a job."""
        self._process.terminate()

    def join(self) -> tuple[str, bool]:
        """Wait until it is gone; how it ended, which always counts."""
        self._process.join()
        return f"the worker process died (killed, or out of memory; exit code {self._process.exitcode})", True
