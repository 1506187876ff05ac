"""The time of a whole trial, and how much of it is neither sampling nor features, against a loop written by hand.

    python benchmarks/trial.py [--evaluations 100] [--rounds 3] [--quick]

The digits demo with K = 200 and K = 500 checkpoints: searches as ``lcsc run`` does them, in a fresh SQLite database in
the current folder, from the first ask to the last tell. ``by hand`` does the same without this library: an Optuna study
with one parameter for each coefficient, a loop over K state dicts in memory, the same sampler and feature network, and
FID through scipy's ``sqrtm`` as in pytorch-fid. In each round all run in turns; medians are shown.
"""

from __future__ import annotations

import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import scipy.linalg
import torch
from common import machine, parse, write_json

from lcsc_opt.base.records import SEARCH
from lcsc_opt.base.study_file import ObjectiveSpec, Settings, parse_studies
from lcsc_opt.coefficients.profiles import default_origin
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.metrics import extract
from lcsc_opt.objective.loading import load_objective
from lcsc_opt.search.execution import Executor
from lcsc_opt.search.plan import plans

PARTS = ("merge", "sample", "features", "metric")
CHECKPOINT_EVERY = {200: 20, 500: 8}
MOST_REST = 0.1  # our own target: the share of a trial with K = 200 that is neither sampling nor features
OPTIMIZERS = ("LCSC", "CMA")
IMAGES, BATCH = 1000, 500
STEP = 0.002  # difference of coefficients between trials done by hand

Result = dict[str, float]


def main() -> None:
    """Measure, print one line for each K and way, and compare with the target."""
    arguments = parse(__doc__, evaluations=100, rounds=3, small={"evaluations": 10, "rounds": 1})
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    print(machine())
    print("milliseconds a trial; rest = all that is neither sampling nor features")
    rows = []
    for checkpoints in CHECKPOINT_EVERY:
        rows += compare(checkpoints, arguments.evaluations, arguments.rounds)
    if arguments.quick:
        return
    print(write_json("trial", {"evaluations": arguments.evaluations, "rounds": arguments.rounds, "rows": rows}))
    missed = [row for row in rows if row["K"] == 200 and row["way"] in OPTIMIZERS and row["share"] > MOST_REST]
    if missed:
        sys.exit(f"missed: at most {MOST_REST:.0%} of a trial of K = 200 that is neither sampling nor features")


