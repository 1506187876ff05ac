"""What this process shares with the machine: memory, and cores on which threads wait for each other."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import threading
from collections.abc import Iterator

_BUSY = 0.25  # of the cores, in the mean of a minute: a search that has just begun has used less itself
_SHARED_AMONG_THREADS = 2**20  # numbers, which one thread alone would not add


def cores() -> int:
    """How many cores this process may use: under a batch system often fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def collector_resting() -> Iterator[None]:
    """While this is open, Python does not look for garbage.

    What makes a million objects that all stay, as an import of a large package does, is looked through again and again:
    a quarter of its time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def free_memory() -> None:
    """Free the memory of a failed attempt, also on the accelerator, for the next one.

    Call it after the except clause: frames of the exception hold the attempt's tensors.
    """
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.accelerator.is_available():  # in torch 2.10 its own empty_cache knows no Apple
        torch.get_device_module(torch.accelerator.current_accelerator()).empty_cache()


WAITING = {"GOMP_SPINCOUNT": "3000", "KMP_BLOCKTIME": "0"}
"""Settings of GNU's and Intel's OpenMP, which read them when torch loads them. 3,000 turns are some microseconds, so no
thread falls asleep between two operations of a small network: that would take longer than the operations."""


def let_waiting_threads_sleep() -> None:
    """Set :data:`WAITING` in the environment, unless the user has set how threads wait.

    Call it before torch is imported.

    Where other work shares the cores, OpenMP's threads by default spin while they wait for a thread that has no core.
    A search or a training then has only a small part of the speed that it has alone; with threads that sleep, about
    half of it.
    """
    if not _is_said_how_threads_wait():
        os.environ.update(WAITING)


def _is_said_how_threads_wait() -> bool:
    """Whether the environment says it, by the user's choice or by ours."""
    return any(name in os.environ for name in (*WAITING, "OMP_WAIT_POLICY"))


@contextlib.contextmanager
def short_waits() -> Iterator[None]:
    """While this is open, threads of a torch that is imported already wait as after :func:`let_waiting_threads_sleep`.

    Only where others use the cores: alone, small networks would be slower. GNU's OpenMP spins for a three-hundredth of
    its usual time while a process has more threads than cores, and a second team of threads, which sleeps, makes them
    more. What is computed stays the same, bit for bit.
    """
    others_use_cores = os.getloadavg()[0] >= _BUSY * cores()
    if _is_said_how_threads_wait() or not others_use_cores:
        yield
        return
    import torch

    has_begun = threading.Event()
    has_ended = threading.Event()

    def hold_a_team() -> None:
        torch.ones(_SHARED_AMONG_THREADS).add_(1)
        has_begun.set()
        has_ended.wait()

    holder = threading.Thread(target=hold_a_team, daemon=True)
    holder.start()
    has_begun.wait()
    try:
        yield
    finally:
        has_ended.set()
        holder.join()
