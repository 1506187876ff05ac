"""A background thread that makes one call at a time, also when signals come or the interpreter ends."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable


class Background:
    """Makes one call at a time in its own thread.

    Whoever waits for a call that no thread has begun makes it. So Ctrl-C while the thread starts leaves a call that can
    be waited for, and an interpreter that starts no more threads makes it at once. A call that a signal's handler ends
    by an exception, as Ctrl-C does, is made again.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self._call: Callable[[], object] | None = None
        self._calling = threading.Lock()
        self._caller: int | None = None  # the thread that makes the call
        self._errors: list[Exception] = []  # of the last call, at most one

    @property
    def running(self) -> bool:
        """Whether a call was started and may not have ended; never in a forked process, which lacks the thread."""
        return self._call is not None and self._process == os.getpid()

    def start(self, function: Callable[[], object]) -> None:
        """Call ``function``, after the previous call has ended.

        Raises:
            Exception: the error of the previous call; ``function`` is then not called.
        """
        self.finish()
        self._call = function
        if threading.main_thread().is_alive():  # else the interpreter is ending, and does not wait for new threads
            with contextlib.suppress(RuntimeError):  # no more threads can be started
                # the interpreter waits at its end for threads that are not daemons
                threading.Thread(target=self._make, name="lcsc-save", daemon=False).start()
                return
        self.finish()

    def finish(self) -> None:
        """Wait for the call and raise its error, once. If the user interrupts the waiting, the call continues."""
        if self.running:
            self._make()  # after the thread that makes the call, or in its place
        if self._errors:
            raise self._errors.pop()

    def _make(self) -> None:
        """Make the call unless it is made already; wait for another thread that makes it."""
        if self._caller == threading.get_ident():  # a signal's handler, within the call: it would wait for itself
            return
        with self._calling:
            self._caller = threading.get_ident()
            try:
                if self._call is not None:
                    self._call()
                self._call = None  # whoever waits next has nothing to make
            except Exception as error:
                self._errors.append(error)
                self._call = None
            finally:
                self._caller = None
