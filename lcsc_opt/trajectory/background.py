"""One call at a time that goes on while the caller does something else."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable


class Background:
    """Makes one call at a time in a thread of its own, which lives as long as the call.

    The thread is not a daemon, so an ending interpreter waits for the call. After that, in functions of :mod:`atexit`,
    a call is made at once in the calling thread.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._call: _Call | None = None

    @property
    def running(self) -> bool:
        """Whether a call goes on."""
        return self._call is not None and self._call.running

    def start(self, function: Callable[[], object]) -> None:
        """Call ``function``, after the call before has ended.

        Raises:
            BaseException: what the call before raised; this one is then not made.
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
            BaseException: what the ended call raised; only once.
        """
        if not self.running:
            self.finish()

    def finish(self) -> None:
        """Wait for the call. Where the user interrupts the waiting, the call goes on and may be waited for again.

        Raises:
            BaseException: what the call raised; only once.
        """
        if self._call is not None:
            self._call.wait()
            error, self._call = self._call.error, None
            if error is not None:
                raise error


class _Call(threading.Thread):
    """A call in a thread. Where the user interrupts its start, it is made or not made, but never beside another call.

    ``join`` is not used: interrupted by Ctrl-C, Python 3.11's takes the thread for ended, and nobody waits for it.
    """

    def __init__(self, function: Callable[[], object], name: str) -> None:
        super().__init__(name=name, daemon=False)
        self._function = function
        self._process = os.getpid()
        self._begun = False
        self._claim = threading.Lock()  # taken once: by the thread, or by the caller, who then knows that it never runs
        self._ended = threading.Event()
        self.error: BaseException | None = None

    @property
    def running(self) -> bool:
        return not self._ended.is_set() and self._process == os.getpid()  # a forked process has no such thread

    def begin(self) -> None:
        try:
            self.start()
        except RuntimeError:  # the interpreter is ending, and starts no thread any more
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
