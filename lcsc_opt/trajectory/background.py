"""One call at a time that runs in the background."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


class Background:
    """Makes one call at a time in a thread of its own.

    An ending interpreter waits for the call. Later, in functions of :mod:`atexit`, no thread can start, and the call is
    made at once in the calling thread. Ctrl-C at any moment leaves a call that can be waited for again.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, name)
        self._process = os.getpid()
        self._begun = False
        self._errors: list[BaseException] = []

    @property
    def running(self) -> bool:
        """Whether a call may be running; never in a forked process, which does not have the thread."""
        return self._begun and self._process == os.getpid()

    def start(self, function: Callable[[], object]) -> None:
        """Call ``function``, after the previous call has ended.

        Raises:
            BaseException: the error of the previous call; ``function`` is then not called.
        """

        def call() -> None:
            try:
                function()
            except BaseException as error:
                self._errors.append(error)
            self._begun = False

        self.finish()
        self._begun = True
        try:
            self._pool.submit(call)
        except RuntimeError:  # the interpreter is ending
            self._begun = False
            function()

    def check(self) -> None:
        """Raise the error of an ended call, without waiting.

        Raises:
            BaseException: the error of the ended call; only once.
        """
        if not self.running:
            self.finish()

    def finish(self) -> None:
        """Wait for the call. If the user interrupts the waiting, the call goes on and can be waited for again.

        Raises:
            BaseException: the error of the call; only once.
        """
        if self.running:
            with contextlib.suppress(RuntimeError):  # the interpreter is ending, and has waited
                self._pool.submit(int).result()  # the pool's only thread has then ended the call
            self._begun = False
        if self._errors:
            raise self._errors.pop()
