"""Jobs of docs/cluster.sbatch under a real SLURM on this machine. Its three nodes are ``slurmd`` of the same machine.

    python benchmarks/slurm.py [--only WORD] [--quick]

Each job is disturbed in its own way while it evaluates. Its trials must be those of ``lcsc run`` without a cluster, and
none of its processes may be left. Each job's row goes into ``results/slurm.md`` in place of its former one.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, machine
from ray_nodes import OBJECTIVE, ROOT, study_file
from slurm_nodes import NO_SLURM, Slurm, slurm
from stress_search import Rows, rows, sqlite_url

SCRIPT = ROOT / "docs" / "cluster.sbatch"
OPTIMIZERS = ("LCSC", "CMA", "LCSCGradient")
WORKERS, EVALUATIONS = 3, 24
EARLY = 12  # a job is disturbed after so many evaluations
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
TITLES = "| a job of docs/cluster.sbatch | seen | trials |"
QUICK = ("undisturbed", "requeued")


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    seen: str
    problems: list[str]


class Job:
    """A job of the script, in a folder of its own."""

    def __init__(self, system: Slurm, folder: Path, *options: str, seconds: float = 0.5) -> None:
        folder.mkdir()
        self._system, self._folder, self._log = system, folder, folder / "evaluations"
        self._url = sqlite_url(folder, "studies")
        settings = {"seconds": seconds, "log": str(self._log)}
        study_file(folder, **_study(settings, workers={"ray": WORKERS, "gpus": 1}), storage=self._url)
        self._options = ["--nodes=3", "--gpus-per-node=2", "--cpus-per-task=2", "--time=10", *options]
        self.submit()

    def submit(self) -> None:
        """Submit the job, for the first time or again."""
        self.number = self._system.submit(*self._options, str(SCRIPT), "study.yaml", cwd=self._folder)

    def wait_for_evaluations(self, count: int = EARLY) -> None:
        """Wait until so many more evaluations have begun."""
        wanted, until = len(self._evaluations()) + count, time.monotonic() + 240
        while len(self._evaluations()) < wanted and time.monotonic() < until:
            time.sleep(0.1)

    def row(self, what: str, clean: dict[str, Rows], *, restarts: range = range(1), also: str = "") -> Row:
        """Wait for the end, and judge the job."""
        state = self._system.wait(self.number, *ENDED)
        if state not in ENDED:
            self._system.cancel(self.number)  # others need the nodes
        times, nodes = int(self._system.field(self.number, "Restarts")), self._nodes()
        problems = [f"it ended as {state}, exit {self._system.field(self.number, 'ExitCode')}"] * (state != "COMPLETED")
        problems += [f"{times} restarts"] * (times not in restarts)
        problems += [f"evaluated on {nodes}"] * (len(nodes) < 2)
        for name, expected in clean.items():
            with contextlib.suppress(Exception):
                if _trials(self._url, name) == expected:
                    continue
            problems.append(f"{name}: trials differ")
        left = len(self.processes())
        problems += [f"{left} processes are left"] * bool(left)
        if problems:
            print(self.output()[-6000:], file=sys.stderr)
        where = ", ".join(f"{name} {count}" for name, count in sorted(nodes.items()))
        return Row(what, f"{times} restarts; evaluations on nodes: {where}{also}", problems)

    def output(self) -> str:
        """The output of the job."""
        return "".join(path.read_text() for path in sorted(self._folder.glob("slurm-*.out")))

    def processes(self) -> list[int]:
        """The job's processes on all nodes."""
        found, wanted = [], {f"SLURM_JOB_ID={self.number}", f"SLURM_CONF={os.environ['SLURM_CONF']}"}
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if wanted <= set((process / "environ").read_text(errors="replace").split("\0")):
                    found.append(int(process.name))
        return found

    def gpus(self) -> set[tuple[str, str]]:
        """Node and GPU of each evaluation."""
        return {(node, gpu) for _, node, gpu in self._evaluations()}

    def _nodes(self) -> Counter[str]:
        return Counter(node for _, node, _ in self._evaluations())

    def _evaluations(self) -> list[list[str]]:
        return [line.split() for line in self._log.read_text().splitlines()] if self._log.exists() else []


