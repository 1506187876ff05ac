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
    lines = [line for line in ended.err.splitlines() if line.startswith("lcsc: ") or "Error" in line]
    usual = ("compare this with your trainer's log", "rehearsing what a search", "the whole run takes up to")
    return [line for line in lines if not any(words in line for words in usual)]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_three_signals_end_it_once_and_the_same_command_goes_on(workplace: Path, name: str) -> None:
    Path("ending.yaml").write_text(STUDY)
    Path("ending_losses.py").write_text(SELF_ENDING.format(signal=name))
    found = lcsc_process("run", "ending.yaml", first=heed_hangups)
    assert found.status == 130
    [said] = complaints(found)
    assert said.startswith("lcsc: interrupted; what finished is kept; run the same command to continue")
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


def on_terminal(terminal: str) -> None:
    """As a shell in that window starts and disowns it."""
    os.setsid()
    opened = os.open(terminal, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(opened, descriptor)
    fcntl.ioctl(opened, termios.TIOCSCTTY, 0)
    os.close(opened)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def test_a_disowned_search_goes_on_without_its_terminal(workplace: Path) -> None:
    """It goes on writing to that terminal."""
    Path("ending.yaml").write_text(STUDY.replace("ending_losses", "waiting_losses"))
    Path("waiting_losses.py").write_text(WAITING)
    window, terminal = os.openpty()
    running = Lcsc("run", "ending.yaml", first=functools.partial(on_terminal, os.ttyname(terminal)))
    wait_until(Path("third").exists)
    os.close(terminal)
    os.close(window)
    Path("go").touch()
    assert running.wait().status == 0
    assert finished_trials() == 6


def test_a_pipe_that_nobody_reads_gets_no_traceback(workplace: Path) -> None:
    reading, out = os.pipe()
    os.close(reading)
    found = subprocess.run([*LCSC, "--version"], stdout=out, stderr=subprocess.PIPE, text=True, check=False)
    os.close(out)
    assert (found.returncode, found.stderr) == (141, "")


def ignore_sigint() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def test_sigint_that_the_parent_ignores_stays_ignored(workplace: Path) -> None:
    """As for what a shell starts in the background."""
    Path("ending.yaml").write_text(STUDY)
    Path("ending_losses.py").write_text(SELF_ENDING.format(signal="SIGINT"))
    assert lcsc_process("run", "ending.yaml", first=ignore_sigint).status == 0
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
