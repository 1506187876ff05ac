"""A real SLURM on this machine, for ``slurm.py``. Its nodes are several ``slurmd`` of the same machine."""

from __future__ import annotations

import contextlib
import getpass
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

NO_SLURM = "no SLURM with munge on this machine: apt-get install slurm-wlm"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "squeue")
NODES = ("n1", "n2", "n3")
SECONDS_TO_START = 30.0
NODE = "LCSC_SLURM_NODE"  # in the environment of a node's daemons

# Jobs are tracked by their processes, not by cgroups, so that this works in containers. GPUs are links to /dev/null.
CONFIGURATION = """\
ClusterName=lcsc
SlurmctldHost=localhost
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=10
KillWait=30
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/controller.log
SlurmdLogFile={folder}/%n.log
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
GresTypes=gpu
NodeName=n[1-3] NodeHostname={host} NodeAddr=127.0.0.1 Port={ports} CPUs=4 RealMemory=4000 Gres=gpu:2
PartitionName=main Nodes=ALL Default=YES PriorityTier=1
PartitionName=grace Nodes=ALL PriorityTier=1 GraceTime=15
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=off
"""


class Slurm:
    """The running system. Jobs are given by their numbers."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")

    def submit(self, *arguments: str, cwd: Path) -> int:
        """Submit a job with ``sbatch``; gives its number."""
        return int(_output("sbatch", "--parsable", *arguments, cwd=cwd))

    def state(self, job: int) -> str:
        """The state of a job: PENDING, RUNNING, COMPLETED, ...; COMPLETING while some of its processes still run."""
        return _output("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").strip()

    def field(self, job: int, name: str) -> str:
        """A field of ``scontrol show job``."""
        found = re.search(rf"\b{name}=(\S*)", _output("scontrol", "show", "job", str(job)))
        return found[1] if found else ""

    def requeue(self, job: int) -> None:
        """Requeue a job, as an administrator does."""
        _output("scontrol", "requeue", str(job))

    def cancel(self, job: int) -> None:
        """Cancel a job, as its owner does."""
        _output("scancel", str(job))

    def wait(self, job: int, *states: str, seconds: float = 900.0) -> str:
        """Wait until a job is in one of these states, or until the time is over; gives the state."""
        until = time.monotonic() + seconds
        while (state := self.state(job)) not in states and time.monotonic() < until:
            time.sleep(0.5)
        return state

    def start_node(self, name: str) -> None:
        """Start the daemon of a node."""
        daemon = [_program("slurmd"), "-N", name]
        subprocess.run(daemon, check=True, env={**os.environ, NODE: str(self._folder / name)})

    def kill_node(self, name: str) -> None:
        """Kill the daemon of a node, and all processes of jobs on it."""
        job = {f"SLURMD_NODENAME={name}", f"SLURM_CONF={self._folder}/slurm.conf"}
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                variables = set((process / "environ").read_text(errors="replace").split("\0"))
                if job <= variables or f"{NODE}={self._folder / name}" in variables:
                    os.kill(int(process.name), signal.SIGKILL)

    def start(self) -> None:
        """Start all daemons."""
        key = self._folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        paths = {name: self._folder / f"munge.{name}" for name in ("socket", "pid", "log", "seed")}
        files = [f"--{option}={paths[name]}" for option, name in MUNGE_FILES.items()]
        subprocess.run([_program("munged"), "--force", f"--key-file={key}", *files], check=True, capture_output=True)
        subprocess.run([_program("slurmctld")], check=True)
        for name in NODES:
            self.start_node(name)
        until = time.monotonic() + SECONDS_TO_START
        while (
            idle := _output("sinfo", "--noheader", "--partition=main", "--states=idle", "--format=%D").strip()
        ) != "3":
            if time.monotonic() > until:
                raise RuntimeError(f"{idle or 0} of 3 nodes are idle; logs are in {self._folder}")
            time.sleep(0.5)

    def stop(self) -> None:
        """End all jobs and all daemons."""
        with contextlib.suppress(subprocess.CalledProcessError):
            _output("scancel", "--state=PENDING", f"--user={getpass.getuser()}")
            _output("scancel", f"--user={getpass.getuser()}")
            until = time.monotonic() + 40
            while _output("squeue", "--noheader") and time.monotonic() < until:
                time.sleep(0.5)
        for name in (*NODES, "controller", "munge"):
            self._kill(name, signal.SIGTERM)
        time.sleep(2)

    def _kill(self, name: str, number: int) -> None:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            os.kill(int((self._folder / f"{name}.pid").read_text()), number)


MUNGE_FILES = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}


@contextlib.contextmanager
def slurm() -> Iterator[Slurm | None]:
    """Start SLURM in a temporary folder, and stop it at the end; ``None`` if it is not installed."""
    if not all(map(_found, PROGRAMS)):
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="lcsc-slurm-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o755)  # munge's socket must be reachable
        (folder / "state").mkdir()
        controller, *ports = itertools.islice(_free_ports(), 1 + len(NODES))
        filled = {"folder": folder, "user": getpass.getuser(), "host": socket.gethostname(), "controller": controller}
        filled["ports"] = f"[{','.join(map(str, ports))}]"
        (folder / "slurm.conf").write_text(CONFIGURATION.format(**filled))
        for gpu in range(2):
            (folder / f"gpu{gpu}").symlink_to("/dev/null")
        (folder / "gres.conf").write_text(f"NodeName=n[1-3] Name=gpu File={folder}/gpu[0-1]\n")
        running = Slurm(folder)
        try:
            running.start()
            yield running
        finally:
            running.stop()


def _found(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def _program(name: str) -> str:
    """The path of a program. If it is not installed, the bare name, which fails when it is called."""
    return _found(name) or name


def _output(program: str, *arguments: str, cwd: Path | None = None) -> str:
    done = subprocess.run([program, *arguments], check=True, capture_output=True, text=True, cwd=cwd)
    return done.stdout


def _free_ports() -> Iterator[int]:
    """Increasing free ports, below those that systems assign by themselves."""
    port = 17000
    while True:
        port += 1
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            yield port
