"""One call at a time that runs in the background."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable


class Background:
    """Makes one call at a time in a thread of its own, which lives as long as the call.

    The thread is not a daemon, so an ending interpreter waits for the call. Later, in functions of :mod:`atexit`, no
    thread can start, and the call is made at once in the calling thread.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._call: _Call | None = None

    @property
    def running(self) -> bool:
        """Whether a call is running."""
        return self._call is not None and self._call.running

    def start(self, function: Callable[[], object]) -> None:
        """Call ``function``, after the previous call has ended.

        Raises:
            BaseException: the error of the previous call; ``function`` is then not called.
        """
        self.finish()
        if not threading.main_thread().is_alive():
            function()
            return
        self._call = _Call(function, self._name)
        self._call.begin()

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
        if self._call is not None:
            self._call.wait()
            error, self._call = self._call.error, None
            if error is not None:
                raise error


class _Call(threading.Thread):
    """A call in a thread. If the user interrupts its start, it may or may not be made, but never beside another call.

    ``join`` is not used: after Ctrl-C, Python 3.11's ``join`` takes a running thread for ended.
    """

    def __init__(self, function: Callable[[], object], name: str) -> None:
        super().__init__(name=name, daemon=False)
        self._function = function
        self._process = os.getpid()
        self._begun = False
        self._claim = threading.Lock()  # taken once: by the thread to run, or by the caller so that it never runs
        self._ended = threading.Event()
        self.error: BaseException | None = None

    @property
    def running(self) -> bool:
        return not self._ended.is_set() and self._process == os.getpid()  # a forked process does not have the thread

    def begin(self) -> None:
        try:
            self.start()
        except RuntimeError:  # an ending interpreter starts no threads
            self.run()
        self._begun = True

    def run(self) -> None:
        if self._claim.acquire(blocking=False):
            try:
                self._function()
            except BaseException as error:
                self.error = error
            finally:
                del self._function
                self._ended.set()

    def wait(self) -> None:
        """Wait until the call has ended. One that was interrupted before it began never begins."""
        if self.running and (self._begun or not self._claim.acquire(blocking=False)):
            self._ended.wait()
