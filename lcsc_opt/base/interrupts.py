"""Ctrl-C and its like, held back until work has come to a point where it can stop."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

NUMBERS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextlib.contextmanager
def interrupt_held() -> Iterator[Callable[[], bool]]:
    """Hold back SIGINT, SIGTERM or SIGHUP until the end, where its own handler is called. A second one acts at once.

    Signals that are ignored, or that end the process without a handler, stay as they are. Only the main thread gets
    signals; in others nothing is held.

    Yields:
        Whether a signal waits.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    handlers: dict[int, Any] = {number: one for number in NUMBERS if callable(one := signal.getsignal(number))}
    waiting: list[tuple[int, Any]] = []

    def come(number: int, frame: Any) -> None:
        waiting.append((number, frame))
        if len(waiting) > 1:
            handlers[number](number, frame)

    for number in handlers:
        signal.signal(number, come)
    try:
        yield lambda: bool(waiting)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if waiting:
        number, frame = waiting[0]
        handlers[number](number, frame)
