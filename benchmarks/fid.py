"""How fast FID is computed, beside pytorch-fid's formula with scipy's ``sqrtm`` and beside torch-fidelity.

    python benchmarks/fid.py [--rounds 3] [--quick]

Features are normal, away from the origin, in float32 as networks give them. Their standard deviations fall as
``i^-0.75`` in a random basis. The samples' spread is a tenth larger than that of 10,000 real images. In each round
everything is measured in turns, so that other work on the machine affects all alike; medians are compared.

``statistics`` is the distance from mean and covariance, which an evaluation has when its last image is sampled.
``features`` includes computing them: ours batch by batch, as an evaluation does; theirs with ``np.cov`` of all. With
fewer images than features, ours computes no covariance and uses the images' N x N matrix. All three prepare once what
depends only on the real images; that is not measured.

The error of each is measured against a fourth way, through singular values of the features alone, which takes no root
of a rounded eigenvalue. torch-fidelity's means are in float32.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from common import machine, write_json

from lcsc_opt.metrics import FrechetReference, Moments

CASES = ((2048, 10_000), (2048, 1_000), (64, 10_000), (64, 1_000))  # features, images
QUICK_CASES = ((128, 600), (128, 60))
REAL = 10_000
BATCHES = {2048: 250, 128: 50, 64: 500}
DECAY, WIDER, MEAN, SHIFT = 0.75, 1.1, 0.4, 0.01
OFFSET = 1e-6  # pytorch-fid adds it to both covariances when the root of their product is not finite
SMALL_ROUNDS = 20
LEAST = {10_000: 5.0, 1_000: 20.0}  # images → our target: times faster than scipy with 2,048 features
LARGEST_ERROR = 1e-9

Statistics = tuple[np.ndarray, np.ndarray]


def main() -> None:
    """Measure, print and save."""
    arguments = _arguments()
    print(machine())
    cases = []
    for dimension, images in QUICK_CASES if arguments.quick else CASES:
        rounds = max(arguments.rounds, SMALL_ROUNDS) if dimension < 1000 else arguments.rounds
        cases.append(compare(dimension, images, rounds))
    if not arguments.quick:
        print(write_json("fid", {"cases": cases}))
        _judge(cases)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="128 features, few images, nothing written")
    return parser.parse_args()


def compare(dimension: int, images: int, rounds: int) -> dict[str, Any]:
    """One case: seconds of each way, how many times faster ours is, and how far the values are apart."""
    basis = random_basis(dimension)
    real, samples = features(REAL, basis, seed=1), features(images, basis, seed=2, spread=WIDER, shift=SHIFT)
    seconds, values = measure(tasks(real, samples), rounds)
    exact = with_singular_values(real, samples)
    times_faster = {}
    for (who, source), taken in seconds.items():
        if who != "ours":
            ours = seconds.get(("ours", source), seconds["ours", "features"])
            times_faster[_way(who, source)] = round(statistics.median(taken) / statistics.median(ours), 2)
    case = {
        "features": dimension,
        "images": images,
        "rounds": rounds,
        "fid": exact,
        "seconds": {_way(*way): _spread(taken) for way, taken in seconds.items()},
        "ours_is_times_faster_than": times_faster,
        "relative_error": {_way(*way): float(f"{abs(value / exact - 1):.2g}") for way, value in values.items()},
    }
    _print(case)
    return case


def random_basis(dimension: int) -> np.ndarray:
    """``[D, D]`` orthonormal."""
    basis, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((dimension, dimension)))
    return np.asarray(basis)


def features(images: int, basis: np.ndarray, *, seed: int, spread: float = 1.0, shift: float = 0.0) -> np.ndarray:
    """``[N, D]`` float32 with a decaying spectrum, like the features of images."""
    deviations = spread * np.arange(1, len(basis) + 1) ** -DECAY
    drawn = np.random.default_rng(seed).standard_normal((images, len(basis)))
    return np.asarray((drawn * deviations) @ basis + MEAN + shift, dtype=np.float32)


def tasks(real: np.ndarray, samples: np.ndarray) -> dict[tuple[str, str], Callable[[], float]]:
    """(who computes, from what) → the computation. The part of the real images is done already."""
    from torch_fidelity import metric_fid

    of_real, of_samples = moments(real), moments(samples)
    reference = FrechetReference(*of_real)
    images, dimension = samples.shape
    tensor = torch.from_numpy(samples)

    def theirs(statistics_1: Mapping[str, np.ndarray], statistics_2: Mapping[str, np.ndarray]) -> float:
        answer = metric_fid.fid_statistics_to_metric(statistics_1, statistics_2, verbose=False)
        return float(answer[metric_fid.KEY_METRIC_FID])

    real_statistics = metric_fid.fid_features_to_statistics(torch.from_numpy(real))
    sample_statistics = metric_fid.fid_features_to_statistics(tensor)
    made: dict[tuple[str, str], Callable[[], float]] = {
        ("scipy", "statistics"): lambda: with_root(of_samples, of_real),
        ("scipy", "features"): lambda: with_root(moments(samples), of_real),
        ("torch-fidelity", "statistics"): lambda: theirs(sample_statistics, real_statistics),
        ("torch-fidelity", "features"): lambda: theirs(metric_fid.fid_features_to_statistics(tensor), real_statistics),
    }
    if images < dimension:
        return {("ours", "features"): lambda: reference.distance_from_features(samples), **made}
    reduced = reduce(tensor, BATCHES[dimension])
    return {
        ("ours", "statistics"): lambda: reference.distance_from_moments(reduced),
        ("ours", "features"): lambda: reference.distance_from_moments(reduce(tensor, BATCHES[dimension])),
        **made,
    }


def reduce(samples: torch.Tensor, batch: int) -> Moments:
    """Reduce the features batch by batch, as an evaluation does."""
    reduced = Moments()
    for part in torch.split(samples, batch):
        reduced.update(part)
    return reduced


def moments(values: np.ndarray) -> Statistics:
    """Mean and covariance as pytorch-fid computes them."""
    return values.mean(axis=0, dtype=np.float64), np.cov(values, rowvar=False, dtype=np.float64)


def with_root(first: Statistics, second: Statistics) -> float:
    """The distance as pytorch-fid computes it: through the root of the covariances' product."""
    from scipy import linalg

    (mean_1, cov_1), (mean_2, cov_2) = first, second
    root = linalg.sqrtm(cov_1 @ cov_2)
    if not np.isfinite(root).all():
        offset = OFFSET * np.eye(len(cov_1))
        root = linalg.sqrtm((cov_1 + offset) @ (cov_2 + offset))
    trace = np.trace(cov_1) + np.trace(cov_2) - 2 * np.trace(root.real)
    return float(np.square(mean_1 - mean_2).sum() + trace)


