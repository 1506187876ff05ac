"""How a command ends when its output goes nowhere, or when it is told to end: one line, and a status that says it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
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


@pytest.fixture
def waiting(workplace: Path) -> None:
    """A search that goes on in its third evaluation when the file "go" is there."""
    Path("ending.yaml").write_text(STUDY.replace("ending_losses", "waiting_losses"))
    Path("waiting_losses.py").write_text(WAITING)


TAKE_TERMINAL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(1, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGHUP, int(sys.argv[1]))
os.execv(sys.argv[2], sys.argv[2:])
"""


@pytest.mark.parametrize("answer", [signal.SIG_DFL, signal.SIG_IGN])
def test_a_terminal_that_is_closed_ends_a_search_in_peace_unless_it_is_disowned(
    waiting: None, answer: signal.Handlers
) -> None:
    """In an interpreter of its own, which at its end writes to that terminal what is left."""
    window, terminal = os.openpty()
    command = [sys.executable, "-c", TAKE_TERMINAL, str(int(answer)), *LCSC, "run", "ending.yaml"]
    with subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True) as search:
        os.close(terminal)
        wait_until(Path("third").exists)
        os.close(window)
        if answer is signal.SIG_IGN:
            Path("go").touch()
        ended = (search.wait(), finished_trials())
    assert ended == ((128 + signal.SIGHUP, 2) if answer is signal.SIG_DFL else (0, 6))


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("list --catalog", "Broken pipe"),
        ("list --catalog --format=json", "Broken pipe"),
        ("--help", "No space left on device"),
    ],
)
def test_output_that_cannot_be_written_is_one_line(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, command: str, reason: str
) -> None:
    """In an interpreter of its own, which at its end would write again what is left."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    reading, out = os.pipe()
    os.close(reading)
    if command == "--help":
        if not Path("/dev/full").exists():
            pytest.skip("this system has no /dev/full")
        out = os.open("/dev/full", os.O_WRONLY)
    found = subprocess.run([*LCSC, *command.split()], stdout=out, stderr=subprocess.PIPE, text=True, check=False)
    os.close(out)
    assert (found.returncode, found.stderr) == (141, f"lcsc: the output cannot be written: {reason}\n")


def ignore_sigint() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def test_sigint_that_the_parent_ignores_stays_ignored(workplace: Path) -> None:
    """As for what a shell starts in the background."""
    Path("ending.yaml").write_text(STUDY)
    Path("ending_losses.py").write_text(SELF_ENDING.format(signal="SIGINT"))
    assert lcsc_process("run", "ending.yaml", first=ignore_sigint).status == 0
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
