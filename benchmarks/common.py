"""What every benchmark needs: its arguments, the name of this machine, and the writing of results."""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import platform
import shlex
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from lcsc_opt.base.catalog import load_file
from lcsc_opt.base.paths import BuildContext
from lcsc_opt.base.reproducibility import environment
from lcsc_opt.base.study_spec import StudySpec
from lcsc_opt.database.opened import Database
from lcsc_opt.database.urls import files_directory
from lcsc_opt.experiment.experiment import Experiment
from lcsc_opt.experiment.running import run_studies
from lcsc_opt.objective.of_study import ObjectiveLoader

SAMPLE_SECONDS = 0.02  # between samples of the memory; more frequent ones would slow down what is measured
RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
COMMANDS: dict[str, str] = load_file(ROOT / "objectives" / "trained.py").COMMANDS


def parse(text: str | None, *, small: Mapping[str, Any] | None = None, **options: Any) -> argparse.Namespace:
    """The arguments of the script with the docstring ``text``.

    Args:
        text: what ``--help`` shows.
        small: the values that ``--quick`` sets; ``None`` for a script without it.
        options: name → its default, or the keywords of ``add_argument``.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, option in options.items():
        keywords = option if isinstance(option, dict) else {"type": type(option), "default": option}
        parser.add_argument(f"--{name.replace('_', '-')}", **keywords)
    if small is not None:
        values = ", ".join(["nothing written", *(f"{name} {value}" for name, value in small.items())])
        parser.add_argument("--quick", action="store_true", help=values)
    arguments = parser.parse_args()
    if small is not None and arguments.quick:
        vars(arguments).update(small)
    return arguments


def machine() -> str:
    """This machine in one line, for the head of every result."""
    packages = environment()["packages"]
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "numpy", "nevergrad", "optuna"))
    threads = os.environ.get("OMP_NUM_THREADS", "default")
    python = platform.python_version()
    return f"{_processor()}, {os.cpu_count()} cores, OMP_NUM_THREADS {threads}, Python {python}, {versions}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def memory() -> dict[str, float]:
    """What this process holds now, in megabytes: what it asked for, pages of files, both."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    fields = {"anonymous": "RssAnon", "mapped": "RssFile", "total": "VmRSS"}
    return {name: int(lines[field].split()[0]) * 1024 / 1e6 for name, field in fields.items()}


def watched(run: Callable[[], object]) -> dict[str, float]:
    """The ``seconds`` that a call takes, and the peaks of :func:`memory`, which a thread samples meanwhile."""
    peak, done, start = memory(), threading.Event(), time.perf_counter()

    def watch() -> None:
        while not done.wait(SAMPLE_SECONDS):
            peak.update({name: max(peak[name], value) for name, value in memory().items()})

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    return {"seconds": seconds, **peak}


def watched_apart(run: Callable[[], object]) -> dict[str, float]:
    """The same of a call that can be pickled, in a new process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(watched, run).result()


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table; the first row is its header."""
    return [f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]


def write_csv(name: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Path:
    """Write ``results/NAME.csv`` under a comment that names the machine."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    with path.open("w", newline="") as file:
        file.write(f"# {machine()}\n")
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def read_csv(name: str) -> list[list[str]]:
    """The rows of ``results/NAME.csv``, without its header; none if it does not exist."""
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.reader(line for line in file if not line.startswith("#")))[1:]


def measure_missing(
    name: str,
    keys: Sequence[tuple[Any, ...]],
    measure: Callable[..., Sequence[float]],
    *,
    named: Sequence[str],
    metrics: Sequence[str],
    shown: Sequence[str] | None = None,
    baseline: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Measure what ``results/NAME.csv`` lacks, and print a table of means over seeds with their standard deviations.

    Args:
        name: of the results.
        keys: the texts and whole numbers that say what to measure.
        measure: key → metrics.
        named: the columns of a key; one of them is ``seed``.
        metrics: the columns that follow.
        shown: those that the table has; ``None`` for all.
        baseline: name → metrics, for rows at the head of the table.
    """
    print(machine())
    known = {tuple(row[: len(named)]): [float(value or "nan") for value in row[len(named) :]] for row in read_csv(name)}
    for key in keys:
        texts = tuple(map(str, key))
        if texts not in known:
            known[texts] = list(measure(*key))
            rows = [(*one, *(round(value, 4) for value in values)) for one, values in known.items()]
            write_csv(name, (*named, *metrics), rows)
            print(*key, *(f"{value:.3g}" for value in known[texts]), flush=True)
    seed, shown = named.index("seed"), shown or metrics
    groups: dict[tuple[str, ...], list[Sequence[float]]] = {}
    for first, values in (baseline or {}).items():
        alone = (first, *([""] * (len(named) - 2)))
        groups[alone] = [values]
    for key, found in known.items():
        groups.setdefault((*key[:seed], *key[seed + 1 :]), []).append(found)
    table = [[*named[:seed], *named[seed + 1 :], "seeds", *shown]]
    for group, several in groups.items():
        of = dict(zip(metrics, zip(*several, strict=True), strict=True))
        named_so = [f"{int(text):,}" if text.isdecimal() else text for text in group]
        table.append([*named_so, str(len(several)), *(cell(of[metric]) for metric in shown)])
    print(*markdown(table), sep="\n")


def cell(values: Sequence[float]) -> str:
    """Mean and sample standard deviation."""
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3g}{spread}"


def write_json(name: str, content: Mapping[str, Any]) -> Path:
    """Write ``results/NAME.json``: the machine and the content."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **content}, indent=1) + "\n")
    return path


def training_command(name: str, *options: str, folder: Path, output: str = "") -> list[str] | None:
    """The command that trains a model of ``objectives/trained.py``, or continues to; ``None`` if it is trained.

    Args:
        name: of one of its ``COMMANDS``.
        options: of ``lcsc train``, in place of the command's.
        folder: where the command will be run; the trajectory is in its folder ``models``.
        output: the trajectory's name without its suffix; by default the command's.
    """
    output = output or name
    model = folder / "models" / f"{output}.model"
    if (model / "unet" / "diffusion_pytorch_model.safetensors").is_file():  # which a training writes last
        return None
    words = [str(ROOT / word) if word.startswith("studies/") else word for word in shlex.split(COMMANDS[name])[1:]]
    resume = ["--resume"] if (model / "training.json").is_file() else []
    program = "from lcsc_opt.cli import main; main()"
    return [sys.executable, "-c", program, *words, *options, *resume, "-o", f"models/{output}.trajectory"]


def trained(name: str, *options: str, folder: Path = RESULTS, output: str = "") -> Path:
    """The trajectory of such a model, trained first, in one thread, if it is not there yet."""
    (folder / "models").mkdir(parents=True, exist_ok=True)
    command = training_command(name, *options, folder=folder, output=output)
    if command is not None:
        threads = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        subprocess.run(command, cwd=folder, env={**os.environ, **threads}, check=True)
    return folder / "models" / f"{output or name}.trajectory"


def run_listed(specs: Sequence[StudySpec], url: str, *, accept_changes: bool = False) -> None:
    """Run studies as ``lcsc run`` does."""
    objectives = ObjectiveLoader(BuildContext(files=files_directory(url)))
    run_studies(Experiment(specs, Database(url), objectives, accept_changes=accept_changes))