def undisturbed(system: Slurm, folder: Path, clean: dict[str, Rows]) -> Row:
    """A job on three nodes with two GPUs each, without faults."""
    job = Job(system, folder)
    row = job.row("runs to its end", clean)
    gpus = job.gpus()
    wrong = not {gpu for _, gpu in gpus} <= {"0", "1"}
    return dataclasses.replace(
        row, seen=f"{row.seen}; {len(gpus)} GPUs", problems=row.problems + [f"GPUs: {gpus}"] * wrong
    )


def requeued(system: Slurm, folder: Path, clean: dict[str, Rows]) -> Row:
    """An administrator requeues the job."""
    job = Job(system, folder)
    job.wait_for_evaluations()
    system.requeue(job.number)
    return job.row("`scontrol requeue` while it evaluates", clean, restarts=range(1, 2))


def time_is_over(system: Slurm, folder: Path, clean: dict[str, Rows]) -> Row:
    """The job gets a signal before its time limit. SLURM sends it up to a minute earlier than asked for."""
    job = Job(system, folder, "--time=3", "--signal=B:USR1@75", seconds=3)
    row = job.row("the signal before the time limit, again and again", clean, restarts=range(1, 20))
    return dataclasses.replace(row, problems=row.problems + ["TIMEOUT"] * ("DUE TO TIME LIMIT" in job.output()))


def preempted(system: Slurm, folder: Path, clean: dict[str, Rows], *, partition: str = "main") -> Row:
    """A job that needs all nodes preempts this one, and runs for some seconds."""
    job = Job(system, folder, f"--partition={partition}")
    job.wait_for_evaluations()
    urgent = system.submit("--partition=urgent", "--nodes=3", "--exclusive", "--wrap=sleep 3", cwd=folder)
    system.wait(urgent, "COMPLETED")
    how = "at once" if partition == "main" else "with GraceTime"
    return job.row(f"preempted by a job that needs all nodes, {how}", clean, restarts=range(1, 2))


def preempted_with_grace(system: Slurm, folder: Path, clean: dict[str, Rows]) -> Row:
    """A preempted job gets SIGTERM first, and is ended later."""
    return preempted(system, folder, clean, partition="grace")


def cancelled(system: Slurm, folder: Path, clean: dict[str, Rows]) -> Row:
    """A cancelled job must stay cancelled until somebody submits it again."""
    job = Job(system, folder)
    job.wait_for_evaluations()
    system.cancel(job.number)
    system.wait(job.number, *ENDED)
    time.sleep(15)  # a job that wrongly came back would do so after cred_expire
    state, left = system.state(job.number), len(job.processes())
    job.submit()
    row = job.row("`scancel`, then submitted again", clean, also="; stayed cancelled")
    ended = state in ("CANCELLED", "FAILED")  # FAILED if the script exited before SLURM ended it
    problems = [f"{state} after scancel"] * (not ended) + [f"{left} processes are left"] * bool(left)
    return dataclasses.replace(row, problems=problems + row.problems)


def node_lost(system: Slurm, folder: Path, clean: dict[str, Rows], *, node: str = "n3") -> Row:
    """All processes of a node are killed. Its daemon comes back when the job has ended."""
    job = Job(system, folder, seconds=1)
    job.wait_for_evaluations()
    system.kill_node(node)
    time.sleep(20)  # until SLURM has noticed
    if node == "n1":
        system.start_node(node)
    what = "the first node, with Ray's head and the coordinator," if node == "n1" else "a node"
    row = job.row(f"{what} is lost", clean, restarts=range(1, 3) if node == "n1" else range(1))
    if node != "n1":
        system.start_node(node)
    return row


def first_node_lost(system: Slurm, folder: Path, clean: dict[str, Rows]) -> Row:
    """The node that runs the script is lost."""
    return node_lost(system, folder, clean, node="n1")


def two_jobs(system: Slurm, folder: Path, clean: dict[str, Rows]) -> Row:
    """Two jobs on the same nodes at the same time, each with half of the GPUs."""
    folder.mkdir()
    jobs = [Job(system, folder / name, "--gpus-per-node=1") for name in ("one", "other")]
    found = [job.row("two jobs at once on the same nodes", clean) for job in jobs]
    return Row(found[0].what, "; ".join(row.seen for row in found), [line for row in found for line in row.problems])