def with_singular_values(real: np.ndarray, samples: np.ndarray) -> float:
    """The distance with ``tr (Σ₁ Σ₂)^½`` as the sum of the singular values of ``R₁ R₂ᵀ``, ``Rᵢᵀ Rᵢ = Σᵢ`` by QR."""
    mean_1, mean_2 = (values.mean(axis=0, dtype=np.float64) for values in (real, samples))
    root_1, root_2 = (
        np.asarray(np.linalg.qr((values - mean) / np.sqrt(len(values) - 1), mode="r"))
        for values, mean in ((real, mean_1), (samples, mean_2))
    )
    between = np.linalg.svd(root_1 @ root_2.T, compute_uv=False).sum()
    return float(np.square(mean_1 - mean_2).sum() + np.square(root_1).sum() + np.square(root_2).sum() - 2 * between)


def measure(
    ways: Mapping[tuple[str, str], Callable[[], float]], rounds: int
) -> tuple[dict[tuple[str, str], list[float]], dict[tuple[str, str], float]]:
    """Seconds of each round, and the last value, by way."""
    seconds: dict[tuple[str, str], list[float]] = {name: [] for name in ways}
    ours = [task for (who, _), task in ways.items() if who == "ours"]
    values: dict[tuple[str, str], float] = {}
    for task in ours:
        task()  # the first call computes the factor of the reference
    for _ in range(rounds):
        for name, task in ways.items():
            start = time.perf_counter()
            values[name] = task()
            seconds[name].append(time.perf_counter() - start)
    return seconds, values


def _way(who: str, source: str) -> str:
    return f"{who} from {source}"


def _spread(taken: list[float]) -> dict[str, float]:
    found = {"median": statistics.median(taken), "least": min(taken), "most": max(taken)}
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def _print(case: Mapping[str, Any]) -> None:
    print(f"{case['features']} features, {case['images']} images: FID {case['fid']:.6f}")
    for name, taken in case["seconds"].items():
        line = f"  {name:30s} {taken['median']:9.4f} s  ({taken['least']:.4f} to {taken['most']:.4f})"
        line += f"  off by {case['relative_error'][name]:.1e}"
        if name in case["ours_is_times_faster_than"]:
            line += f"  {case['ours_is_times_faster_than'][name]:6.1f} times ours"
        print(line, flush=True)


def _judge(cases: list[dict[str, Any]]) -> None:
    for case in cases:
        error = max(value for way, value in case["relative_error"].items() if "ours" in way)
        if error > LARGEST_ERROR:
            sys.exit(f"missed: off by {error:.1e}")
        faster, least = case["ours_is_times_faster_than"], LEAST[case["images"]]
        if case["features"] == max(BATCHES) and min(faster[name] for name in faster if "scipy" in name) < least:
            sys.exit(f"missed: {least} times faster than scipy at {case['images']} images")


if __name__ == "__main__":
    main()
