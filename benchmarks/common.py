"""What every benchmark needs: the name of this machine, and the writing of results."""

from __future__ import annotations

import csv
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lcsc_opt.base.reproducibility import environment

RESULTS = Path(__file__).parent / "results"


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


def write_json(name: str, content: Mapping[str, Any]) -> Path:
    """Write ``results/NAME.json``: the machine and the content."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **content}, indent=1) + "\n")
    return path
