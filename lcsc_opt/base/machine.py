"""What this process shares with the machine: memory, and cores on which threads wait for each other."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import threading
import time
from collections.abc import Iterator

from lcsc_opt.base import IMPORTED_AT

_BUSY = 0.25  # of the cores
_SECONDS_OF_LOAD = 60.0  # over which the system takes the mean of its load
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
    if not _wait_is_chosen():
        os.environ.update(WAITING)


def _wait_is_chosen() -> bool:
    """Whether the environment says how threads wait, by the user's choice or by ours."""
    return any(name in os.environ for name in (*WAITING, "OMP_WAIT_POLICY"))


@contextlib.contextmanager
def short_waits() -> Iterator[None]:
    """While this is open, threads of a torch that is imported already wait as after :func:`let_waiting_threads_sleep`.

    Only where others use the cores: alone, small networks would be slower. GNU's OpenMP spins for a three-hundredth of
    its usual time while a process has more of its threads than there are cores. Further teams of threads, which sleep,
    make them more. What is computed stays the same, bit for bit.
    """
    if _wait_is_chosen() or _load_of_others() < _BUSY * (os.cpu_count() or 1):
        yield
        return
    import torch

    has_ended = threading.Event()

    def hold_a_team(has_begun: threading.Event) -> None:
        try:
            torch.ones(_SHARED_AMONG_THREADS, device="cpu").add_(1)
        finally:
            has_begun.set()
        has_ended.wait()

    further = torch.get_num_threads() - 1  # threads of a team beside the one that has it
    teams = 0
    if further:
        teams = (cores() - 1) // further
    holders = []
    try:
        for _ in range(teams):
            has_begun = threading.Event()
            holders.append(threading.Thread(target=hold_a_team, args=[has_begun], name="lcsc-waits", daemon=True))
            holders[-1].start()
            has_begun.wait()
        yield
    finally:
        has_ended.set()
        for holder in holders:
            holder.join()


def _load_of_others() -> float:
    """How many cores other processes use, about; 0 where the system does not say it."""
    try:
        load, _, _ = os.getloadavg()
    except (OSError, AttributeError):  # the latter on Windows
        return 0.0
    return load - time.process_time() / max(time.time() - IMPORTED_AT, _SECONDS_OF_LOAD)
