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

from lcsc_opt.base.errors import LcscError, StudySpecError
from lcsc_opt.evaluation.worker import Answer, Job, WorkerSettings, serve

_VISIBLE = "CUDA_VISIBLE_DEVICES"


def gpus() -> list[str]:
    """The GPUs that this process may use, by the names that ``CUDA_VISIBLE_DEVICES`` takes."""
    import torch

    count = torch.cuda.device_count()
    listed = [name.strip() for name in os.environ.get(_VISIBLE, "").split(",") if name.strip()]
    return listed[:count] if len(listed) >= count else [str(index) for index in range(count)]


def cores() -> int:
    """How many cores this process may use: under a batch system often fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def environments(workers: int, devices: Sequence[str] = ()) -> list[Mapping[str, str]]:
    """The environment variables of each worker, with which ``cuda`` and ``auto`` mean its own device.

    Args:
        workers: how many.
        devices: the device of each worker, such as ``cuda:0`` or ``cpu``; empty spreads workers evenly over the GPUs.

    Raises:
        StudySpecError: there is no such GPU.
    """
    there = gpus()
    if not devices:
        return [{_VISIBLE: there[worker % len(there)]} if len(there) > 1 else {} for worker in range(workers)]
    numbers = [-1 if device == "cpu" else int(device.partition(":")[2] or 0) for device in devices]
    for device, number in zip(devices, numbers, strict=True):
        if number >= len(there):
            seen = f"{len(there)} of them" if there else "none"
            raise StudySpecError(f"workers: {device} is not there (torch sees {seen}); 'auto' takes what is")
    return [{_VISIBLE: "" if number < 0 else there[number]} for number in numbers]


class ThisMachine:
    """Workers are processes on this machine, which share the cores that this process may use."""

    elastic = False

    def threads(self, workers: int) -> int:
        """Cores for each worker."""
        return max(cores() // workers, 1)

    def start(self, settings: WorkerSettings) -> _Process:
        """Start a process. Raises OSError if that fails."""
        return _Process(settings)

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


class _Process:
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
        self._connection.send(job)

    def receive(self) -> Answer:
        answer: Answer = self._connection.recv()
        return answer

    def terminate(self) -> None:
        self._process.terminate()

    def join(self) -> tuple[str, bool]:
        self._process.join()
        return f"the worker process died (killed, or out of memory; exit code {self._process.exitcode})", True
