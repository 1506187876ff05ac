"""Messages, through ``logging``, and one progress bar for all long loops, both on stderr.

The logger is ``lcsc_opt``. As for any library, an application decides where its messages go, and silences them with
``logging.getLogger("lcsc_opt").setLevel(...)``. The command line prints them, and so does :func:`lcsc_opt.run` unless
the application has configured logging.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import io
import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from lcsc_opt.base.streams import has_no_columns, is_terminal, printable, write_message

SLOW_SECONDS = 1.0  # without a line, of which a user wonders
STILL_SECONDS = 4.0  # after which what has no steps to count says that it goes on
_LINE_SECONDS = 10.0  # how often a log that is not a terminal gets a line

INTERRUPTED = "interrupted; what finished is kept"  # and how to continue

log = logging.getLogger("lcsc_opt")
log.addHandler(logging.NullHandler())


_said_at = 0.0  # when the last notice was


def notice(message: str, *, every_time: bool = False) -> None:
    """Log a line about something that went well in the end, or that may go wrong later.

    Args:
        message: the line.
        every_time: log it each time, even inside :func:`each_notice_once`.
    """
    if _logged is not None:
        if message in _logged and not every_time:
            return
        _logged.add(message)
    global _said_at
    _said_at = time.monotonic()
    log.info("%s", message)


@contextlib.contextmanager
def said_if_slow(message: str) -> Iterator[None]:
    """Log ``message`` once this has been open for a second, and from then on how long it takes.

    The later lines come only when nothing else was said for some seconds.
    """
    ended = threading.Event()
    start = time.monotonic()

    def say() -> None:
        if not ended.wait(SLOW_SECONDS):
            notice(message)
        while not ended.wait(STILL_SECONDS / 4):
            now = time.monotonic()
            if now - _said_at >= STILL_SECONDS and not _showing.locked():
                notice(f"{message}: {now - start:.0f} s so far")

    threading.Thread(target=say, name="lcsc-slow", daemon=True).start()  # a process that ends waits for no message
    try:
        yield
    finally:
        ended.set()


_logged: set[str] | None = None  # the notices inside of each_notice_once, of all threads


@contextlib.contextmanager
def each_notice_once() -> Iterator[None]:
    """While this is open, the same notice is logged once: a command may load an objective for several studies.

    It may be opened inside of another one, which then still knows what was logged.
    """
    global _logged
    before = _logged
    if before is None:
        _logged = set()
    try:
        yield
    finally:
        _logged = before


class _TerminalHandler(logging.Handler):
    """Prints on what ``sys.stderr`` is at that moment, above the progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record) + "\n"
            if is_terminal(sys.stderr):
                tqdm.write(printable(line), file=sys.stderr, end="")
            else:
                write_message(line)
        except Exception:  # as logging's own handlers do: a message never stops the work
            self.handleError(record)


@contextlib.contextmanager
def messages_on_stderr() -> Iterator[None]:
    """While this is open, messages are printed on stderr as ``lcsc: MESSAGE``, those for debugging aside."""
    handler = _TerminalHandler()
    handler.setFormatter(logging.Formatter("lcsc: %(message)s"))
    level_before = log.level
    log.setLevel(logging.INFO)
    with contextlib.ExitStack() as opened:
        opened.callback(log.setLevel, level_before)
        if not any(isinstance(attached, _TerminalHandler) for attached in log.handlers):
            log.addHandler(handler)
            opened.callback(log.removeHandler, handler)
            # whatever is imported meanwhile may give the root logger a handler, which would print each line again
            opened.callback(setattr, log, "propagate", log.propagate)
            log.propagate = False
        yield


@contextlib.contextmanager
def messages_by_default() -> Iterator[None]:
    """While this is open, messages are printed on stderr, unless the application has configured logging."""
    handlers = list(log.handlers)
    if log.propagate:
        handlers += logging.getLogger().handlers
    has_handler = any(not isinstance(handler, logging.NullHandler) for handler in handlers)
    if log.level != logging.NOTSET or has_handler:  # the application has set what receives our messages
        yield
    else:
        with messages_on_stderr():
            yield


class _Listener(logging.Handler):
    """Hands messages to a function."""

    def __init__(self, listener: Callable[[str], None]) -> None:
        super().__init__()
        self._listener = listener

    def emit(self, record: logging.LogRecord) -> None:
        self._listener(record.getMessage())


def hand_notices_to(listener: Callable[[str], None]) -> None:
    """Hand this process's notices to ``listener`` from now on, for the process that started this one.

    It shows the progress, and this one shows none.
    """
    global _is_shown_elsewhere
    _is_shown_elsewhere = True
    for handler in list(log.handlers):
        log.removeHandler(handler)
    log.addHandler(_Listener(listener))
    log.setLevel(logging.INFO)
    log.propagate = False


