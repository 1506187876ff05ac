"""How many workers live on each machine, how much of their time they have something to do, and how many died."""

from __future__ import annotations

import collections
import threading
import time

from lcsc_opt.base.records import NodeWork

RECENT_SECONDS = 60.0  # the last ones, over which the busy share is measured


class Census:
    """Counts what happens to workers, by the machine that it happens on. Safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._machines: dict[str, _Machine] = {}

    def count(self, machine: str, *, alive: int = 0, busy: int = 0, deaths: int = 0) -> None:
        """Add to the numbers of workers on a machine that are alive, that have something to do, and that died."""
        now = time.monotonic()
        with self._lock:
            self._machines.setdefault(machine, _Machine(now)).count(now, alive, busy, deaths)

    def nodes(self) -> list[NodeWork]:
        """What is known of each machine, by name; the name is empty for workers that died before it was known."""
        now = time.monotonic()
        with self._lock:
            return [machine.look(now, name) for name, machine in sorted(self._machines.items())]


class _Machine:
    """The seconds that workers lived and were busy on one machine, summed over workers up to the last change."""

    def __init__(self, now: float) -> None:
        self._alive = self._busy = self._deaths = 0
        self._changed, self._lived, self._worked = now, 0.0, 0.0
        self._looks = collections.deque([(now, 0.0, 0.0)])

    def count(self, now: float, alive: int, busy: int, deaths: int) -> None:
        seconds, self._changed = now - self._changed, now
        self._lived += seconds * self._alive
        self._worked += seconds * self._busy
        self._alive += alive
        self._busy += busy
        self._deaths += deaths

    def look(self, now: float, name: str) -> NodeWork:
        self.count(now, 0, 0, 0)
        while len(self._looks) > 1 and self._looks[1][0] <= now - RECENT_SECONDS:
            self._looks.popleft()
        _, lived, worked = self._looks[0]
        self._looks.append((now, self._lived, self._worked))
        seconds = self._lived - lived
        return NodeWork(name, self._alive, (self._worked - worked) / seconds if seconds > 0 else None, self._deaths)
