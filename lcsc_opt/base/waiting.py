"""Threads that wait for each other fall asleep soon, so that a search gets its share beside other work."""

from __future__ import annotations

import os

WAITING = {"GOMP_SPINCOUNT": "3000", "KMP_BLOCKTIME": "0"}
"""Of GNU's and of Intel's OpenMP, which read them when they are loaded, with torch. 3,000 turns are some
microseconds: between two operations of a small network nobody falls asleep, which would take longer than they do."""


def let_waiting_threads_sleep() -> None:
    """To be called before torch is imported; does nothing where the user has said how threads wait.

    Beside other work, a spinning thread may wait for one that has no core. A search or a training then runs at a small
    part of its speed alone; with threads that sleep it runs at about half (``benchmarks/fair_share.py``).
    """
    if not any(name in os.environ for name in (*WAITING, "OMP_WAIT_POLICY")):
        os.environ.update(WAITING)
