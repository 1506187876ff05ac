"""The only place where text leaves the process: results on standard output, everything else on standard error.

Results are what a command prints for people or programs. What the user's code and other libraries print while a command
runs is no result. Messages never stop the work: where standard error is missing, closed or full, they are lost.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO

# control characters but for line breaks and tabs; surrogates, which stand for the bytes of a name that is not UTF-8;
# and what turns the direction of a text
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")

_results: TextIO | None = None  # where results go while :func:`results_apart` is open


def printable(text: str) -> str:
    """The text with control characters and surrogates escaped, but for line breaks and tabs.

    A file's name or the reason of a failure may hold some. A terminal would obey the first, and no file takes the
    others.
    """
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def results() -> TextIO:
    """The stream for results."""
    return _results or sys.stdout


@contextlib.contextmanager
def results_apart() -> Iterator[None]:
    """While this is open, standard output is for :func:`results` alone; what others print goes to standard error."""
    global _results
    before = _results
    _results = results()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _results = before


def write_message(text: str) -> None:
    """Write lines on what ``sys.stderr`` is at this moment. Nothing is raised where they cannot be written."""
    stream = sys.stderr
    with contextlib.suppress(AttributeError, OSError, ValueError):  # there is none, it is full, it was closed
        stream.write(_in_encoding_of(stream, printable(text)))
        stream.flush()


def _in_encoding_of(stream: TextIO, text: str) -> str:
    """The text with what the stream's encoding lacks escaped."""
    encoding = getattr(stream, "encoding", None) or "utf-8"  # some objects that replace sys.stderr have none
    return text.encode(encoding, "backslashreplace").decode(encoding)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person reads this stream; not if it is missing or closed, or an object that can only be written to."""
    try:
        return stream is not None and stream.isatty()
    except (AttributeError, ValueError):
        return False


def take_standard_streams() -> None:
    """Make the streams of a program its own, whatever it was started with. Call it once, before anything is opened.

    A missing one becomes the null device: else the next file that is opened, such as a database, would be taken for it.
    Standard output moves to another descriptor; what compiled libraries and other processes write to the usual one goes
    to standard error. No text is refused, since what an encoding lacks is escaped.
    """
    for descriptor in range(3):
        _open_if_missing(descriptor)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - the process has it to its end
    apart = os.dup(1)
    sys.stdout = _text_stream(apart, sys.stdout, _ignored_for_results(apart))
    sys.stderr = _text_stream(2, sys.stderr, _IGNORED_FOR_MESSAGES)
    os.dup2(2, 1)


_IGNORED_FOR_MESSAGES = (errno.EIO, errno.EPIPE, errno.ENOSPC, errno.EDQUOT)


def _ignored_for_results(descriptor: int) -> tuple[int, ...]:
    """That of a closed terminal, and no other: a search continues, as after ``lcsc run STUDY & disown``."""
    if os.isatty(descriptor):
        return (errno.EIO,)
    return ()


def _open_if_missing(descriptor: int) -> None:
    """Open the null device under this number if nothing is open there; child processes inherit it."""
    try:
        os.fstat(descriptor)
    except OSError:
        opened = os.open(os.devnull, os.O_RDWR)
        if opened != descriptor:
            os.dup2(opened, descriptor)
            os.close(opened)
        os.set_inheritable(descriptor, True)


class _Descriptor(io.FileIO):
    """A file descriptor; after one of the errors to ignore, what is written goes to the null device."""

    def __init__(self, descriptor: int, ignored: tuple[int, ...]) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._ignored = ignored

    def write(self, content: Any) -> int:
        try:
            return super().write(content)
        except OSError as error:
            if error.errno not in self._ignored:
                raise
            stop_writing(self)
            return super().write(content)


def _text_stream(descriptor: int, before: TextIO | None, ignored: tuple[int, ...]) -> TextIO:
    """A stream in place of the one before, which is ``None`` if the program was started without it."""
    encoding = "utf-8" if before is None else before.encoding
    raw = io.BufferedWriter(_Descriptor(descriptor, ignored))
    return io.TextIOWrapper(raw, encoding, errors="backslashreplace", line_buffering=True)


def stop_writing(stream: Any) -> None:
    """Send what is still to be written on a stream to the null device: the interpreter does it at its exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
