from __future__ import annotations

import io
import re

import pytest

from lcsc_opt.base import progress as module
from lcsc_opt.base.progress import notice, progress, said_once


class Clock:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def become_a_terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Called by a test itself, since pytest puts its own stderr back after the fixtures."""
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setattr("sys.stderr", stream)
    return stream


def test_a_log_gets_a_line_every_ten_seconds_with_rate_and_time_left(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress("search", 40) as advance:
        for _ in range(30):
            clock.now += 0.5
            advance()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "search: 20/40, 2.0/s, 10 s left\n"


def test_the_end_is_always_said(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("search", 3) as advance:
        for _ in range(3):
            clock.now += 0.1
            advance(note="best 1.5")
    assert capsys.readouterr().err == "search: 3/3, 10.0/s, 0 s left, best 1.5\n"


def test_what_an_earlier_process_did_counts_as_done_and_not_as_speed(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress("search", 100, done=80) as advance:
        clock.now += 20
        advance(10)
    assert capsys.readouterr().err == "search: 90/100, 2.0 s each, 20 s left\n"


def test_a_note_stays_until_the_next_one(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("search", 9) as advance:
        for note in ("best 2", None, "best 1", None):
            clock.now += 10
            advance(note=note)
    notes = [line.split(", ")[-1] for line in capsys.readouterr().err.splitlines()]
    assert notes == ["best 2", "best 2", "best 1", "best 1"]


def test_while_nothing_is_done_only_a_new_note_is_worth_a_line(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress("search", 9) as advance:
        advance(0, note="2 of 2 workers")  # too early for a line
        for note in ("2 of 2 workers", "2 of 2 workers", None, "0 of 2 workers", "0 of 2 workers"):
            clock.now += 10
            advance(0, note=note)
    assert capsys.readouterr().err == "search: 0/9, 2 of 2 workers\nsearch: 0/9, 0 of 2 workers\n"


def test_an_error_inside_comes_out_of_a_log_and_of_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt), progress("search", 3):
        raise KeyboardInterrupt
    terminal = become_a_terminal(monkeypatch)
    with pytest.raises(KeyboardInterrupt), progress("search", 3):
        raise KeyboardInterrupt
    assert terminal.getvalue().endswith("\x1b[?25h"), "the cursor is shown again"


def test_a_terminal_gets_a_bar_with_count_rate_and_note(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = become_a_terminal(monkeypatch)
    with progress("search", 8, done=3) as advance:
        advance(2, note="best 1.25")
        advance()
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue()).replace("\r", "\n").splitlines()
    last = [line for line in shown if "search" in line][-1]
    assert "6/8" in last
    assert "best 1.25" in last
    assert re.search(r"\d\.\d/s|s each|-/s", last)
    assert "left" in last


def test_a_narrow_terminal_shows_the_numbers_whole_and_cuts_the_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = become_a_terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", "60")
    with progress("digits_ddpm/LCSCGradient/0", 2_000_000, done=300_000) as advance:
        advance(100_000, note="best 23.4567 in trial 1234, 12 failed")
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue()).replace("\r", "\n").splitlines()
    (last, *_) = [line for line in reversed(shown) if "left" in line]
    assert " 400000/2000000 " in last
    assert re.search(r"\d:\d\d:\d\d left [\d-]+:[\d-]+", last)
    assert len(last.rstrip()) <= 60


def test_a_notice_is_said_once_while_a_command_lasts(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        with said_once(), said_once():
            for _ in range(2):
                notice("packing")
                notice("trying again", every_time=True)
    notice("packing")
    said = capsys.readouterr().err.splitlines()
    assert said == 2 * ["lcsc: packing", "lcsc: trying again", "lcsc: trying again"] + ["lcsc: packing"]


@pytest.mark.parametrize(("speed", "text"), [(0, "0.0/s"), (12.34, "12.3/s"), (1, "1.0/s"), (0.25, "4.0 s each")])
def test_a_slow_rate_is_told_as_seconds(speed: float, text: str) -> None:
    assert module._rate(speed) == text
