from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lcsc_opt.base.machine import WAITING, let_waiting_threads_sleep


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*WAITING, "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_threads_sleep_unless_the_user_has_said_how_they_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    let_waiting_threads_sleep()
    assert not any(name in os.environ for name in WAITING)
    monkeypatch.delenv("OMP_WAIT_POLICY")
    let_waiting_threads_sleep()
    assert {name: os.environ[name] for name in WAITING} == WAITING


def test_the_command_line_sets_it_before_torch_is_imported() -> None:
    code = f"""
import os, sys
class Watch:
    def find_spec(self, name, *_):
        if name == "torch":
            assert os.environ["GOMP_SPINCOUNT"] == {WAITING["GOMP_SPINCOUNT"]!r}
            os._exit(7)  # what follows takes seconds
sys.meta_path.insert(0, Watch())
import lcsc_opt.cli
lcsc_opt.cli.main(["run", "digits"])
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 7
