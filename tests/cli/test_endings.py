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


ON_TERMINALS = """
import fcntl, gc, os, signal, sys, termios
import nevergrad, torch, lcsc_opt.search.studies
from lcsc_opt.cli import main
gc.freeze()
children = []
for folder, terminal, answer in zip(*[iter(sys.argv[1:])] * 3):
    children.append(os.fork())
    if children[-1] == 0:
        break
else:
    print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
    sys.exit()
os.setsid()
for descriptor in range(3):
    os.dup2(int(terminal), descriptor)
fcntl.ioctl(1, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGHUP, int(answer))
os.chdir(folder)
main(["run", "ending.yaml"])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_terminal_that_is_closed_ends_a_search_in_peace_unless_it_is_disowned(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In forks of an interpreter of its own, which at their end write to that terminal what is left."""
    command, windows, terminals = [sys.executable, "-W", "ignore", "-c", ON_TERMINALS], {}, list[int]()
    for answer in (signal.SIG_DFL, signal.SIG_IGN):
        (folder := workplace / answer.name).mkdir()
        (folder / "ending.yaml").write_text(STUDY.replace("ending_losses", "waiting_losses"))
        (folder / "waiting_losses.py").write_text(WAITING)
        windows[folder], terminal = os.openpty()
        terminals.append(terminal)
        command += [str(folder), str(terminal), str(int(answer))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, pass_fds=terminals) as both:
        for folder, window in windows.items():
            wait_until((folder / "third").exists)
            os.close(window)
        (folder / "go").touch()  # of the disowned one
        ended = both.communicate()[0].split()
    for terminal in terminals:
        os.close(terminal)
    assert ended == [str(128 + signal.SIGHUP), "0"]
    for folder, trials in zip(windows, (2, 6), strict=True):
        monkeypatch.chdir(folder)
        assert finished_trials() == trials


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("list --catalog", ""),
        ("list --catalog --format=json", ""),
        ("--help", "No space left on device"),
    ],
)
def test_output_that_cannot_be_written_is_one_line_or_none_for_a_pipe(
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
    said = f"lcsc: the output cannot be written: {reason}\n" if reason else ""
    assert (found.returncode, found.stderr) == (141, said)


def ignore_sigint() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def test_sigint_that_the_parent_ignores_stays_ignored(workplace: Path) -> None:
    """As for what a shell starts in the background."""
    Path("ending.yaml").write_text(STUDY)
    Path("ending_losses.py").write_text(SELF_ENDING.format(signal="SIGINT"))
    assert lcsc_process("run", "ending.yaml", first=ignore_sigint).status == 0
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
