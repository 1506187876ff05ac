"""Waiting for other processes; and ``lcsc`` in one that is forked from another, which has imported what it needs."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import multiprocessing
import os
import runpy
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import NoReturn
from unittest import mock

from lcsc_opt.evaluation import worker

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *("nevergrad", "torch", "alembic.runtime.environment", "lcsc_opt.cli"),
        *("lcsc_opt.trajectory", "lcsc_opt.experiment.api", "lcsc_opt.exports.images", "lcsc_opt.views.figures.study"),
        *("lcsc_opt.evaluation.worker", "lcsc_opt.metrics.suite"),
        "tests.forked",
    ]
)
SECONDS = 300.0
ROOT = str(Path(__file__).parents[1])


def forked(
    target: Callable[..., object], *arguments: object, environment: Mapping[str, str] | None = None, **options: object
) -> ForkServerProcess:
    """A process, not started yet, that calls ``target`` with the environment of now, and this added to it."""
    found_first = [ROOT, os.environ.get("PYTHONPATH", "")]  # by the server: some packages install a `tests`, too
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, found_first))):
        forkserver.ensure_running()
    known = {**os.environ, **(environment or {})}
    return CONTEXT.Process(target=_with_environment, args=(known, target, arguments, options))


def _with_environment(
    known: dict[str, str], target: Callable[..., object], arguments: tuple[object, ...], options: dict[str, object]
) -> None:
    os.environ.clear()
    os.environ.update(known)
    target(*arguments, **options)


class ForkedWorker:
    """In place of the ``Popen`` of a worker: it is forked from what has imported torch, which takes most of a start."""

    def __init__(self, _command: Sequence[str], *, stdin: int, env: Mapping[str, str]) -> None:
        streams = [Connection(os.dup(descriptor)) for descriptor in (stdin, 1, 2)]  # which can be sent
        self._process = forked(_serve, *streams, environment=env)
        self._process.start()
        for stream in streams:
            stream.close()
        self.terminate = self._process.terminate

    def wait(self) -> int:
        """How it ended, as ``Popen`` says it."""
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode


def _serve(*streams: Connection) -> None:
    for descriptor, stream in enumerate(streams):
        os.dup2(stream.fileno(), descriptor)
        stream.close()
    worker.main()


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended: minus the number of the signal that killed it, or its exit status; what it said."""

    status: int | None
    out: str
    err: str


def wait_until(true: Callable[[], object]) -> None:
    """Look again and again; fails after minutes."""
    deadline = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < deadline, "it did not become true"
        time.sleep(0.01)


def finished_trials() -> int:
    """Those in ``studies.db`` here, read without Optuna, which would make the database."""
    try:
        with contextlib.closing(sqlite3.connect("file:studies.db?mode=ro", uri=True)) as connection:
            return int(connection.execute("SELECT COUNT(*) FROM trials WHERE state = 'COMPLETE'").fetchone()[0])
    except sqlite3.OperationalError:
        return 0


def peak_growth(watched: Callable[..., object], *arguments: object, first: Callable[..., object] | None = None) -> int:
    """Bytes of its own by which a process grows in ``watched(*arguments)``, after ``first(*arguments)``."""
    received, sent = CONTEXT.Pipe(duplex=False)
    process = forked(_peak, sent, watched, arguments, first)
    process.start()
    sent.close()
    grown = received.recv()
    process.join()
    return int(grown)


def _peak(
    sent: Connection, watched: Callable[..., object], arguments: tuple[object, ...], first: Callable[..., object] | None
) -> None:
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 2**17)  # M_MMAP_THRESHOLD: what is large is given back when it is freed, and counts when it comes
    if first is not None:
        first(*arguments)
    libc.malloc_trim(0)
    start, peak, done = _anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.0005):
            peak = max(peak, _anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    kept = watched(*arguments)
    done.set()
    watcher.join()
    sent.send(max(peak, _anonymous()) - start)
    del kept


def _anonymous() -> int:
    """Bytes of this process in memory that are of no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


_running: set[ForkServerProcess] = set()


def kill_what_still_runs() -> None:
    """A test that failed may not have waited for its processes."""
    while _running:
        process = _running.pop()
        process.kill()
        process.join()


class Lcsc:
    """A running ``lcsc ARGUMENTS``, in the working directory and with the environment of now.

    ``environment`` is added to it; ``out`` is where its output goes, in place of :attr:`Ended.out`; and ``first`` is
    what the process does before.
    """

    def __init__(
        self,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        out: Path | None = None,
        first: Callable[[], object] | None = None,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._out, self._err = out or Path(self._folder.name) / "out", Path(self._folder.name) / "err"
        files = (str(self._out), str(self._err))
        self.process = forked(_lcsc, arguments, *files, first, environment=environment)
        self.process.start()
        _running.add(self.process)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait(self) -> Ended:
        """Until it ends."""
        self.process.join(SECONDS)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        _running.discard(self.process)
        with self._folder:
            out = self._out.read_text() if self._out.is_file() else ""
            return Ended(self.process.exitcode, out, self._err.read_text())


def lcsc_process(*arguments: str, environment: Mapping[str, str] | None = None, **options: object) -> Ended:
    """Run ``lcsc ARGUMENTS`` to its end; see :class:`Lcsc`."""
    return Lcsc(*arguments, environment=environment, **options).wait()  # type: ignore[arg-type]


def script_process(path: Path, *arguments: str) -> Ended:
    """Run a script to its end, as ``python PATH ARGUMENTS`` does, in a process that has imported what it needs."""
    return Lcsc(first=functools.partial(_as_script, str(path.resolve()), arguments)).wait()


def run_script(path: Path) -> None:
    """Run a script in this process, which has imported what it needs, as ``python PATH`` does."""
    with mock.patch.object(sys, "path", [str(path.parent.resolve()), *sys.path]):
        runpy.run_path(str(path.resolve()), run_name="__main__")


def _as_script(path: str, arguments: tuple[str, ...]) -> NoReturn:
    sys.argv, sys.path[:] = [path, *arguments], [str(Path(path).parent), *sys.path]
    runpy.run_path(path, run_name="__main__")
    sys.exit()


def _lcsc(arguments: tuple[str, ...], out: str, err: str, first: Callable[[], object] | None) -> None:
    for name, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
    if first is not None:
        first()
    from lcsc_opt.cli import main

    main(arguments)
