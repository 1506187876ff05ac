"""One progress bar for everything that takes long: a rate, and the time that is left, on stderr."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

_LINE_SECONDS = 10.0  # how often a log that is not a terminal gets a line


@contextlib.contextmanager
def progress(description: str, total: int, *, done: int = 0) -> Iterator[Callable[..., None]]:
    """Show how far a loop of ``total`` steps has come; an earlier process did ``done`` of them.

    It yields ``advance(steps=1, *, note=None)``, which counts steps more as done; the note replaces the text behind the
    bar. On a terminal this is a bar, elsewhere (CI, SLURM) a line about every ten seconds. While one loop is shown,
    loops that begin inside it or in other threads show nothing.
    """
    if not _showing.acquire(blocking=False):
        yield lambda *_, **__: None
        return
    try:
        if sys.stderr.isatty():
            with tqdm(total=total, initial=done, desc=description, file=sys.stderr, dynamic_ncols=True) as bar:

                def advance(steps: int = 1, *, note: str | None = None) -> None:
                    if note is not None:
                        bar.set_postfix_str(note, refresh=False)
                    bar.update(steps)

                yield advance
        else:
            yield _Lines(description, total, done)
    finally:
        _showing.release()


_showing = threading.Lock()


def notice(message: str, *, every_time: bool = False) -> None:
    """Print a line on stderr about something that went well in the end, or that may go wrong later.

    Args:
        message: the line.
        every_time: print it each time, even inside :func:`said_once`.
    """
    if _listener is not None:
        _listener(message)
    elif _said is None or every_time or message not in _said:
        line = f"lcsc: {message}\n"
        if sys.stderr.isatty():
            tqdm.write(line, file=sys.stderr, end="")  # above the bar, if there is one
        else:
            sys.stderr.write(line)
        sys.stderr.flush()
        if _said is not None:
            _said.add(message)


_said: set[str] | None = None  # shared by all threads of this process, which give notice, too
_listener: Callable[[str], None] | None = None


@contextlib.contextmanager
def said_once() -> Iterator[None]:
    """While this is open, the same notice is printed once: a command may load an objective for several studies."""
    global _said
    before, _said = _said, set() if _said is None else _said
    try:
        yield
    finally:
        _said = before


def hand_notices_to(listener: Callable[[str], None]) -> None:
    """Hand this process's notices to ``listener`` from now on, for the process that started this one."""
    global _listener
    _listener = listener


class _Lines:
    """The same numbers as plain lines."""

    def __init__(self, description: str, total: int, done: int) -> None:
        self._description, self._total = description, total
        self._first, self._done = done, done
        self._start = self._last = time.monotonic()
        self._note = self._said = ""

    def __call__(self, steps: int = 1, *, note: str | None = None) -> None:
        self._done += steps
        self._note = self._note if note is None else note
        if steps == 0 and self._note == self._said:
            return  # there is nothing new
        now = time.monotonic()
        if now - self._last >= _LINE_SECONDS or self._done == self._total:
            self._last, self._said = now, self._note
            line = f"{self._description}: {self._done}/{self._total}"
            if self._done > self._first:
                speed = (self._done - self._first) / max(now - self._start, 1e-9)
                rate = f"{speed:.1f}/s" if speed >= 1 or speed == 0 else f"{1 / speed:.1f} s each"
                line += f", {rate}, {(self._total - self._done) / speed:.0f} s left"
            sys.stderr.write(f"{line}, {self._note}\n" if self._note else f"{line}\n")
            sys.stderr.flush()
