"""Threads that wait for each other fall asleep soon, so that a search gets its share beside other work."""

from __future__ import annotations

import os

WAITING = {"GOMP_SPINCOUNT": "3000", "KMP_BLOCKTIME": "0"}
"""Of GNU's and of Intel's OpenMP, which read them when they are loaded, with torch. 3,000 turns are some
microseconds: between two operations of a small network nobody falls asleep, which would take longer than they do."""


def let_waiting_threads_sleep() -> None:
    """To be called before torch is imported; does nothing where the user has said how threads wait.

    Beside other work a thread that spins waits for one that has no core: a search or a training then gets a small part
    of what it gets alone, and with threads that fall asleep about its half (``benchmarks/fair_share.py``).
    """
    if not any(name in os.environ for name in (*WAITING, "OMP_WAIT_POLICY")):
        os.environ.update(WAITING)
