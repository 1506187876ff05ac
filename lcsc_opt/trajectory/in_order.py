"""Work that goes on in a thread of its own, in the order in which it was given."""

from __future__ import annotations

import collections
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType


class InOrder:
    """Calls functions one after the other in one thread, while the caller does something else.

    Arguments that wait are kept in memory, so no more than ``most_bytes`` of them may wait.

    Args:
        name: of the thread.
        most_bytes: of arguments; :meth:`submit` waits where there would be more.
    """

    def __init__(self, name: str, *, most_bytes: int = 0) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)  # starts its thread when it needs it
        self._waiting: collections.deque[tuple[Future[object], int]] = collections.deque()
        self._bytes, self._most_bytes = 0, most_bytes

    def __enter__(self) -> InOrder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the thread; calls that had not begun yet never will."""
        self._pool.shutdown(cancel_futures=True)

    def submit(self, function: Callable[..., object], *arguments: object, nbytes: int = 0) -> None:
        """Call ``function(*arguments)`` after the calls submitted before, soon.

        Args:
            function: what to call; what it returns is dropped.
            arguments: for it.
            nbytes: what they take.

        Raises:
            BaseException: what an earlier call raised.
        """
        try:
            future = self._pool.submit(function, *arguments)
        except RuntimeError:  # the interpreter is ending, and starts no thread any more
            function(*arguments)
            return
        self._waiting.append((future, nbytes))
        self._bytes += nbytes
        while self._waiting and (self._waiting[0][0].done() or self._too_much()):
            self._finish_one()

    def check(self) -> None:
        """Wait for nothing.

        Raises:
            BaseException: what a call raised that has ended.
        """
        while self._waiting and self._waiting[0][0].done():
            self._finish_one()

    def finish(self) -> None:
        """Wait for all calls; where the user interrupts the waiting, they go on, and may be waited for again.

        Raises:
            BaseException: what the first of them raised that failed; those that had not begun yet never will.
        """
        while self._waiting:
            wait([self._waiting[0][0]])
            try:
                self._finish_one()
            except BaseException:
                self._drop()
                raise

    def _too_much(self) -> bool:
        return len(self._waiting) > 1 and self._bytes > self._most_bytes

    def _finish_one(self) -> None:
        wait([self._waiting[0][0]])  # it stays in the line if the user interrupts here
        future, size = self._waiting.popleft()
        self._bytes -= size
        future.result()

    def _drop(self) -> None:
        running = [future for future, _ in self._waiting if not future.cancel()]
        self._waiting.clear()
        self._bytes = 0
        wait(running)