Scene = Callable[[Slurm, Path, dict[str, Rows]], Row]
SCENES: tuple[Scene, ...] = (
    undisturbed,
    requeued,
    time_is_over,
    preempted,
    preempted_with_grace,
    cancelled,
    node_lost,
    first_node_lost,
    two_jobs,
)


def main() -> None:
    """Submit, disturb, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only those whose function's name contains this")
    parser.add_argument("--quick", action="store_true", help=f"only {' and '.join(QUICK)}")
    arguments = parser.parse_args()
    scenes = [scene for scene in SCENES if arguments.only in scene.__name__]
    if arguments.quick:
        scenes = [scene for scene in scenes if scene.__name__ in QUICK]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave no daemon behind
    with tempfile.TemporaryDirectory(prefix="lcsc-jobs-") as folder:
        _environment(Path(folder))
        with slurm() as system:
            if system is None:
                print(f"skipped: {NO_SLURM}")
                return
            found = list(play(system, Path(folder), scenes))
    sys.exit(any(row.problems for row in found))


def play(system: Slurm, folder: Path, scenes: Sequence[Scene]) -> Iterator[Row]:
    """Play the scenes one after the other."""
    clean = local(folder / "local")
    for scene in scenes:
        start = time.monotonic()
        row = scene(system, folder / scene.__name__, clean)
        print(f"{time.monotonic() - start:6.1f} s  {_line(row)}", flush=True)
        keep(row)
        yield row


def keep(row: Row) -> None:
    """Write the row into the table; the other rows stay."""
    path = RESULTS / "slurm.md"
    former = path.read_text().splitlines() if path.exists() else []
    others = [line for line in former if line.startswith("| ") and not line.startswith((TITLES, f"| {row.what} |"))]
    path.write_text(_markdown([*others, _line(row)]))


def local(folder: Path) -> dict[str, Rows]:
    """Study → its trials with as many local workers."""
    url = sqlite_url(folder, "local")
    file = study_file(folder, **_study({}, workers=WORKERS), storage=url)
    subprocess.run(["lcsc", "run", str(file)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return {name: _trials(url, name) for name in (f"slurm/{optimizer}/0" for optimizer in OPTIMIZERS)}


def _trials(url: str, name: str) -> Rows:
    """The trials without their attempts, which alone may depend on deaths."""
    return [row[:5] + row[6:] for row in rows(url, name)]


def _study(settings: dict[str, Any], *, workers: Any) -> dict[str, Any]:
    return {
        "name": "slurm",
        "objective": {"file": OBJECTIVE, "settings": settings},
        "optimizers": list(OPTIMIZERS),
        "seeds": [0],
        "budget": {"evaluations": EVALUATIONS},
        "workers": workers,
        "failures": {"retries": 20},
    }


def _environment(folder: Path) -> None:
    """Set the environment, which jobs inherit as from a user's active environment."""
    own = Path(sys.executable).parent
    script = f'#!/bin/bash\nsleep $((5 * ${{SLURM_PROCID:-0}}))\nexec {own}/ray "$@"\n'
    (folder / "ray").write_text(script)  # nodes that start at once on one machine would choose the same ports
    (folder / "ray").chmod(0o755)
    programs = os.pathsep.join([str(folder), str(own), os.environ["PATH"]])
    os.environ |= {"PATH": programs, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_SECONDS": "3"}


def _line(row: Row) -> str:
    return f"| {row.what} | {row.seen} | {'; '.join(row.problems) or 'equal'} |"


def _markdown(lines: list[str]) -> str:
    version = subprocess.run(["sbatch", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    head = f"{version}, three nodes that are slurmd of one machine: {machine()}.\n\n"
    each = f"{EVALUATIONS} trials of each of {', '.join(OPTIMIZERS)}"
    text = f"{each} by {WORKERS} workers, compared with those of local ones, bit for bit.\n\n"
    return "\n".join([f"# Jobs under SLURM\n\n{head}{text}{TITLES}", "|---|---|---|", *lines, ""])


if __name__ == "__main__":
    main()
