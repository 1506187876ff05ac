"""The progress of a search: a line on the terminal, and the state of its workers in the database."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator

from lcsc_opt.base.progress import notice, progress
from lcsc_opt.database.nodes import NODES, KeptNodes
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.evaluation import WorkerPool
from lcsc_opt.search.runner import Search

_KEEP_SECONDS = 10.0  # between two writes of the workers' state


@contextlib.contextmanager
def reporting(
    search: Search, study: StoredStudy, pool: WorkerPool | None, *, elastic: bool
) -> Iterator[Callable[[Search], None]]:
    """A progress line while this is open; yields what :meth:`Search.run` calls.

    The state of each machine's workers is written now and then, and at the end.

    Args:
        search: what is shown.
        study: its lock must be held.
        pool: the workers, if there are some.
        elastic: whether the line shows how many of the workers live.
    """
    if (last := search.last_stored) is not None:
        notice(f"{search.name}: continuing after trial {last}")
    shown, kept_at = search.stored_spent, -math.inf

    def keep() -> None:
        if pool is not None:
            study.set_attribute(NODES, KeptNodes(time.time(), tuple(pool.nodes())).as_stored())

    with progress(search.name, search.budget.total, done=shown) as advance:

        def on_tell(search: Search) -> None:
            nonlocal shown, kept_at
            notes = [f"best {search.best[0]:.4g} in trial {search.best[1]}"] if search.best else []
            notes += [f"{search.failures} failed"] if search.failures else []
            notes += [f"{pool.alive} of {len(pool)} workers"] if elastic and pool is not None else []
            advance(max(search.spent - shown, 0), note=", ".join(notes))
            shown = max(shown, search.spent)
            if time.monotonic() - kept_at >= _KEEP_SECONDS:
                kept_at = time.monotonic()
                keep()

        on_tell(search)
        yield on_tell
        keep()
