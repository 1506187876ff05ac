"""Beyond the machines that we have: a search on 1 to 10,000 workers, simulated from measured times.

    python benchmarks/fleet.py [--seed 0] [--quick]

No images are sampled. A clock replays the rules of ``lcsc_opt/search/runner.py`` (ask, evaluate, tell; ordered or as
completed; at most ceil(1.5 W) trials between ask and tell) and of the workers' queue.

* A trial takes 11.6 s for 10,000 images, as in Liu et al. 2024.
* The coordinator's time for each trial is from ``results/store.json`` and ``results/ray_overhead.json``.
* If images are spread, a message to each worker takes as long as to a local one in ``results/ray_overhead.json``.
* The time of scoring is from ``results/fid.json``. Workers that share a candidate's images cannot divide it.
* Assumed, not measured: trials differ by 5 % (log-normal), one in 100 takes three times as long; merging takes 0.2 s,
  and cannot be divided either; a worker dies once in 24 h on average, which costs its attempt and 120 s.

``use`` is the share of the workers' time that was evaluation that counted.

The effect of many candidates in flight on an optimizer is found by real searches, not simulated. It is the gap to the
optimum of a quadratic loss of 20 coefficients, known exactly and without noise, after the same number of trials, with
the windows of different numbers of workers.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import heapq
import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from common import RESULTS

from lcsc_opt.base.study_file import OptimizerSpec
from lcsc_opt.coefficients.profiles import default_origin
from lcsc_opt.coefficients.spaces import AffineSpace
from lcsc_opt.optimizers import build_optimizer, candidate_of
from lcsc_opt.search.runner import most_in_flight

STEPS = tuple(range(100, 2100, 100))
TRIALS, SECONDS = 2000, 11.6
MERGE = 0.2
SPREAD, STRAGGLERS, SLOWER = 0.05, 0.01, 3.0
LIFE, RESTART = 24 * 3600.0, 120.0
FLEETS = (1, 8, 64, 512, 2048, 10_000)


def _measured_seconds() -> tuple[float, float, float]:
    """Seconds of the coordinator per trial (two commits, a message there and back), of a local message, of scoring."""
    stored = json.loads((RESULTS / "store.json").read_text())["rows"]
    [commits] = [row for row in stored if (row["database"], row["checkpoints"]) == ("sqlite", 200)]
    ray = json.loads((RESULTS / "ray_overhead.json").read_text())["milliseconds"]
    cases = json.loads((RESULTS / "fid.json").read_text())["cases"]
    [score] = [case["seconds"] for case in cases if (case["features"], case["images"]) == (2048, 10_000)]
    coordinator = commits["median_and_quartiles"]["ours"][0] + ray["ray"]
    return coordinator / 1000, ray["local"] / 1000, score["ours from features"]["median"]


COORDINATOR, MESSAGE, SCORE = _measured_seconds()


@dataclasses.dataclass(frozen=True)
class Fleet:
    """The settings of a simulation.

    Attributes:
        workers: how many.
        tells: ``ordered``, ``as-completed``; or ``images``, if the images of one candidate are spread.
        window: trials between ask and tell.
        trials: of the study.
    """

    workers: int
    tells: str = "ordered"
    window: int = 1
    trials: int = TRIALS
    life: float = LIFE
    stragglers: float = STRAGGLERS


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Seconds of the whole search, share of the workers' time that counted, and attempts that deaths cost."""

    seconds: float
    use: float
    deaths: int


class Simulation:
    """A search in which each candidate is evaluated by one worker."""

    def __init__(self, fleet: Fleet, rng: np.random.Generator) -> None:
        self._fleet, self._rng = fleet, rng
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._waiting: list[int] = []
        self._asked = self._told = 0
        self._done: set[int] = set()
        self._free = fleet.workers
        self._now = self._coordinator_free = 0.0
        self._counted, self._deaths, self._last = 0.0, 0, 0.0

    def run(self) -> Outcome:
        """Simulate until the study has ended: events in the order of their times."""
        self._ask()
        self._hand_out()
        while self._events:
            self._now, _, act = heapq.heappop(self._events)
            act()
        return Outcome(self._last, self._counted / (self._fleet.workers * self._last), self._deaths)

    def _at(self, moment: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (moment, next(self._numbers), act))

    def _ask(self) -> None:
        while self._asked < self._fleet.trials and self._asked - self._told < self._fleet.window:
            self._waiting.append(self._asked)
            self._asked += 1

    def _hand_out(self) -> None:
        """Give candidates to free workers."""
        while self._free and self._waiting:
            trial = self._waiting.pop(0)
            self._free -= 1
            # each trial passes the coordinator, one after the other
            self._coordinator_free = max(self._coordinator_free, self._now) + COORDINATOR
            self._evaluate(self._coordinator_free, trial)

    def _evaluate(self, start: float, trial: int) -> None:
        took = duration(self._rng, self._fleet)
        dies = self._rng.exponential(self._fleet.life)
        if dies < took:
            self._deaths += 1
            self._at(start + dies, lambda: self._died(trial))
            self._at(start + dies + RESTART, self._freed)
            return
        self._at(start + took, lambda: self._ended(trial, took))

    def _died(self, trial: int) -> None:
        self._waiting.insert(0, trial)
        self._hand_out()

    def _freed(self) -> None:
        self._free += 1
        self._hand_out()

    def _ended(self, trial: int, took: float) -> None:
        self._counted, self._last = self._counted + took, self._now
        self._done.add(trial)
        if self._fleet.tells == "ordered":
            while self._told in self._done:
                self._told += 1
        else:
            self._told = len(self._done)
        self._ask()
        self._freed()


