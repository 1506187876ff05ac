"""Named spans of work (merge, sample, ask, …) for measuring. Where nothing listens, they cost nothing.

The code that does the work marks its spans; only :mod:`lcsc_opt.diagnostics.profiling` listens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

Listener = Callable[[str], contextlib.AbstractContextManager[object]]
"""The name of a span → a context that is open as long as the span. It is called in the thread that does the work."""

ASK, TELL, DATABASE, EVALUATE = "ask", "tell", "database", "evaluate"
MERGE, SAMPLE, FEATURES, METRIC = "merge", "sample", "features", "metric"
OF_EVALUATION = (MERGE, SAMPLE, FEATURES, METRIC)

_listeners: tuple[Listener, ...] = ()


@contextlib.contextmanager
def span(name: str) -> Iterator[None]:
    """Mark the work that is done while this is open as the part ``name``."""
    if not _listeners:
        yield
        return
    with contextlib.ExitStack() as stack:
        for listener in _listeners:
            stack.enter_context(listener(name))
        yield


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """While this is open, ``listener`` is called for the spans of all threads."""
    global _listeners
    _listeners = (*_listeners, listener)
    try:
        yield
    finally:
        _listeners = tuple(other for other in _listeners if other is not listener)