def compare(checkpoints: int, evaluations: int, rounds: int) -> list[dict[str, Any]]:
    """One row for each way, medians of the rounds."""
    ways: dict[str, Callable[[], Result]] = {
        name: functools.partial(search, checkpoints, name, evaluations) for name in OPTIMIZERS
    }
    ways["by hand"] = lambda: by_hand(checkpoints, max(evaluations // 5, 3))
    measured: dict[str, list[Result]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, measure in ways.items():
            measured[way].append(measure())
    rows = [_row(checkpoints, way, results) for way, results in measured.items()]
    ours = statistics.median(row["rest"] for row in rows[:-1])
    whole = statistics.median(row["trial"] for row in rows[:-1])
    print(
        f"      by hand the rest takes {rows[-1]['rest'] / ours:.1f} times as long, and the whole trial "
        f"{rows[-1]['trial'] / whole:.1f} times"
    )
    return rows


def _row(checkpoints: int, way: str, results: list[Result]) -> dict[str, Any]:
    median = {name: statistics.median(result[name] for result in results) for name in results[0]}
    shares = [result["rest"] / result["trial"] for result in results]
    numbers = "  ".join(f"{name} {value:6.1f}" for name, value in median.items())
    share = statistics.median(shares)
    print(
        f"K {checkpoints}  {way:8s} {numbers}  share {share:.1%} ({min(shares):.1%} to {max(shares):.1%})", flush=True
    )
    rounded = {name: round(value, 2) for name, value in median.items()}
    return {"K": checkpoints, "way": way, **rounded, "share": round(share, 4), "shares": [round(s, 4) for s in shares]}


def objective_spec(checkpoints: int) -> ObjectiveSpec:
    """The digits demo with so many checkpoints."""
    settings: Settings = {
        "images": IMAGES,
        "batch_size": BATCH,
        "checkpoint_every": CHECKPOINT_EVERY[checkpoints],
        "loss": "fid",
    }
    return ObjectiveSpec(file="digits.py", settings=settings)


def search(checkpoints: int, optimizer: str, evaluations: int) -> Result:
    """Milliseconds per trial of a search, by part."""
    spec = {
        "name": "trial",
        "objective": objective_spec(checkpoints).model_dump(),
        "optimizers": [optimizer],
        "budget": {"evaluations": evaluations},
    }
    (plan,) = plans(parse_studies(spec, source="benchmark"), None)
    with tempfile.TemporaryDirectory(dir=Path()) as folder:
        storage = open_storage(f"sqlite:///{Path(folder) / 'trial.db'}", write=True)
        runner = Executor(storage)
        objective = runner.objective(plan)
        objective(default_origin(objective.steps))  # draws the noise, and reads the pages
        start = time.perf_counter()
        runner.run(plan)
        seconds = time.perf_counter() - start
        costs = [trial.user_attrs["cost"] for trial in StoredStudy.open(storage, plan.name).trials()]
    parts = {part: 1e3 * sum(cost[f"{part}_seconds"] for cost in costs) / evaluations for part in PARTS}
    return _result(parts, 1e3 * seconds / evaluations)


def _result(parts: Result, trial: float) -> Result:
    other = trial - sum(parts.values())
    return {**parts, "other": other, "rest": trial - parts["sample"] - parts["features"], "trial": trial}


def by_hand(checkpoints: int, evaluations: int) -> Result:
    """Milliseconds per trial of a loop without this library, by part."""
    objective: Any = load_objective(objective_spec(checkpoints))
    trajectory, sampler, extractor = objective.trajectory, objective.sampler, objective.scores.extractor
    dicts = [trajectory.checkpoint(index) for index in range(checkpoints)]
    reference = objective.scores.references["inception"].frechet
    origin = default_origin(trajectory.steps)
    seconds = dict.fromkeys(PARTS, 0.0)

    def evaluate(trial: optuna.Trial) -> float:
        asked = [trial.suggest_float(f"a{i}", a - STEP, a + STEP) for i, a in enumerate(origin.tolist())]
        coefficients = np.array(asked) / sum(asked)
        marks = [time.perf_counter()]
        sampler.load(merge(dicts, coefficients))
        marks.append(time.perf_counter())
        with torch.no_grad():
            images = torch.cat([sampler.sample(SEARCH, at, at + BATCH) for at in range(0, IMAGES, BATCH)])
        marks.append(time.perf_counter())
        features = extract(extractor, images, batch_size=BATCH)
        marks.append(time.perf_counter())
        fid = fid_of(features, reference.mean, reference.cov)
        marks.append(time.perf_counter())
        for part, begun, ended in zip(PARTS, marks, marks[1:], strict=False):
            seconds[part] += ended - begun
        return fid

    with tempfile.TemporaryDirectory(dir=Path()) as folder:
        sampling = optuna.samplers.RandomSampler(seed=0)  # the cheapest sampler
        study = optuna.create_study(storage=f"sqlite:///{Path(folder) / 'by_hand.db'}", sampler=sampling)
        study.optimize(evaluate, n_trials=1)
        seconds.update(dict.fromkeys(PARTS, 0.0))
        start = time.perf_counter()
        study.optimize(evaluate, n_trials=evaluations)
        whole = time.perf_counter() - start
    return _result({part: 1e3 * value / evaluations for part, value in seconds.items()}, 1e3 * whole / evaluations)


def merge(dicts: list[dict[str, torch.Tensor]], coefficients: np.ndarray) -> dict[str, torch.Tensor]:
    """Add up K state dicts."""
    merged = {name: torch.zeros_like(tensor) for name, tensor in dicts[0].items()}
    for coefficient, tensors in zip(coefficients.tolist(), dicts, strict=True):
        for name, tensor in tensors.items():
            merged[name] += coefficient * tensor
    return merged


def fid_of(features: np.ndarray, mean: np.ndarray, cov: np.ndarray) -> float:
    """FID through the square root of the product of both covariances, which is not symmetric."""
    mean_2, cov_2 = features.mean(axis=0), np.cov(features, rowvar=False)
    root = scipy.linalg.sqrtm(cov @ cov_2).real
    difference = mean - mean_2
    return float(difference @ difference + np.trace(cov) + np.trace(cov_2) - 2 * np.trace(root))


if __name__ == "__main__":
    main()
