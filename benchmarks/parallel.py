"""The gain of studies that share workers: six studies over two workers, side by side and one after the other.

    python benchmarks/parallel.py [--evaluations 20] [--rounds 1] [--quick]

Evaluations sleep for 50 ms. Powell asks for one candidate after the other, so alone it uses one worker. ``search`` is
compared: the seconds from the first result to the last, added up for studies one after the other. So the start of
workers counts for neither (side by side they start once, otherwise six times). ``command`` includes everything.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from common import machine, write_json

import lcsc_opt
from lcsc_opt.cli import run as lcsc
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import StoredStudy, study_names

WAYS = ("--one-by-one", "--parallel")
LEAST_RATIO = 1.8  # our own target if one study cannot use both workers
STUDIES, WORKERS, SECONDS = 6, 2, 0.05
Ways = dict[str, list[dict[str, float]]]
"""Way of running the studies → for each round the seconds of the search and of the whole command."""
MODULE = f"""
import time

def loss(coefficients):
    time.sleep({SECONDS})
    return float(coefficients @ coefficients)
"""


def main() -> None:
    """Measure, print, and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluations", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="3 evaluations, one round, nothing written, no verdict")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.evaluations, arguments.rounds = 3, 1
    print(machine())
    print(f"{STUDIES} studies, {WORKERS} workers, {arguments.evaluations} evaluations each")
    os.environ["PYTHONPATH"] = str(Path(lcsc_opt.__file__).parents[1])  # for workers, which are new interpreters
    seconds = measured(arguments.evaluations, arguments.rounds)
    ratios = report(seconds)
    if arguments.quick:
        return
    print(write_json("parallel", {**vars(arguments), "seconds": seconds, "times_as_fast": ratios}))
    if ratios["search"] < LEAST_RATIO:
        sys.exit(f"missed: {LEAST_RATIO} times as fast where one study cannot use both workers")


def report(ways: Ways) -> dict[str, float]:
    """Print the medians; gives how many times as fast side by side is."""
    median = {
        what: [statistics.median(one[what] for one in ways[way]) for way in WAYS] for what in ("search", "command")
    }
    ratios = {what: round(alone / shared, 3) for what, (alone, shared) in median.items()}
    for what, (alone, shared) in median.items():
        times = f"{alone:6.2f} s one by one, {shared:6.2f} s side by side: {ratios[what]:.2f} times as fast"
        print(f"{what:8s} {times}")
    return ratios


def measured(evaluations: int, rounds: int) -> Ways:
    """Seconds of each way, in each round."""
    ways: Ways = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, known in ways.items():
            with tempfile.TemporaryDirectory() as folder:
                known.append(searches(Path(folder), evaluations, way))
    return ways


def searches(folder: Path, evaluations: int, way: str) -> dict[str, float]:
    """Seconds of all studies."""
    (folder / "sleeping.py").write_text(MODULE)
    study: dict[str, Any] = {
        "name": "parallel",
        "objective": {"file": "function.py", "settings": {"callable": "sleeping:loss", "steps": [1, 2, 3, 4]}},
        "optimizers": ["Powell"],
        "seeds": list(range(STUDIES)),
        "workers": WORKERS,
        "budget": {"evaluations": evaluations},
        "storage": f"sqlite:///{folder / 'studies.db'}",
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    sys.modules.pop("sleeping", None)
    start = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()) as said:
        status = lcsc(["run", str(folder / "study.yaml"), way])
    if status:
        sys.exit(said.getvalue())
    command = time.perf_counter() - start
    return {"search": round(_search_seconds(study["storage"], way), 3), "command": round(command, 3)}


def _search_seconds(url: str, way: str) -> float:
    storage = open_storage(url, write=False)
    ends = [
        [ended.timestamp() for trial in StoredStudy.open(storage, name).trials() if (ended := trial.datetime_complete)]
        for name in study_names(storage)
    ]
    if way == "--parallel":
        ends = [[end for study in ends for end in study]]
    return sum(max(study) - min(study) for study in ends)


if __name__ == "__main__":
    main()
