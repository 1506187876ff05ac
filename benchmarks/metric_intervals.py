"""The intervals of held-out reports: how often they hold, and what they cost.

    python benchmarks/metric_intervals.py [--repetitions 200] [--part coverage|cost] [--quick]

Features are normal in a random basis, with standard deviations that fall as ``i^-0.75``; samples are shifted, and a
tenth wider than real ones. The real features stay the same, and samples are drawn again in every repetition. An
interval holds if the mean of a metric over all repetitions is inside; that of a gain is of two models whose samples
come from the same noise. The mean half width of the intervals is divided by 1.96 standard deviations over the
repetitions.

The cost is the CPU time of one process with 2,048 features.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from common import RESULTS, machine, markdown, parse, write_json

from lcsc_opt.base.jackknife import GROUPS, half_width, standard_error
from lcsc_opt.metrics import Reference
from lcsc_opt.metrics.feature_metrics import FeatureMetrics
from lcsc_opt.metrics.names import Formula

Features = npt.NDArray[np.float64]

FORMULAS: tuple[Formula, ...] = ("fid", "kid", "precision", "recall", "near")
DIMENSION, REAL, IMAGES = 32, 1000, 1000
SHIFT, WIDER, DECAY = 0.1, 1.1, 0.75
COSTLY_DIMENSION, COSTLY_IMAGES = 2048, 10_240


def main() -> None:
    """Measure the parts, print them, and put them into ``results/metric_intervals.json``."""
    part = {"choices": ["coverage", "cost"], "help": "only this; the others stay as they are in the file"}
    arguments = parse(__doc__, small={"repetitions": 10}, repetitions=200, part=part)
    print(machine())
    path = RESULTS / "metric_intervals.json"
    results: dict[str, Any] = {}
    if path.exists() and arguments.part is not None:
        results = json.loads(path.read_text())
        del results["machine"]
    if arguments.part in (None, "coverage"):
        results["coverage"] = {"repetitions": arguments.repetitions, "metrics": coverage(arguments.repetitions)}
    if arguments.part == "cost" or (arguments.part is None and not arguments.quick):
        results["cost"] = cost()
    if not arguments.quick:
        write_json("metric_intervals", results)


class Model:
    """Normal features; ``samples`` of the same seed are the same noise in every model."""

    def __init__(self, dimension: int, *, shift: float = 0.0, wider: float = 1.0) -> None:
        basis, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((dimension, dimension)))
        deviations = wider * np.arange(1, dimension + 1) ** -DECAY
        self.factor = basis * deviations
        self.mean = np.full(dimension, shift / math.sqrt(dimension))

    def samples(self, count: int, seed: int) -> Features:
        """``[count, D]``."""
        noise = np.random.default_rng([1, seed]).standard_normal((count, len(self.mean)))
        features: Features = noise @ self.factor.T + self.mean
        return features


def coverage(repetitions: int) -> list[dict[str, Any]]:
    """How often the intervals of each metric, and of gains, hold."""
    extractor: Any = SimpleNamespace(name="normal", dimension=DIMENSION)
    reference = Reference.of_features(extractor, Model(DIMENSION).samples(REAL, 10**6))
    answer = Model(DIMENSION, shift=SHIFT, wider=WIDER)
    baseline = Model(DIMENSION, shift=2 * SHIFT, wider=WIDER)
    values: dict[Formula, list[tuple[float, float]]] = {formula: [] for formula in FORMULAS}
    gains: dict[Formula, list[tuple[float, float]]] = {formula: [] for formula in FORMULAS}
    for seed in range(repetitions):
        metrics = metrics_of(answer.samples(IMAGES, seed), reference)
        baseline_metrics = metrics_of(baseline.samples(IMAGES, seed), reference)
        for formula in FORMULAS:
            value, without = value_and_without(metrics, formula)
            baseline_value, baseline_without = value_and_without(baseline_metrics, formula)
            values[formula].append((value, interval_of(without)))
            gains[formula].append((baseline_value - value, interval_of(baseline_without - without)))
    rows: list[dict[str, Any]] = []
    for formula in FORMULAS:
        held, width = held_and_width(values[formula])
        gain_held, gain_width = held_and_width(gains[formula])
        rows.append({"metric": formula, "held": held, "width": width, "gain_held": gain_held, "gain_width": gain_width})
    table = [["metric", "interval holds", "half width / 1.96 sd", "gain's holds", "half width / 1.96 sd"]]
    for row in rows:
        shares = [f"{100 * row[name]:.1f} %" for name in ("held", "gain_held")]
        widths = [f"{row[name]:.2f}" for name in ("width", "gain_width")]
        table.append([str(row["metric"]), shares[0], widths[0], shares[1], widths[1]])
    print(*markdown(table), sep="\n")
    return rows


def metrics_of(samples: Features, reference: Reference) -> FeatureMetrics:
    """The metrics of samples ``[N, D]``, with their groups."""
    metrics = FeatureMetrics(reference, total=len(samples), intervals=True)
    metrics.update(torch.from_numpy(samples))
    return metrics


def value_and_without(metrics: FeatureMetrics, formula: Formula) -> tuple[float, Features]:
    """A metric, and ``[G]`` without each of the groups."""
    without = metrics.without_each_group(formula)
    if without is None:
        raise ValueError(f"{formula}: too few images for an interval")
    return metrics.compute(formula), without


def interval_of(without: Features) -> float:
    """Half of its width."""
    return half_width(standard_error(without.tolist()), GROUPS - 1)


def held_and_width(measured: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The share of intervals that hold the mean of the values; their mean half width over 1.96 standard deviations."""
    values, halves = np.array(measured).T
    held = np.abs(values - values.mean()) <= halves
    return float(held.mean()), float(halves.mean() / (1.96 * values.std(ddof=1)))


def cost() -> dict[str, float]:
    """CPU seconds of each metric, and of its values without each group, after the reference is prepared."""
    extractor: Any = SimpleNamespace(name="normal", dimension=COSTLY_DIMENSION)
    real = Model(COSTLY_DIMENSION).samples(COSTLY_IMAGES, 10**6)
    reference = Reference.of_features(extractor, real)
    reference.frechet.distance(reference.frechet.mean, reference.frechet.cov)
    metrics = metrics_of(Model(COSTLY_DIMENSION, shift=SHIFT).samples(COSTLY_IMAGES, 0), reference)
    formulas: tuple[Formula, ...] = ("fid", "precision", "recall")
    seconds: dict[str, float] = {}
    for formula in formulas:
        start = time.process_time()
        metrics.compute(formula)
        middle = time.process_time()
        metrics.without_each_group(formula)
        seconds[formula] = middle - start
        seconds[f"{formula}, interval"] = time.process_time() - middle
    texts = [[formula, f"{seconds[formula]:.1f}", f"{seconds[f'{formula}, interval']:.1f}"] for formula in formulas]
    print(*markdown([["metric", "CPU seconds", "interval"], *texts]), sep="\n")
    return seconds


if __name__ == "__main__":
    main()
