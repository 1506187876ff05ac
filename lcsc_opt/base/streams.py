"""The only place where text leaves the process: results on standard output, everything else on standard error.

Results are what a command prints for people or programs. What the user's code and other libraries print while a command
runs is no result. Messages never stop the work: where standard error is missing, closed or full, they are lost.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from typing import TextIO

# control characters but for line breaks and tabs; surrogates, which stand for the bytes of a name that is not UTF-8;
# and what turns the direction of a text
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")

_results: TextIO | None = None  # where results go while :func:`results_apart` is open


def printable(text: str) -> str:
    """The text with control characters, surrogates and marks of direction escaped; line breaks and tabs stay.

    A file's name or the reason of a failure may hold some. A terminal would obey control characters, and no file takes
    surrogates.
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
        stream.write(printable(text))
        stream.flush()


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person reads this stream; not if it is missing or closed, or an object that can only be written to."""
    try:
        return stream is not None and stream.isatty()
    except (AttributeError, ValueError):
        return False


def has_no_columns(stream: TextIO) -> bool:
    """Whether a terminal has a width of zero, as where nobody told it its size: nothing can be drawn there."""
    try:
        return os.get_terminal_size(stream.fileno()).columns == 0
    except (AttributeError, ValueError, OSError):  # no file, or a terminal that does not say
        return False


def results_on_a_descriptor_of_their_own() -> None:
    """Standard output moves: what compiled libraries and other processes write to the usual one goes to standard error.

    No text is refused, since what an encoding lacks is escaped.
    """
    apart = os.dup(1)
    sys.stdout = os.fdopen(apart, "w", 1, sys.stdout.encoding, "backslashreplace")
    os.dup2(2, 1)
