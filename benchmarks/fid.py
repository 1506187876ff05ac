"""How fast FID is computed, against pytorch-fid's formula with scipy's ``sqrtm`` and torch-fidelity.

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

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from common import machine, parse, write_json

from lcsc_opt.base.accelerator import CPU
from lcsc_opt.base.imports import allow_mismatched_torchvision
from lcsc_opt.metrics import FrechetReference, Moments

CASES = ((2048, 10_000), (2048, 1_000), (64, 10_000), (64, 1_000))  # features, images
QUICK_CASES = ((128, 600), (128, 60))
REAL = 10_000
BATCHES = {2048: 250, 128: 50, 64: 500}
DECAY, WIDER, MEAN, SHIFT = 0.75, 1.1, 0.4, 0.01
OFFSET = 1e-6  # pytorch-fid adds it to both covariances when the root of their product is not finite
SMALL_ROUNDS = 20

Statistics = tuple[np.ndarray, np.ndarray]
Way = tuple[str, str]
"""Who computes, and from what."""


def main() -> None:
    """Measure, print and save."""
    arguments = parse(__doc__, rounds=3, small={})
    print(machine())
    cases = []
    for dimension, images in QUICK_CASES if arguments.quick else CASES:
        rounds = max(arguments.rounds, SMALL_ROUNDS) if dimension < 1000 else arguments.rounds
        cases.append(compare(dimension, images, rounds))
    if not arguments.quick:
        print(write_json("fid", {"cases": cases}))


def compare(dimension: int, images: int, rounds: int) -> dict[str, Any]:
    """One case: seconds of each way, how many times faster ours is, and how far the values are apart."""
    basis, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((dimension, dimension)))
    real, samples = features(REAL, basis, seed=1), features(images, basis, seed=2, spread=WIDER, shift=SHIFT)
    seconds, values = measure(tasks(real, samples), rounds)
    exact = with_singular_values(real, samples)
    print(f"{dimension} features, {images} images: FID {exact:.6f}")
    case: dict[str, Any] = {"features": dimension, "images": images, "rounds": rounds, "fid": exact}
    case |= {"seconds": {}, "ours_is_times_faster_than": {}, "relative_error": {}}
    for (who, source), taken in seconds.items():
        way, median = f"{who} from {source}", statistics.median(taken)
        found = {"median": median, "least": min(taken), "most": max(taken)}
        case["seconds"][way] = {name: float(f"{value:.4g}") for name, value in found.items()}
        case["relative_error"][way] = error = float(f"{abs(values[who, source] / exact - 1):.2g}")
        line = f"  {way:30s} {median:9.4f} s  ({min(taken):.4f} to {max(taken):.4f})  off by {error:.1e}"
        if who != "ours":
            ours = statistics.median(seconds.get(("ours", source), seconds["ours", "features"]))
            case["ours_is_times_faster_than"][way] = round(median / ours, 2)
            line += f"  {median / ours:6.1f} times ours"
        print(line, flush=True)
    return case


def features(images: int, basis: np.ndarray, *, seed: int, spread: float = 1.0, shift: float = 0.0) -> np.ndarray:
    """``[N, D]`` float32 with a decaying spectrum, like the features of images."""
    deviations = spread * np.arange(1, len(basis) + 1) ** -DECAY
    drawn = np.random.default_rng(seed).standard_normal((images, len(basis)))
    return np.asarray((drawn * deviations) @ basis + MEAN + shift, dtype=np.float32)


def tasks(real: np.ndarray, samples: np.ndarray, device: torch.device = CPU) -> dict[Way, Callable[[], float]]:
    """(who computes, from what) → the computation; ours on the device. The part of the real images is done already."""
    allow_mismatched_torchvision()
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
    made: dict[Way, Callable[[], float]] = {
        ("scipy", "statistics"): lambda: with_root(of_samples, of_real),
        ("scipy", "features"): lambda: with_root(moments(samples), of_real),
        ("torch-fidelity", "statistics"): lambda: theirs(sample_statistics, real_statistics),
        ("torch-fidelity", "features"): lambda: theirs(metric_fid.fid_features_to_statistics(tensor), real_statistics),
    }
    if images < dimension:
        return {("ours", "features"): lambda: reference.distance_from_features(samples), **made}
    there = tensor.to(device)
    reduced = reduce(there, BATCHES[dimension])
    return {
        ("ours", "statistics"): lambda: reference.distance_from_moments(reduced),
        ("ours", "features"): lambda: reference.distance_from_moments(reduce(there, BATCHES[dimension])),
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


def measure(ways: Mapping[Way, Callable[[], float]], rounds: int) -> tuple[dict[Way, list[float]], dict[Way, float]]:
    """Seconds of each round, and the last value, by way."""
    seconds: dict[Way, list[float]] = {way: [] for way in ways}
    values: dict[Way, float] = {}
    ways["ours", "features"]()  # the first call computes the factor of the reference
    for _ in range(rounds):
        for name, task in ways.items():
            start = time.perf_counter()
            values[name] = task()
            seconds[name].append(time.perf_counter() - start)
    return seconds, values


if __name__ == "__main__":
    main()