@contextlib.contextmanager
def progress(description: str, total: int, *, done: int = 0, after: float = 0.0) -> Iterator[Callable[..., None]]:
    """Show how far a loop of ``total`` steps has come; an earlier process did ``done`` of them.

    It yields ``advance(steps=1, *, note=None, more=0)``, which counts more steps as done; a note replaces the text
    after the bar, and ``more`` steps come to the total. On a terminal this is a bar, elsewhere (CI, SLURM) a line about
    every ten seconds, or every ``after`` seconds. While one loop is shown, those that begin inside it or in other
    threads stand behind its bar, if they take longer than a second. Nothing is shown where notices are silenced, nor of
    a loop that ends within ``after`` seconds, or before the first line of a log is due.
    """
    global _shown
    if log.level > logging.INFO or _is_shown_elsewhere:
        yield lambda *_, **__: None
        return
    if not _showing.acquire(blocking=False):
        with progress_inside(description, total) as advance:
            yield advance
        return
    try:
        bar_class, options = _way_to_show(after)
        with _bars(are_shown=True):  # ours also inside an evaluation
            bar = bar_class(total=total, initial=done, desc=description, **options)
        bar.note = ""
        bar.inside = {}  # a loop inside → how far it is; one that is never closed goes with the bar
        with bar:

            def advance(steps: int = 1, *, note: str | None = None, more: int = 0) -> None:
                bar.total += more
                if note is not None:
                    bar.note = note
                    _annotate(bar)
                bar.update(steps)

            _shown = bar
            yield advance
    finally:
        _shown = None
        _showing.release()


@contextlib.contextmanager
def progress_inside(description: str, total: int) -> Iterator[Callable[..., None]]:
    """As :func:`progress`, of a loop that is shown only behind the bar of one around it, if it lasts for a second."""
    bar = _shown
    if bar is None or bar.disable:
        yield lambda *_, **__: None
        return
    this = object()
    begun = time.monotonic()
    shown_at = begun - bar.mininterval
    done = 0

    def advance(steps: int = 1, *, more: int = 0, **_: Any) -> None:
        nonlocal done, total, shown_at
        done += steps
        total += more
        now = time.monotonic()
        if now - begun < SLOW_SECONDS or bar.disable:
            return
        bar.inside[this] = f"{description} {done:,}/{total:,}"
        _annotate(bar)
        # the bar's own clock is left alone, by which it tells the rate of the loop around
        if now - shown_at >= bar.mininterval and time.time() - bar.start_t >= bar.delay:
            shown_at = now
            bar.refresh()

    try:
        yield advance
    finally:
        if bar.inside.pop(this, None) is not None:
            _annotate(bar)


def _annotate(bar: Any) -> None:
    """Put the note of the loop that is shown, and how far those inside are, behind its bar."""
    bar.set_postfix_str(", ".join(filter(None, (bar.note, *bar.inside.values()))), refresh=False)


_showing = threading.Lock()
_shown: Any = None  # the bar
_is_shown_elsewhere = False  # by the process that started this one
_bars_are_shown = contextvars.ContextVar("_bars_are_shown", default=True)


class _Nowhere(io.TextIOBase):
    """A file that forgets what is written to it."""

    def write(self, text: str) -> int:
        return len(text)


def without_bars() -> contextlib.AbstractContextManager[None]:
    """While this is open, what is called in this thread shows no bars of tqdm: a sampler may have one for each call.

    They count as ever, since code may ask a bar how far it is.
    """
    _patch_tqdm()
    return _bars(are_shown=False)


@contextlib.contextmanager
def _bars(*, are_shown: bool) -> Iterator[None]:
    """While this is open, bars that begin in this thread are shown, or none of them is."""
    token = _bars_are_shown.set(are_shown)
    try:
        yield
    finally:
        _bars_are_shown.reset(token)


@functools.cache
def _patch_tqdm() -> None:
    """Have every bar look at :data:`_bars_are_shown` when it begins; tqdm has no switch that can be set so late."""
    initialize = tqdm.__init__

    @functools.wraps(initialize)
    def begin(self: Any, *args: Any, **options: Any) -> None:
        if not _bars_are_shown.get():
            options.update(file=_Nowhere(), delay=math.inf)  # the second, since a notebook's bar has no file
        initialize(self, *args, **options)

    tqdm.__init__ = begin


class _Lines(tqdm):  # type: ignore[misc]
    """The progress as plain lines, for logs."""

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:  # noqa: ARG004 - as tqdm calls it
        """What prints one state of the loop."""
        return lambda line: write_message(f"{line}\n")


def _way_to_show(after: float) -> tuple[Any, dict[str, Any]]:
    """A bar in a notebook or a terminal, elsewhere lines; and the options of it."""
    if "ipykernel" in sys.modules:
        from tqdm.auto import tqdm as bar_of_notebook

        return bar_of_notebook, {"delay": after}
    if is_terminal(sys.stderr) and not has_no_columns(sys.stderr):
        return tqdm, {"file": sys.stderr, "dynamic_ncols": True, "delay": after}
    every = after or _LINE_SECONDS
    # the file takes what tqdm writes beside its states; "miniters" has it look at the clock at each step
    return _Lines, {"file": io.StringIO(), "ncols": 0, "mininterval": every, "miniters": 1, "delay": every}
