"""The cost of a term of single images in an evaluation with gradient: CPU seconds beside those of FID alone.

    python benchmarks/fidelity_cost.py [--turns 7]

The digits objective with each loss takes turns with the one of FID alone, in one process, with the same candidate and
noise. The ratio is the median over the turns, of CPU time, which other work affects less than wall time. The last part
is the term alone for 1,000 samples and as many features as Inception has, without a network: the part of an evaluation
with Inception's features that is neither sampling nor passes of Inception.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from common import machine, write_csv

from lcsc_opt.base.records import Candidate
from lcsc_opt.base.study_file import ObjectiveSpec
from lcsc_opt.coefficients.profiles import ema_coefficients
from lcsc_opt.metrics import Reference
from lcsc_opt.metrics.feature_metrics import FeatureMetrics
from lcsc_opt.metrics.names import Formula
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.loading import load_objective

TRAINING: dict[str, Any] = {"data": "half", "training_steps": 2000, "checkpoint_every": 20}
TERMS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("fid (twice the same)", {}),
    ("fid + near", {"loss": {"fid": 1, "near": 6}}),
    ("fid + hinge", {"loss": {"fid": 1, "hinge": 1}}),
    ("fid, keep precision", {"keep": "precision"}),
    ("fid + clusters", {"loss": {"fid": 1, "clusters": 1}}),
    ("fid + sliced", {"loss": {"fid": 1, "sliced": 1}}),
)
SAMPLES, DIMENSION, REAL = 1000, 2048, 10_000
ALONE: tuple[Formula, ...] = ("fid", "near", "hinge")
REQUIRED = 1.10
HEADER = ("what", "images", "loss", "cpu_ms", "ratio")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=7)
    turns = parser.parse_args().turns
    torch.set_num_threads(1)
    print(machine())
    rows: list[tuple[Any, ...]] = []
    for images in (200, 1000):
        plain = objective(images, {})
        for name, settings in TERMS:
            with_term = objective(images, settings)
            base, ratio = beside(plain, with_term, turns)
            print(f"{images:5d} images, {name:22s} {1e3 * base:7.0f} ms of FID alone, ratio {ratio:.3f}", flush=True)
            rows.append(("digits", images, name, round(1e3 * base, 1), round(ratio, 3)))
            write_csv("fidelity_cost", HEADER, rows)  # after each row, in case it is stopped
    print(f"the term alone, {SAMPLES} samples x {DIMENSION} features, {REAL:,} real images")
    for formula, seconds in alone().items():
        print(f"{formula:10s} {seconds:7.2f} s")
        rows.append(("term alone", SAMPLES, formula, round(1e3 * seconds, 1), ""))
    write_csv("fidelity_cost", HEADER, rows)
    worst = max(row[4] for row in rows if row[0] == "digits")
    print(f"worst ratio {worst:.3f}, required {REQUIRED:.2f}")


def objective(images: int, settings: dict[str, Any]) -> Objective:
    """The digits objective that sees half A."""
    return load_objective(ObjectiveSpec(file="digits.py", settings={**TRAINING, "images": images, **settings}))


def beside(plain: Objective, with_term: Objective, turns: int) -> tuple[float, float]:
    """Median CPU seconds of ``plain``, and the median ratio of ``with_term`` to it."""
    candidate = Candidate(ema_coefficients(plain.steps, 0.99))
    pairs = []
    for turn in range(turns + 1):
        pair = [cpu_seconds(one, candidate) for one in (plain, with_term)]
        if turn:  # the first warms up
            pairs.append(pair)
    ratio = statistics.median(second / first for first, second in pairs)
    return statistics.median(first for first, _ in pairs), ratio


def cpu_seconds(one: Objective, candidate: Candidate) -> float:
    """The CPU seconds of one evaluation with gradient."""
    began = time.process_time()
    one.evaluate(candidate, gradient=True)
    return time.process_time() - began


class Flat:
    """Images that are features already."""

    name, dimension = "flat", DIMENSION

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """``[B, D, 1, 1]`` → ``[B, D]``."""
        return images.flatten(1)


def alone() -> dict[str, float]:
    """Formula → CPU seconds of its value and gradient. The reference is prepared before."""
    rng = torch.Generator().manual_seed(0)
    real = torch.randn(REAL, DIMENSION, 1, 1, generator=rng)
    reference = Reference.of_images(Flat(), real)
    samples = 1.1 * torch.randn(SAMPLES, DIMENSION, generator=rng)
    found: dict[str, float] = {}
    for formula in ALONE:
        for some in (samples[:50], samples):  # the first prepares the reference
            metrics = FeatureMetrics(reference)
            metrics.update(some)
            began = time.process_time()
            metrics.gradient(formula)
            found[formula] = time.process_time() - began
    return found


if __name__ == "__main__":
    main()
