"""A user's command, and what is left of it when the evaluation ends before it."""

from __future__ import annotations

import contextvars
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lcsc_opt.objective import command_process
from lcsc_opt.objective.contract import stop_flag
from tests.processes import wait_until


def with_grandchild(file: Path) -> list[str]:
    """A command with a child process that ignores SIGTERM, and whose id is in ``file``."""
    return ["sh", "-c", "(trap '' TERM; sleep 300) & echo $! >$0; wait", str(file)]


def process_in(file: Path) -> int:
    wait_until(lambda: file.exists() and file.read_text().strip())
    return int(file.read_text())


def is_alive(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()  # a zombie has ended
    except FileNotFoundError:
        return False


def test_an_interrupted_evaluation_ends_the_command_and_everything_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_process, "_GRACE_SECONDS", 1)
    monkeypatch.setattr(command_process, "_POLL_SECONDS", 0.05)
    file = tmp_path / "pid"
    stop = threading.Event()
    context = contextvars.copy_context()
    context.run(stop_flag.set, stop)
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(context.run, command_process.run_command, with_grandchild(file))
        grandchild = process_in(file)
        assert is_alive(grandchild)
        stop.set()
        assert isinstance(running.exception(timeout=60), KeyboardInterrupt)
    wait_until(lambda: not is_alive(grandchild))


GUARDED = """
import pathlib, sys
from lcsc_opt.objective import command_process

plain = command_process._wait

def wait(process):
    pathlib.Path(sys.argv[1]).touch()
    return plain(process)

command_process._GRACE_SECONDS = 1
command_process._wait = wait
command_process.run_command(sys.argv[2:])
"""


def test_a_killed_evaluation_leaves_no_command_behind(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    guarded = tmp_path / "guarded"
    with subprocess.Popen([sys.executable, "-c", GUARDED, str(guarded), *with_grandchild(file)]) as evaluation:
        grandchild = process_in(file)
        wait_until(guarded.exists)  # the command may be quicker than the start of what guards it
        evaluation.kill()
    wait_until(lambda: not is_alive(grandchild))
