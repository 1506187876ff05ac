"""How a command ends when its output goes nowhere, or when it is told to end: one line, and a status that says it."""

from __future__ import annotations

import fcntl
import functools
import os
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from tests.processes import Ended, Lcsc, finished_trials, lcsc_process, wait_until

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
    if name != "SIGINT":
        return
    Path("ending_losses.py").write_text(SELF_ENDING.format(signal=name).replace("calls == 3", "False"))
    again = lcsc_process("run", "ending.yaml", "--accept-changes")
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


def take_terminal(name: str, answer: signal.Handlers) -> None:
    """The process leads a session on this terminal, and has this answer to its end."""
    os.setsid()
    terminal = os.open(name, os.O_RDWR)
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    for descriptor in (0, 1, 2):
        os.dup2(terminal, descriptor)
    os.close(terminal)
    signal.signal(signal.SIGHUP, answer)


def close_in_the_third_evaluation(window: int, terminal: int) -> None:
    os.close(terminal)
    wait_until(Path("third").exists)
    os.close(window)


@pytest.fixture
def waiting(workplace: Path) -> None:
    """A search that goes on in its third evaluation when the file "go" is there."""
    Path("ending.yaml").write_text(STUDY.replace("ending_losses", "waiting_losses"))
    Path("waiting_losses.py").write_text(WAITING)


TAKE_TERMINAL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(1, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_a_terminal_that_is_closed_ends_it_in_peace(waiting: None) -> None:
    """In an interpreter of its own, which at its end writes to that terminal what is left."""
    window, terminal = os.openpty()
    command = [sys.executable, "-c", TAKE_TERMINAL, *LCSC, "run", "ending.yaml"]
    with subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True) as search:
        close_in_the_third_evaluation(window, terminal)
        assert search.wait() == 128 + signal.SIGHUP
    assert finished_trials() == 2


def test_a_search_that_is_disowned_outlives_its_terminal(waiting: None) -> None:
    window, terminal = os.openpty()
    first = functools.partial(take_terminal, os.ttyname(terminal), signal.SIG_IGN)
    search = Lcsc("run", "ending.yaml", first=first)
    close_in_the_third_evaluation(window, terminal)
    Path("go").touch()
    assert search.wait().status == 0
    assert finished_trials() == 6


@pytest.mark.parametrize("command", ["list --catalog", "list --catalog --format=json"])
def test_output_that_nobody_reads_is_one_line(workplace: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """In an interpreter of its own, which at its end would write again what is left."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    reading, writing = os.pipe()
    os.close(reading)
    found = subprocess.run([*LCSC, *command.split()], stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert found.returncode == 141
    assert found.stderr == "lcsc: the output cannot be written: Broken pipe\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_output_that_there_is_no_room_for_is_one_line(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    with Path("/dev/full").open("w") as full:
        found = subprocess.run([*LCSC, "--help"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert found.returncode == 141
    assert found.stderr == "lcsc: the output cannot be written: No space left on device\n"


def ignore_sigint() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def test_sigint_that_the_parent_ignores_stays_ignored(workplace: Path) -> None:
    """As for what a shell starts in the background."""
    Path("ending.yaml").write_text(STUDY)
    Path("ending_losses.py").write_text(SELF_ENDING.format(signal="SIGINT"))
    assert lcsc_process("run", "ending.yaml", first=ignore_sigint).status == 0
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