def duration(rng: np.random.Generator, fleet: Fleet, share: float = 1.0) -> float:
    """Seconds of one evaluation, or of a share of its images."""
    slower = SLOWER if rng.random() < fleet.stragglers else 1.0
    drawn = (SECONDS - MERGE - SCORE) * share * math.exp(SPREAD * rng.standard_normal()) * slower
    return MERGE + drawn + (SCORE if share == 1.0 else 0.0)


def spread_images(fleet: Fleet, rng: np.random.Generator) -> Outcome:
    """Spread each candidate's images over all workers: merge everywhere, wait for the slowest part, score."""
    share = 1.0 / fleet.workers
    now, counted, deaths = 0.0, 0.0, 0
    for _ in range(fleet.trials):
        start = now + COORDINATOR + MESSAGE * fleet.workers
        slow = rng.random(fleet.workers) < fleet.stragglers
        drawn = (SECONDS - MERGE - SCORE) * share * np.exp(SPREAD * rng.standard_normal(fleet.workers))
        parts = MERGE + drawn * np.where(slow, SLOWER, 1.0)
        died = rng.random(fleet.workers) < parts / fleet.life
        deaths += int(died.sum())
        # others repeat the part of a dead worker
        now = start + float(parts.max()) * (2.0 if died.any() else 1.0) + SCORE
        counted += float(drawn.sum())
    return Outcome(now, counted / (fleet.workers * now), deaths)


def simulate(fleet: Fleet, seed: int) -> Outcome:
    """Simulate one fleet."""
    rng = np.random.default_rng(seed)
    return spread_images(fleet, rng) if fleet.tells == "images" else Simulation(fleet, rng).run()


def tables(fleets: Sequence[int], trials: int, seed: int) -> list[str]:
    """All simulations, in Markdown."""

    def cell(**settings: Any) -> str:
        outcome = simulate(Fleet(**settings), seed)
        return f"{_duration(outcome.seconds)}, {outcome.use:.0%}"

    lines = [f"## One study of {trials:,} trials: how long, and use of the workers", ""]
    lines += _head("workers", "ordered", "as completed", "images spread", "trials that know nothing of each other")
    for workers in fleets:
        shared = {"workers": workers, "window": most_in_flight(workers), "trials": trials}
        cells = [
            cell(**shared),
            cell(**shared, tells="as-completed"),
            cell(**{**shared, "tells": "images", "window": 1}),
        ]
        lines.append(_row(f"{workers:,}", *cells, f"{min(most_in_flight(workers), trials):,}"))
    lines += ["", f"## 64 workers, one study of {trials:,} trials, on worse machines", ""]
    lines += _head("machines", "ordered", "as completed", "deaths")
    worse: dict[str, dict[str, float]] = {
        "as above": {},
        "one in 10 is a straggler": {"stragglers": 0.1},
        "a death an hour and worker": {"life": 3600.0},
    }
    for name, changes in worse.items():
        machines: dict[str, Any] = {"workers": 64, "window": most_in_flight(64), "trials": trials, **changes}
        deaths = simulate(Fleet(**machines), seed).deaths
        lines.append(_row(name, cell(**machines), cell(**machines, tells="as-completed"), str(deaths)))
    return lines


def gaps(trials: int) -> list[str]:
    """Markdown: the gaps that optimizers reach when more candidates are in flight."""
    windows = (1, 8, 16, 32, 64, 512)
    lines = ["", f"## The gap to the optimum after {trials:,} trials, of that at the start", ""]
    lines += _head("optimizer", *[f"{w} workers" for w in windows])
    for name in ("LCSC", "CMA"):
        lines.append(_row(name, *[f"{gap(name, workers, trials):.1e}" for workers in windows]))
    return lines


def gap(name: str, workers: int, trials: int) -> float:
    """The gap of the best of all trials to the optimum, as a share of the gap at the start."""
    target = np.linspace(-0.3, 0.4, len(STEPS))
    target /= target.sum()
    start = default_origin(STEPS)
    optimizer = build_optimizer(
        OptimizerSpec(name=name), AffineSpace(STEPS, start), budget=trials, workers=workers, seed=0
    )
    asked: collections.deque[tuple[Any, float]] = collections.deque()
    best = at_start = float(np.square(start - target).sum())
    for _ in range(trials):
        if len(asked) == most_in_flight(workers):
            optimizer.tell(*asked.popleft())
        parameter = optimizer.ask()
        loss = float(np.square(candidate_of(parameter).coefficients - target).sum())
        best = min(best, loss)
        asked.append((parameter, loss))
    return best / at_start


def _duration(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min"


def _head(*names: str) -> list[str]:
    return [_row(*names), _row(*["---"] * len(names))]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Simulate, print, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="up to 64 workers, 200 trials, nothing written")
    arguments = parser.parse_args()
    fleets = tuple(w for w in FLEETS if w <= 64) if arguments.quick else FLEETS
    start = time.perf_counter()
    trials = 200 if arguments.quick else TRIALS
    lines = [*tables(fleets, trials, arguments.seed), *gaps(trials)]
    print("\n".join(lines))
    print(f"\n{time.perf_counter() - start:.1f} s")
    if not arguments.quick:
        (RESULTS / "fleet.md").write_text("\n".join(["# Fleets, simulated by benchmarks/fleet.py", "", *lines, ""]))


if __name__ == "__main__":
    main()
