"""Messages, through ``logging``, and one progress bar for all long loops, both on stderr.

The logger is ``lcsc_opt``. As for any library, an application decides where its messages go, and silences them with
``logging.getLogger("lcsc_opt").setLevel(...)``. The command line prints them, and so does :func:`lcsc_opt.run` unless
the application has configured logging.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from lcsc_opt.base.streams import is_terminal, printable, write_message

SLOW_SECONDS = 1.0  # without a line, of which a user wonders
_LINE_SECONDS = 10.0  # how often a log that is not a terminal gets a line

log = logging.getLogger("lcsc_opt")
log.addHandler(logging.NullHandler())


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
    log.info("%s", message)


@contextlib.contextmanager
def said_if_slow(message: str) -> Iterator[None]:
    """Log a line while this is open, unless that is shorter than a second."""
    timer = threading.Timer(SLOW_SECONDS, notice, [message])
    timer.daemon = True  # a process that ends waits for no message
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


_logged: set[str] | None = None  # the notices inside of each_notice_once, of all threads


@contextlib.contextmanager
def each_notice_once() -> Iterator[None]:
    """While this is open, the same notice is logged once: a command may load an objective for several studies."""
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
def messages_on_stderr(level: int = logging.INFO) -> Iterator[None]:
    """While this is open, messages of this level and above are printed on stderr as ``lcsc: MESSAGE``."""
    handler = _TerminalHandler()
    handler.setFormatter(logging.Formatter("lcsc: %(message)s"))
    level_before = log.level
    is_printed_already = any(isinstance(attached, _TerminalHandler) for attached in log.handlers)
    if not is_printed_already:
        log.addHandler(handler)
    log.setLevel(level)
    try:
        yield
    finally:
        log.setLevel(level_before)
        log.removeHandler(handler)


@contextlib.contextmanager
def messages_by_default() -> Iterator[None]:
    """While this is open, messages are printed on stderr, unless the application has configured logging."""
    if _is_configured():
        yield
    else:
        with messages_on_stderr():
            yield


def _is_configured() -> bool:
    """Whether the application has set the level of our logger, or a handler that receives our messages."""
    handlers = list(log.handlers)
    if log.propagate:
        handlers += logging.getLogger().handlers
    return log.level != logging.NOTSET or any(not isinstance(handler, logging.NullHandler) for handler in handlers)


class _Listener(logging.Handler):
    """Hands messages to a function."""

    def __init__(self, listener: Callable[[str], None]) -> None:
        super().__init__()
        self._listener = listener

    def emit(self, record: logging.LogRecord) -> None:
        self._listener(record.getMessage())


def hand_notices_to(listener: Callable[[str], None]) -> None:
    """Hand this process's notices to ``listener`` from now on, for the process that started this one."""
    for handler in list(log.handlers):
        log.removeHandler(handler)
    log.addHandler(_Listener(listener))
    log.setLevel(logging.INFO)
    log.propagate = False


@contextlib.contextmanager
def progress(description: str, total: int, *, done: int = 0, after: float = 0.0) -> Iterator[Callable[..., None]]:
    """Show how far a loop of ``total`` steps has come; an earlier process did ``done`` of them.

    It yields ``advance(steps=1, *, note=None)``, which counts more steps as done; a note replaces the text after the
    bar. On a terminal this is a bar, elsewhere (CI, SLURM) a line about every ten seconds. While one loop is shown,
    loops that begin inside it or in other threads show nothing. Nothing is shown where notices are silenced, and of a
    loop that ends within ``after`` seconds.
    """
    is_silenced = log.level > logging.INFO
    if is_silenced or not _showing.acquire(blocking=False):
        yield lambda *_, **__: None
        return
    try:
        bar_class = _bar_class()
        if bar_class is not None:
            with _bar(bar_class, description, total, done, after) as advance:
                yield advance
        else:
            yield _Lines(description, total, done, after)
    finally:
        _showing.release()


_showing = threading.Lock()


def _bar_class() -> Any:
    """The bar of a notebook or of a terminal; ``None`` where lines are printed."""
    if "ipykernel" in sys.modules and "IPython" in sys.modules:
        shell = sys.modules["IPython"].get_ipython()
        is_notebook = shell is not None and hasattr(shell, "kernel")
        if is_notebook and importlib.util.find_spec("ipywidgets") is not None:
            from tqdm.notebook import tqdm as notebook_tqdm

            return notebook_tqdm
        if is_notebook:
            return tqdm  # as text
    if is_terminal(sys.stderr):
        return tqdm
    return None


@contextlib.contextmanager
def _bar(bar_class: Any, description: str, total: int, done: int, after: float) -> Iterator[Callable[..., None]]:
    options: dict[str, Any] = {"file": sys.stderr, "dynamic_ncols": True, "delay": after}
    with bar_class(total=total, initial=done, desc=description, **options) as bar:

        def advance(steps: int = 1, *, note: str | None = None) -> None:
            if note is not None:
                bar.set_postfix_str(note, refresh=False)
            bar.update(steps)

        yield advance


class _Lines:
    """The progress as plain lines, for logs."""

    def __init__(self, description: str, total: int, done: int, after: float) -> None:
        self._description = description
        self._after = after
        self._total = total
        self._done_before = done
        self._done = done
        self._start = time.monotonic()
        self._printed_at = self._start
        self._note = ""
        self._printed_note = ""

    def __call__(self, steps: int = 1, *, note: str | None = None) -> None:
        self._done += steps
        if note is not None:
            self._note = note
        if steps == 0 and self._note == self._printed_note:  # no news
            return
        now = time.monotonic()
        is_end = self._done == self._total and now - self._start >= self._after
        if now - self._printed_at >= _LINE_SECONDS or is_end:
            self._printed_at = now
            self._printed_note = self._note
            line = tqdm.format_meter(
                self._done,
                self._total,
                now - self._start,
                ncols=0,
                prefix=self._description,
                postfix=self._note or None,
                initial=self._done_before,
            )
            write_message(f"{line}\n")
