from __future__ import annotations

import fcntl
import functools
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from typing import NoReturn

import pytest
from tqdm import trange

import lcsc_opt
from lcsc_opt.base import progress as module
from lcsc_opt.base.progress import (
    each_notice_once,
    messages_on_stderr,
    notice,
    progress,
    progress_inside,
    said_if_slow,
    without_bars,
)
from lcsc_opt.experiment import running
from tests.commands import become_a_terminal
from tests.processes import Lcsc


def test_a_log_gets_lines_with_rate_and_note(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("search", 40, done=10) as advance:
        advance(10)
    assert capsys.readouterr().err == "", "of a short loop"
    with progress("search", 40, done=10, after=1e-9) as advance:
        advance(10, note="best 1.25")
        advance(0)
    first, _ = capsys.readouterr().err.splitlines()
    assert re.match(r"search:  50% 20/40 \[.*, best 1.25\]$", first)


def test_an_error_inside_comes_out_of_a_log_and_of_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt), progress("search", 3):
        raise KeyboardInterrupt
    terminal = become_a_terminal(monkeypatch)
    with pytest.raises(KeyboardInterrupt), progress("search", 3):
        raise KeyboardInterrupt
    assert terminal.getvalue().endswith("\n"), "what follows begins a line of its own"


def test_a_terminal_gets_a_bar_with_count_rate_and_note(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = become_a_terminal(monkeypatch)
    with progress("search", 8, done=3) as advance:
        advance(2, note="best 1.25")
        notice("something else")
        advance()
    lines = terminal.getvalue().replace("\r", "\n").splitlines()
    assert "lcsc: something else" in lines
    assert re.search(r"^search: .* 6/8 .*best 1.25", lines[-1])


def test_steps_that_were_not_foreseen_come_to_the_total(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = become_a_terminal(monkeypatch)
    with progress("rehearsal", 2) as advance:
        advance(more=3)
    assert " 1/5 " in terminal.getvalue().replace("\r", "\n").splitlines()[-1]


HOSTILE = "bad \x1b]0;another title\x07 \x1b[2J \x9b2J \u202egnp.exe \r"
HARMLESS = r"bad \x1b]0;another title\x07 \x1b[2J \x9b2J \u202egnp.exe \r"


def test_control_characters_are_shown_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    with messages_on_stderr():
        notice(HOSTILE)
    assert capsys.readouterr().err == f"lcsc: {HARMLESS}\n"


def test_a_notice_is_said_once_while_a_command_lasts(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        with each_notice_once(), each_notice_once():
            for _ in range(2):
                notice("packing")
                notice("trying again", every_time=True)
    notice("packing")
    said = capsys.readouterr().err.splitlines()
    assert said == 2 * ["lcsc: packing", "lcsc: trying again", "lcsc: trying again"] + ["lcsc: packing"]


# in applications, each in a process of its own, which imports the library after what it does itself


def as_an_application(begin: str, meanwhile: str = "") -> NoReturn:
    """It sets up its logging, and runs a study that does something and says something."""
    exec(begin, {"logging": logging})
    notice("before")

    def run_studies(*_: object, **__: object) -> None:
        exec(meanwhile, {"logging": logging})
        notice("a notice")

    running.run_studies = run_studies  # type: ignore[assignment]
    lcsc_opt.run(
        {
            "name": "script",
            "objective": {"file": "function.py", "settings": {"callable": "os:getpid", "steps": [1, 2]}},
            "optimizers": ["LCSC"],
            "budget": {"evaluations": 1},
        }
    )
    notice("after")
    assert [type(handler).__name__ for handler in module.log.handlers] == ["NullHandler"]
    sys.exit()


CONFIGURED = "logging.basicConfig(format='%(name)s %(levelname)s %(message)s', level={})"
PRINTED = {
    "": ["lcsc: a notice"],
    "logging.getLogger('lcsc_opt').setLevel(logging.WARNING)": [],
    CONFIGURED.format("'WARNING'"): [],
    CONFIGURED.format("'INFO'"): [f"lcsc_opt INFO {text}" for text in ("before", "a notice", "after")],
}


@pytest.mark.parametrize("configure", PRINTED)
def test_an_application_decides_where_messages_go(workplace: Path, configure: str) -> None:
    ended = Lcsc(first=functools.partial(as_an_application, configure)).wait()
    assert (ended.status, ended.err.splitlines()) == (0, PRINTED[configure])


MEANWHILE = ["logging.warning('random weights')", "logging.basicConfig(level='INFO')"]


@pytest.mark.parametrize("meanwhile", MEANWHILE)
def test_a_handler_that_the_root_logger_gets_meanwhile_prints_no_line_again(workplace: Path, meanwhile: str) -> None:
    ended = Lcsc(first=functools.partial(as_an_application, "", meanwhile)).wait()
    assert [line for line in ended.err.splitlines() if "a notice" in line] == ["lcsc: a notice"]


def test_the_command_line_says_each_line_once_whatever_the_users_code_logs(workplace: Path) -> None:
    (workplace / "logs.py").write_text(f"import logging\n{MEANWHILE[1]}\ndef loss(a): return float(a[0] ** 2)\n")
    study = "name: a\nobjective: {file: function.py, settings: {callable: 'logs:loss', steps: [1, 2]}}\n"
    (workplace / "a.yaml").write_text(f"{study}optimizers: [LCSC]\nbudget: {{evaluations: 2}}\n")
    ended = Lcsc("run", "a.yaml").wait()
    assert ended.status == 0
    assert "INFO:lcsc_opt" not in ended.err
    assert ended.err.count("rehearsing what a search") == 1


def test_silenced_messages_take_the_bar_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = become_a_terminal(monkeypatch)
    with messages_on_stderr():
        module.log.setLevel(logging.ERROR)
        with progress("search", 1) as advance:
            notice("something")
        advance()
    assert terminal.getvalue() == ""


def test_the_notices_of_a_worker_are_handed_to_the_process_that_started_it() -> None:
    code = """
from lcsc_opt.base.progress import hand_notices_to, notice
notices = []
hand_notices_to(notices.append)
notice("for the parent")
assert notices == ["for the parent"], notices
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("is_said", [True, False])
def test_what_takes_long_is_said_while_it_does(
    request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture, is_said: bool
) -> None:
    if is_said:
        request.getfixturevalue("anything_is_slow")
    caplog.set_level(logging.INFO, logger="lcsc_opt")
    with said_if_slow("loading"):
        deadline = time.monotonic() + 30
        while is_said and not caplog.messages and time.monotonic() < deadline:
            time.sleep(0.01)
    assert caplog.messages == ["loading"] * is_said


@pytest.mark.usefixtures("anything_is_slow")
def test_what_takes_longer_says_that_it_goes_on_while_nothing_else_does(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "STILL_SECONDS", 0.05)
    caplog.set_level(logging.INFO, logger="lcsc_opt")
    with said_if_slow("loading"), said_if_slow("importing"):
        deadline = time.monotonic() + 30
        while len(caplog.messages) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
    later = [line for line in caplog.messages if line not in ("loading", "importing")]
    assert len(later) == len(caplog.messages) - 2 >= 3
    assert all(re.fullmatch(r"(loading|importing): \d+ s so far", line) for line in later)
    deadline = time.monotonic() + 30
    while (talking := [thread for thread in threading.enumerate() if thread.name == "lcsc-slow"]) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.01)
    assert not talking, "nothing is said later"


def test_bars_of_a_users_code_are_left_out_and_ours_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    def sample(description: str) -> None:
        for _ in trange(3, desc=description, disable=False):
            pass

    with without_bars():
        sample("steps of a sampler")
        with trange(3, desc="steps that are asked for") as bar:
            while bar.n < bar.total:
                bar.update()
                bar.set_description("steps again")
        with progress("features", 2, after=1e-9) as advance:
            sample("steps inside ours")
            advance(2)
    assert set(re.findall("steps[a-z ]*|features", capsys.readouterr().err)) == {"features"}
    sample("steps of a script")
    assert "steps of a script: 100%" in capsys.readouterr().err


@pytest.mark.usefixtures("anything_is_slow")
def test_a_loop_inside_of_another_stands_behind_its_bar_while_it_lasts(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("report", 3, after=1e-9) as advance:
        advance(note="loss 1.25")
        with progress("images", 2000) as sampled:
            sampled(900)
            with progress("features", 10) as computed:
                computed(4, more=2)
            advance(0, note="loss 1.5")
            sampled(1100)
        advance()
        with progress("images", 2000):
            pass
    notes = re.findall(r"loss 1\.2?5.*(?=\])", capsys.readouterr().err)
    before = ["loss 1.25", "loss 1.25, images 900/2,000", "loss 1.25, images 900/2,000, features 4/12"]
    assert list(dict.fromkeys(notes)) == [*before, "loss 1.5, images 2,000/2,000", "loss 1.5"]


@pytest.mark.usefixtures("anything_is_slow")
def test_a_loop_that_an_error_left_open_does_not_stand_behind_later_bars(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("first", 1, after=1e-9):
        left_open = progress_inside("images", 10)  # as where a notebook keeps the traceback
        left_open.__enter__()(3)
    assert "images 3/10" in capsys.readouterr().err
    with progress("second", 1, after=1e-9) as advance:
        advance(note="1.25")
    said = capsys.readouterr().err
    assert "1.25" in said
    assert "images" not in said


@pytest.mark.usefixtures("anything_is_slow")
def test_a_loop_inside_leaves_the_rate_of_the_one_around_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = become_a_terminal(monkeypatch)
    with progress("search", 3) as advance:
        for _ in range(3):
            with progress("images", 4) as sampled:
                for _ in range(4):
                    time.sleep(0.06)
                    sampled()
            time.sleep(0.12)
            advance()
    rates = re.findall(r"([\d.]+)it/s", terminal.getvalue())
    assert all(float(rate) < 5 for rate in rates)


def test_a_terminal_without_a_size_gets_lines_and_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, terminal = pty.openpty()
    with os.fdopen(ours, "rb") as shown_there, os.fdopen(terminal, "w") as stderr:
        os.set_blocking(ours, False)
        monkeypatch.setattr(sys, "stderr", stderr)
        for columns, is_bar in ((80, True), (0, False)):
            fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
            with progress("searching", 2, after=1e-9) as advance:
                advance()
                advance()
            shown = shown_there.read()
            assert b"searching: 100%" in shown
            assert (b"\r" in shown.replace(b"\r\n", b"\n")) == is_bar
