"""One progress bar for everything that takes long: a rate, and the time that is left, on stderr."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

_LINE_SECONDS = 10.0  # how often a log that is not a terminal gets a line


class _Advance(Protocol):
    """``advance()`` counts one more step done; ``note`` replaces the text behind the bar."""

    def __call__(self, steps: int = 1, *, note: str | None = None) -> None:
        """Count ``steps`` more as done."""
        ...


class _CutColumn(ProgressColumn):
    """A text that is cut on a narrow terminal, so that the numbers next to it stay whole."""

    def __init__(self, text: Callable[[Task], str]) -> None:
        super().__init__(Column(no_wrap=False))
        self._text = text

    def render(self, task: Task) -> Text:
        return Text(self._text(task), no_wrap=True, overflow="ellipsis")


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("-/s" if speed is None else _rate(speed))


def _rate(speed: float) -> str:
    return f"{speed:.1f}/s" if speed >= 1 or speed == 0 else f"{1 / speed:.1f} s each"


@contextlib.contextmanager
def progress(description: str, total: int, *, done: int = 0) -> Iterator[_Advance]:
    """Show how far a loop of ``total`` steps has come; an earlier process did ``done`` of them.

    On a terminal this is a bar, elsewhere (CI, SLURM) a line about every ten seconds. While one loop is shown, loops
    that begin inside it or in other threads show nothing.
    """
    if not _showing.acquire(blocking=False):
        yield _show_nothing
        return
    try:
        if sys.stderr.isatty():
            with _bar(description, total, done) as advance:
                yield advance
        else:
            yield _Lines(description, total, done)
    finally:
        _showing.release()


_showing = threading.Lock()


def _show_nothing(steps: int = 1, *, note: str | None = None) -> None:
    """Do nothing: another loop is shown."""


@contextlib.contextmanager
def _bar(description: str, total: int, done: int) -> Iterator[_Advance]:
    columns = (
        _CutColumn(lambda task: task.description),
        BarColumn(bar_width=30),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        _RateColumn(Column(no_wrap=True)),
        TimeElapsedColumn(Column(no_wrap=True)),
        TextColumn("left"),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        _CutColumn(lambda task: str(task.fields["note"])),
    )
    with Progress(*columns, console=Console(stderr=True, emoji=False)) as bar:
        task = bar.add_task(description, total=total, completed=done, note="")

        def advance(steps: int = 1, *, note: str | None = None) -> None:
            if note is None:
                bar.update(task, advance=steps)
            else:
                bar.update(task, advance=steps, note=note)

        yield advance


def notice(message: str, *, every_time: bool = False) -> None:
    """Print a line on stderr about something that went well in the end, or that may go wrong later.

    Args:
        message: the line.
        every_time: print it each time, even inside :func:`said_once`.
    """
    if _listener is not None:
        _listener(message)
    elif _said is None or every_time or message not in _said:
        sys.stderr.write(f"lcsc: {message}\n")
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
            self._write(now - self._start)

    def _write(self, seconds: float) -> None:
        line = f"{self._description}: {self._done}/{self._total}"
        if self._done > self._first:
            speed = (self._done - self._first) / max(seconds, 1e-9)
            line += f", {_rate(speed)}, {(self._total - self._done) / speed:.0f} s left"
        sys.stderr.write(f"{line}, {self._note}\n" if self._note else f"{line}\n")
        sys.stderr.flush()
