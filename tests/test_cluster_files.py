"""What docs/cluster.md offers for SLURM, ssh and Kubernetes: options that exist, and how a job ends."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.database_servers import free_port
from tests.processes import wait_until

DOCS = Path(__file__).parents[1] / "docs"
JOB, HOSTS, RAYJOB = DOCS / "cluster.sbatch", DOCS / "cluster.sh", DOCS / "cluster.rayjob.yaml"
SCONTROL = """
case "$*" in
    "show hostnames"*) echo here ;;
    *"show node"*) echo "NodeName=here NodeAddr=127.0.0.1 Port=1" ;;
    *) echo "$*" >> scontrol.txt ;;
esac
"""
SRUN = 'while [[ $1 == -* ]]; do shift; done; exec "$@"'
LISTENS = "import socket, sys, time; s = socket.create_server(('127.0.0.1', int(sys.argv[1]))); time.sleep(600)"
RAY = f'echo "$*" >> ray.txt; exec {shlex.quote(sys.executable)} -c "{LISTENS}" "$RAY_PORT"'
SLEEP = f"exec {shutil.which('sleep')} 0.05"  # the job looks whether the head is up each second
LCSC = 'trap "touch told; exit $TOLD" TERM; echo "$*" > lcsc.txt; while [ ! -e end ]; do sleep 0.05; done; exit 3'


def options(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))


class Job:
    """The script with stand-ins for SLURM, Ray and lcsc, at the moment when the search runs."""

    def __init__(self, folder: Path, *, told: int) -> None:
        self._folder = folder
        for name, body in {"scontrol": SCONTROL, "srun": SRUN, "ray": RAY, "sleep": SLEEP, "lcsc": LCSC}.items():
            (folder / name).write_text(f"#!/bin/bash\n{body}\n")
            (folder / name).chmod(0o755)
        slurm = {"JOB_ID": "7", "JOB_NODELIST": "here", "JOB_NUM_NODES": "1", "CPUS_ON_NODE": "2", "GPUS_ON_NODE": "4"}
        environment = {f"SLURM_{name}": value for name, value in slurm.items()}
        environment |= {"RAY_PORT": str(free_port()), "RAY_SECONDS": "0", "TOLD": str(told)}
        environment |= {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
        command = ["bash", str(JOB), "study.yaml"]
        self.process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **environment}, start_new_session=True, text=True
        )
        wait_until(lambda: self.text("lcsc.txt") or self.process.poll() is not None)

    def text(self, name: str) -> str:
        """Of a file that a stand-in wrote."""
        path = self._folder / name
        return path.read_text() if path.exists() else ""

    def signal(self, number: signal.Signals) -> tuple[int, str]:
        """The script's exit status after it, and what was asked of SLURM."""
        self.process.send_signal(number)
        status = self.process.wait(300)
        assert (self._folder / "told").exists(), "the search was not asked to end"
        return status, self.text("scontrol.txt").strip()


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Any]:
    made: list[Job] = []
    yield lambda told=143: (made.append(Job(tmp_path, told=told)), made[-1])[1]
    for job in made:
        os.killpg(job.process.pid, signal.SIGKILL)
        job.process.wait()


@pytest.mark.parametrize(
    ("number", "told", "asked"),
    [(signal.SIGUSR1, 143, "requeue 7"), (signal.SIGUSR1, 0, ""), (signal.SIGTERM, 143, "")],
    ids=["its time is over", "it has just finished", "it is cancelled"],
)
def test_a_job_goes_back_into_the_queue_before_its_time_is_over(
    jobs: Any, number: signal.Signals, told: int, asked: str
) -> None:
    assert jobs(told).signal(number) == (told, asked)


def test_the_job_ends_with_the_status_of_the_search(jobs: Any, tmp_path: Path) -> None:
    job = jobs()
    (tmp_path / "end").touch()
    assert job.process.wait(300) == 3
    port = job.text("lcsc.txt").split(":")[-1].split()[0]
    assert job.text("lcsc.txt") == f"run study.yaml --ray 127.0.0.1:{port}\n"
    (start,) = job.text("ray.txt").splitlines()
    assert start.split() == [
        *("start", "--num-cpus=2", "--num-gpus=4", "--block"),
        *("--head", f"--port={port}", "--include-dashboard=false"),
    ]
