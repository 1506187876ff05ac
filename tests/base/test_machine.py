from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="it lists the threads of a process")
def test_where_others_use_the_cores_a_second_team_of_threads_waits_until_the_end() -> None:
    code = """
import os, time, torch
from lcsc_opt.base import machine
machine.cores = os.cpu_count = lambda: 2
torch.ones(2**20).add_(1)
alone = len(os.listdir("/proc/self/task"))
for load, said in (2.0, ""), (0.1, ""), (2.0, "active"):
    os.getloadavg = lambda: (load, 0.0, 0.0)
    os.environ.pop("OMP_WAIT_POLICY", None)
    if said:
        os.environ["OMP_WAIT_POLICY"] = said
    with machine.short_waits():
        print(len(os.listdir("/proc/self/task")) - alone)
    while len(os.listdir("/proc/self/task")) > alone:
        time.sleep(0.01)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    assert ran.stdout.split() == ["2", "0", "0"]
