"""Workers that are killed while they evaluate, here and on a Ray cluster, and workers whose coordinator is killed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from stress_search import STEPS, Child, Clean, Found, NewDatabase, Work, digest, rows, search

from lcsc_opt.evaluation.pool import ProcessEvaluator, WorkerPool
from lcsc_opt.objective.contract import CoefficientFunction, Objective

WORKERS = 4
DEADLY = 16  # about one candidate of so many kills its worker, at its first attempt


def objective(folder: Path, work: Work, deadly: bool) -> Objective:
    """Notes in the folder which processes evaluate, and which candidates killed theirs."""

    def loss(coefficients: np.ndarray) -> float:
        (folder / f"{os.getpid()}.process").touch()
        note = folder / f"{digest(coefficients)}.killed"
        if deadly and int(note.stem, 16) % DEADLY == 0 and not note.exists():
            note.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return work.loss(coefficients)

    return CoefficientFunction(loss, STEPS, name="stress:loss")


def search_with_workers(url: str, work: Work, folder: Path, *, deadly: bool = False) -> None:
    """Search with real worker processes."""
    with contextlib.closing(WorkerPool(functools.partial(objective, folder, work, deadly), work.workers)) as pool:
        search(url, work, ProcessEvaluator(pool))


def workers_killed(new: NewDatabase, clean: Clean, folder: Path, *, evaluations: int) -> Found:
    """Worker processes are killed while they evaluate: each costs one attempt of its candidate, and nothing else."""
    work, url = Work("CMA", workers=WORKERS, evaluations=evaluations, pause=0.02), new()
    notes = Path(tempfile.mkdtemp(dir=folder))
    expected = clean.rows(dataclasses.replace(work, pause=0))
    Child(functools.partial(search_with_workers, url, work, notes, deadly=True)).value()
    found = rows(url, work.name)
    killed = {note.stem for note in notes.glob("*.killed")}
    problems = [] if [row[:4] for row in found] == [row[:4] for row in expected] else ["trials differ"]
    for row in found:
        died = digest(np.frombuffer(row[1])) in killed
        if len(row[5]) != died or not all("worker process died" in reason for reason in row[5]):
            problems.append(f"attempts of trial {row[0]}: {row[5]}")
    processes = len(list(notes.glob("*.process")))
    problems += [f"{processes} processes"] * (processes > WORKERS + len(killed)) + ["none was killed"] * (not killed)
    return Found(f"{len(killed)} of {processes} processes killed, of {WORKERS} at once", problems)


def coordinator_of_workers_killed(new: NewDatabase, clean: Clean, folder: Path) -> Found:
    """The coordinator is killed while its worker processes evaluate: they end, and the search is continued."""
    work, url, notes = Work("CMA", workers=WORKERS, pause=0.3), new(), Path(tempfile.mkdtemp(dir=folder))
    expected = clean.rows(dataclasses.replace(work, pause=0))
    child = Child(functools.partial(search_with_workers, url, work, notes))
    while len(workers := list(notes.glob("*.process"))) < WORKERS and not child.wait(0.05):
        pass
    child.kill()
    start = time.monotonic()
    while (left := [note.stem for note in workers if _is_alive(note.stem)]) and time.monotonic() < start + 10:
        time.sleep(0.02)
    seconds = time.monotonic() - start
    Child(functools.partial(search_with_workers, url, work, notes)).value()
    same = [row[:4] for row in rows(url, work.name)] == [row[:4] for row in expected]
    problems = [f"{len(left)} left after 10 s"] * bool(left) + ["trials differ"] * (not same)
    return Found(f"{len(workers)} workers gone after {seconds:.1f} s", problems)


def ray_node_killed(folder: Path) -> Found:
    """A worker on a Ray cluster is killed, then a node, and another one joins: trials are those of local workers."""
    from tests.evaluation.ray_clusters import OBJECTIVE, add_node, processes, small_cluster, study_file, trials
    from tests.processes import Lcsc, lcsc_process

    place, two = Path(tempfile.mkdtemp(dir=folder)), {"num_cpus": 1, "node_name": "two"}
    (place / "stages_on_ray.py").write_text(OBJECTIVE)
    log, go, urls = place / "log", place / "go", [f"sqlite:///{place}/{name}.db" for name in ("local", "ray")]
    settings = {"log": str(log), "dies": [4], "waits": 7, "go": str(go)}
    shared: dict[str, Any] = {"optimizers": ["LCSCGradient"], "failures": {"retries": 10}, "storage": urls[0]}
    statuses = [lcsc_process("run", study_file(place, workers=2, **shared)).status]
    shared |= {"objective": {"file": "stages_on_ray.py", "settings": settings}, "storage": urls[1]}
    with small_cluster(num_cpus=1, node_name="one") as cluster:
        node: Any = add_node(cluster, **two)
        file = study_file(place, workers={"ray": 2, "address": cluster.address}, **shared)
        running = Lcsc("run", file)  # no fork of this process, which asks the cluster
        while len(processes(log)) < 7 and running.process.exitcode is None:
            time.sleep(0.05)
        cluster.remove_node(node, allow_graceful=False)
        add_node(cluster, **two)
        go.touch()
        statuses.append(running.wait().status)
    local, remote = (trials(url, "e/LCSCGradient/0") for url in urls)
    problems = [f"ended with {statuses}"] * any(statuses) + ["trials differ"] * (local != remote)
    return Found(f"{len(set(processes(log)))} processes on three nodes", problems)


def _is_alive(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
