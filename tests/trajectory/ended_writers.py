"""Writers whose process ends before they are closed: killed, interrupted, or when the interpreter ends."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from lcsc_opt.trajectory import TrajectoryWriter
from tests.processes import SECONDS
from tests.trajectory.trajectory_examples import state_dict

SCRIPT = """
import atexit, gc, os, sys, threading, time, warnings, torch
from lcsc_opt.trajectory import TrajectoryWriter
gc.freeze()  # what was imported: no fork collects it when it ends
children = []
for path in sys.argv[1:]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of processes with several threads
        child = os.fork()
    if child == 0:
        break
    children.append(child)
else:
    for child in children:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    sys.exit()
last = False
def slow(descriptor, plain=os.fsync):  # the disk is not ready when the interpreter begins to end
    time.sleep(0.05 * last)
    return plain(descriptor)
os.fsync = slow
how, *registered = os.path.basename(path).split()
late = lambda: writer.append(3, {"w": torch.zeros(200_000)}, wait=how == "wait")
if registered == ["before"]: atexit.register(late)
writer = TrajectoryWriter(path)
def interrupted(thread, start=threading.Thread.start):  # as by Ctrl-C
    start(thread)
    if threading.current_thread() is threading.main_thread(): sys.exit(2)
if how == "start": threading.Thread.start = interrupted
for step in range(3):
    last = step == 2
    writer.append(step, {"w": torch.full((200_000,), float(step))}, wait=False)
    if step == 1 and how == "fork" and os.fork() == 0:
        sys.exit()  # as a worker of a data loader: it has the writer, too
if registered == ["after"]: atexit.register(late)
if how == "exception": raise SystemExit("stop")
"""


def ends_of_interpreters(folder: Path, cases: list[str]) -> tuple[list[int], str]:
    """Write ``folder / case`` to the interpreter's end in a fork for each case, all at the same time.

    Returns:
        The exit statuses, and what all said on standard error. Warnings are errors.
    """
    command = [sys.executable, "-W", "error", "-c", SCRIPT, *(str(folder / case) for case in cases)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    return [int(line) for line in answer.stdout.split()], answer.stderr


def append_for_ever(path: Path, sender: Connection, *, wait: bool) -> None:
    """Send each step that is on the disk. Go through those that are saved again first, as resumed training may."""
    writer = TrajectoryWriter(path, keep_last=3)
    for step in itertools.count(min(writer.steps, default=1)):
        writer.append(step, state_dict(step), wait=wait)
        if wait or step % 3 == 0:
            writer.flush()
            sender.send(step)


def append_until_signal(path: Path, begun: Path, number: signal.Signals, at: int) -> None:
    """The signal comes while the row ``at`` is written; each append that is called is noted in a file."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background processes do not have
    plain = os.write
    calls = itertools.count(1)

    def write(descriptor: int, piece: Any) -> int:
        if next(calls) == at:
            os.kill(os.getpid(), number)
        return plain(descriptor, piece)

    os.write = write
    weights = {"w": torch.zeros(8000)}
    writing = TrajectoryWriter(path, keep_last=4)
    with contextlib.suppress(KeyboardInterrupt), begun.open("w") as file, writing as writer:
        for step in range(1, 10**6):
            for tensor in weights.values():
                tensor.fill_(step)
            print(step, file=file, flush=True)
            writer.append(step, weights, wait=False)
