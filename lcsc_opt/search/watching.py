"""Progress of searches: a line for each, or one line for all studies side by side."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from lcsc_opt.base.progress import Advance, notice, progress
from lcsc_opt.database.nodes import NODES, KeptNodes
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.evaluation import Workers
from lcsc_opt.search.runner import Search

KEEP_SECONDS = 10.0  # between two writes of the workers' state


class Watch(Protocol):
    """Shows the progress of searches."""

    def __call__(self, search: Search, pool: Workers | None) -> contextlib.AbstractContextManager[OnTell]:
        """Show a search's progress while this is open. With a ``pool``, show also how many of its workers live."""
        ...


OnTell = Callable[[Search], None]


@contextlib.contextmanager
def own_line(search: Search, pool: Workers | None) -> Iterator[OnTell]:
    """A progress line for one search."""
    _say_continuing(search)
    with progress(search.name, search.budget.total, done=search.stored_spent) as advance:
        steps = _Steps(search)

        def on_tell(search: Search) -> None:
            advance(steps.new(search), note=", ".join(_notes(search.best, search.failures, pool)))

        on_tell(search)
        yield on_tell


class OneLine:
    """One line for studies side by side: the sum of their budgets, and the best loss of all.

    Args:
        advance: updates the line.
        studies: how many they are.
    """

    def __init__(self, advance: Advance, studies: int) -> None:
        self._advance, self._studies = advance, studies
        self._lock = threading.Lock()
        self._searching: dict[str, tuple[tuple[float, int] | None, int]] = {}
        self._running = 0

    @contextlib.contextmanager
    def __call__(self, search: Search, pool: Workers | None) -> Iterator[OnTell]:
        """Include a search in the line while this is open."""
        _say_continuing(search)
        steps = _Steps(search)

        def on_tell(search: Search) -> None:
            with self._lock:
                self._searching[search.name] = search.best, search.failures
                self._advance(steps.new(search), note=self._note(pool))

        with self._lock:
            self._running += 1
        try:
            yield on_tell
        finally:
            with self._lock:
                self._running -= 1

    def _note(self, pool: Workers | None) -> str:
        found = [(*best, name) for name, (best, _) in self._searching.items() if best is not None]
        best = [f"best {loss:.4g} in trial {number} of {name}" for loss, number, name in sorted(found)[:1]]
        failures = sum(failed for _, failed in self._searching.values())
        return ", ".join([f"{self._running} of {self._studies} studies search", *best, *_notes(None, failures, pool)])


class _Steps:
    """Counts how much of the budget was spent since the last call of ``new``."""

    def __init__(self, search: Search) -> None:
        self._shown = search.stored_spent

    def new(self, search: Search) -> int:
        steps = max(search.spent - self._shown, 0)
        self._shown += steps
        return steps


@contextlib.contextmanager
def keeping_nodes(study: StoredStudy, pool: Workers | None, on_tell: OnTell) -> Iterator[OnTell]:
    """``on_tell`` that also writes the state of each machine's workers into the database, now and then and at the end.

    Args:
        study: its lock must be held.
        pool: its workers; ``None`` if there are none: then nothing is written.
        on_tell: called every time.
    """
    if pool is None:
        yield on_tell
        return
    last = -math.inf

    def keep() -> None:
        study.set_attribute(NODES, KeptNodes(time.time(), tuple(pool.nodes())).as_stored())

    def on_tell_and_keep(search: Search) -> None:
        nonlocal last
        on_tell(search)
        if time.monotonic() - last >= KEEP_SECONDS:
            last = time.monotonic()
            keep()

    yield on_tell_and_keep
    keep()


def _say_continuing(search: Search) -> None:
    if (last := search.last_stored) is not None:
        notice(f"{search.name}: continuing after trial {last}")


def _notes(best: tuple[float, int] | None, failures: int, pool: Workers | None) -> list[str]:
    found = [] if best is None else [f"best {best[0]:.4g} in trial {best[1]}"]
    failed = [f"{failures} failed"] if failures else []
    return [*found, *failed, *([] if pool is None else [f"{pool.alive} of {len(pool)} workers"])]
