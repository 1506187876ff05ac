"""How a command ends when its output goes nowhere, or when it is told to end: one line, and a status that says it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import Ended, finished_trials, lcsc_process, wait_until

LCSC = [sys.executable, "-c", "from lcsc_opt.cli import main; main()"]
SELF_ENDING = """
import os, signal
calls = 0

def lose(coefficients):
    global calls
    calls += 1
    if calls == 3:
        for _ in range(3):
            os.kill(os.getpid(), signal.{signal})
    return float((coefficients**2).sum())
"""
STUDY = """
name: ending
objective: {file: function.py, settings: {callable: "ending_losses:lose", steps: [100, 200, 300]}}
optimizers: [LCSC]
budget: {evaluations: 6}
"""


def heed_hangups() -> None:
    """These tests may run under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def complaints(ended: Ended) -> list[str]:
    return [line for line in ended.err.splitlines() if line.startswith("lcsc: ") or "Error" in line]


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_three_signals_end_it_once_and_the_same_command_goes_on(workplace: Path, name: str, status: int) -> None:
    Path("ending.yaml").write_text(STUDY)
    Path("ending_losses.py").write_text(SELF_ENDING.format(signal=name))
    found = lcsc_process("run", "ending.yaml", first=heed_hangups)
    assert found.status == status
    assert complaints(found) == ["lcsc: interrupted; everything finished is kept, run the same command to continue"]
    Path("ending_losses.py").write_text(SELF_ENDING.format(signal=name).replace("calls == 3", "False"))
    again = lcsc_process("run", "ending.yaml", "--accept-code")
    assert again.status == 0
    assert "after 6 evaluations" in again.err


WAITING = """
import pathlib, time
calls = 0

def lose(coefficients):
    global calls
    calls += 1
    if calls == 3:
        pathlib.Path("third").touch()
        while not pathlib.Path("go").exists():
            time.sleep(0.01)
    return float((coefficients**2).sum())
"""


TAKE_TERMINAL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(1, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGHUP, signal.{answer})
os.execv(sys.argv[1], sys.argv[1:])
"""


@contextlib.contextmanager
def interrupted_by_a_closed_terminal(answer: str) -> Iterator[subprocess.Popen[bytes]]:
    """A search whose terminal was closed in its third evaluation, which goes on when the file "go" is there."""
    Path("ending.yaml").write_text(STUDY.replace("ending_losses", "waiting_losses"))
    Path("waiting_losses.py").write_text(WAITING)
    window, terminal = os.openpty()
    command = [sys.executable, "-c", TAKE_TERMINAL.format(answer=answer), *LCSC, "run", "ending.yaml"]
    with subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True) as search:
        os.close(terminal)
        wait_until(Path("third").exists)
        os.close(window)
        yield search


def test_a_terminal_that_is_closed_ends_it_in_peace(workplace: Path) -> None:
    with interrupted_by_a_closed_terminal("SIG_DFL") as search:
        assert search.wait() == 128 + signal.SIGHUP
    assert finished_trials() == 2


def test_a_search_that_is_disowned_outlives_its_terminal(workplace: Path) -> None:
    with interrupted_by_a_closed_terminal("SIG_IGN") as search:
        Path("go").touch()
        assert search.wait() == 0
    assert finished_trials() == 6


@pytest.mark.parametrize("form", ["table", "json"])
def test_output_that_nobody_reads_is_one_line(workplace: Path, form: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [*LCSC, "list", "--catalog", "--format", form]
    found = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert found.returncode == 141
    assert found.stderr == "lcsc: the output cannot be written: Broken pipe\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_output_that_there_is_no_room_for_is_one_line(workplace: Path) -> None:
    found = lcsc_process("list", "--catalog", "--format", "json", out=Path("/dev/full"))
    assert found.status == 75
    assert found.err == "lcsc: the output cannot be written: No space left on device\n"


def ignore_sigint() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def test_sigint_that_the_parent_ignores_stays_ignored(workplace: Path) -> None:
    """As for what a shell starts in the background."""
    Path("ending.yaml").write_text(STUDY)
    Path("ending_losses.py").write_text(SELF_ENDING.format(signal="SIGINT"))
    assert lcsc_process("run", "ending.yaml", first=ignore_sigint).status == 0
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
