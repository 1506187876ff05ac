"""A background thread that makes one call at a time."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Background:
    """Makes one call at a time in its own thread; an interpreter that ends waits for the last one."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, name)
        self._process = os.getpid()
        self._call: Future[object] | None = None

    @property
    def running(self) -> bool:
        """Whether a call may be running; never in a forked process, which does not have the thread."""
        return self._call is not None and not self._call.done() and self._process == os.getpid()

    def start(self, function: Callable[[], object]) -> None:
        """Call ``function``, after the previous call has ended.

        Raises:
            Exception: the error of the previous call; ``function`` is then not called.
        """
        self.finish()
        try:
            self._call = self._pool.submit(function)
        except RuntimeError:  # the interpreter is ending, and starts no more threads
            function()

    def finish(self) -> None:
        """Wait for the call and raise its error, once. If the user interrupts the waiting, the call continues."""
        call = self._call
        if call is None or self._process != os.getpid():
            return
        error = call.exception()
        self._call = None
        if error is not None:
            raise error
