"""Text on streams that are missing, closed, full, or cannot encode it."""

from __future__ import annotations

import errno
import io
import os
import sys

import pytest

from lcsc_opt.base.progress import messages_on_stderr, notice, progress
from lcsc_opt.base.streams import is_terminal, printable, write_message


@pytest.mark.parametrize(
    "text", ["two\nlines\tand a tab", "naïve Σ|a| → 日本語", "\U0001f468\u200d\U0001f469", r"C:\x1b"]
)
def test_texts_of_all_languages_are_left_alone(text: str) -> None:
    assert printable(text) == text


class _Refusing(io.StringIO):
    """A stream on which nothing can be written."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._number = number

    def write(self, text: str) -> int:
        raise OSError(self._number, os.strerror(self._number))


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize(
    "stream",
    [
        pytest.param(None, id="missing"),
        pytest.param(closed(), id="closed"),
        pytest.param(_Refusing(errno.EPIPE), id="pipe"),
        pytest.param(_Refusing(errno.ENOSPC), id="full"),
    ],
)
def test_messages_and_progress_never_stop_the_work(stream: io.StringIO | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a script that a daemon has started."""
    monkeypatch.setattr(sys, "stderr", stream)
    assert not is_terminal(stream)
    with messages_on_stderr(), progress("search", 2) as advance:
        notice("a message")
        advance(2)
    write_message("another one\n")
