"""What this process shares with the machine: memory, and cores on which threads wait for each other."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterator


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
    if not any(name in os.environ for name in (*WAITING, "OMP_WAIT_POLICY")):
        os.environ.update(WAITING)
