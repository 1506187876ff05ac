"""What this process shares with the machine: signals, memory, and cores on which threads wait for each other."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

_NUMBERS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


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
    handlers: dict[int, Any] = {number: one for number in _NUMBERS if callable(one := signal.getsignal(number))}
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


def free_memory() -> None:
    """Free the memory of a failed attempt, also on the accelerator, for the next one.

    Call it when the exception is gone: its frames hold the attempt's tensors.
    """
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


WAITING = {"GOMP_SPINCOUNT": "3000", "KMP_BLOCKTIME": "0"}
"""Settings of GNU's and Intel's OpenMP, which read them when torch loads them. 3,000 turns are some microseconds, so no
thread falls asleep between two operations of a small network: that would take longer than the operations."""


def let_waiting_threads_sleep() -> None:
    """Call this before torch is imported. It does nothing where the user has set how threads wait.

    When other work shares the cores, a thread may spin while it waits for a thread that has no core. A search or a
    training then has only a small part of the speed that it has alone. With threads that sleep, it has about half of
    that speed.
    """
    if not any(name in os.environ for name in (*WAITING, "OMP_WAIT_POLICY")):
        os.environ.update(WAITING)
