"""How fast checkpoints are merged, against a plain read of the same bytes and loops that a user would write.

    python benchmarks/merge.py [--checkpoints 50] [--megabytes 64] [--rounds 5] [--quick]

Makes one trajectory and stores it in each dtype. In each round everything is measured in turns, so that other work on
the machine affects all alike. Medians of the rounds are shown, with the least and the most. ``read`` sums the file's
bytes as 64-bit integers, in torch's threads. The loops that a user would write have the K state dicts in memory, as
float32:

* ``sum``: ``{name: sum(a * sd[name] for a, sd in zip(coefficients, dicts)) for name in dicts[0]}``;
* ``stack``: stacks each tensor's K versions and sums them with their weights, as mergekit's linear merge does;
* ``in place``: ``merged[name].add_(sd[name], alpha=a)``, one state dict after the other, the best loop that we found.

Of each dtype, the time of a merge and of a gradient's projection is also shown as a multiple of float32's, with the
relative error of the merged weights, against a sum of the float32 checkpoints in float64; the coefficients have both
signs.

The same merge, and the projection of a gradient, with a row of coefficients for each layer and for each output channel
are compared with one row.

Then a combination is found for the digits demo by following the gradient of FID. Its FID on other noise is compared
between the dtypes that are stored.
"""

from __future__ import annotations

import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import machine, parse, trained, write_json

from lcsc_opt.base.paths import BuildContext
from lcsc_opt.base.records import HELD_OUT, Candidate, Noise
from lcsc_opt.base.study_spec import ObjectiveSpec
from lcsc_opt.objective.loading import load_objective
from lcsc_opt.trajectory import Trajectory, TrajectoryWriter

DTYPES = ("exact", "float16", "bfloat16")
SUM_ABS = 6.5  # about what searches find
SPREAD = 0.01  # standard deviation of a weight between checkpoints
STEPS, STEP_SIZE, STEP_IMAGES = 60, 0.01, 200
LEAST_SHARE, LEAST_LOOP = 0.75, 3.0  # our own targets
WIDTHS = (64, 128, 256, 512)


def main() -> None:
    """Measure and print."""
    arguments = parse(
        __doc__,
        checkpoints=50,
        rounds=5,
        megabytes={"type": int, "default": 64, "help": "the size of one checkpoint"},
        small={"megabytes": 16, "rounds": 2},
    )
    print(machine())
    with tempfile.TemporaryDirectory(dir=Path()) as folder:
        stored = make(Path(folder), arguments.checkpoints, arguments.megabytes)
        result = measure(stored, arguments.rounds)
    if not arguments.quick:
        result["digits"] = digits()
        print(write_json("merge", result))
        exact, slower = result["stored"]["exact"], result["instead"]["sum"]["times"]
        if exact["share_of_read"] < LEAST_SHARE or slower < LEAST_LOOP:
            sys.exit(f"missed: {LEAST_SHARE:.0%} of a read, {LEAST_LOOP} a sum")


def make(folder: Path, checkpoints: int, megabytes: int) -> dict[str, Trajectory]:
    """One trajectory in every dtype: a start, and steps from it that add up, as training makes them."""
    for dtype in DTYPES:
        weights = state_dict(0, megabytes)
        generator = torch.Generator().manual_seed(1)
        with TrajectoryWriter(folder / f"{dtype}.trajectory", dtype=dtype) as writer:
            for step in range(checkpoints):
                for tensor in weights.values():
                    tensor += SPREAD / checkpoints**0.5 * torch.randn(tensor.shape, generator=generator)
                writer.append(step, weights, wait=False)
    return {dtype: Trajectory.open(folder / f"{dtype}.trajectory") for dtype in DTYPES}


def state_dict(step: int, megabytes: int) -> dict[str, torch.Tensor]:
    """Blocks of a convolution, its bias and two norms, as in a U-Net, until the size is reached."""
    generator = torch.Generator().manual_seed(step)
    tensors: dict[str, torch.Tensor] = {}
    left = megabytes * 10**6 // 4
    while left > 0:
        block = len(tensors) // 4
        width = WIDTHS[block % len(WIDTHS)]
        weight = torch.randn(width, min(width, -(-left // (9 * width))), 3, 3, generator=generator)
        tensors[f"blocks.{block}.conv.weight"] = weight
        for name in ("conv.bias", "norm.weight", "norm.bias"):
            tensors[f"blocks.{block}.{name}"] = torch.randn(width, generator=generator)
        left -= weight.numel() + 3 * width
    return tensors


def measure(stored: Mapping[str, Trajectory], rounds: int) -> dict[str, Any]:
    """Seconds of each round, by stored dtype or by loop, and the ratios of their medians."""
    exact = stored["exact"]
    checkpoints = len(exact)
    coefficients = np.random.default_rng(0).normal(size=checkpoints)
    coefficients *= SUM_ABS / np.abs(coefficients).sum()
    coefficients -= (coefficients.sum() - 1) / checkpoints
    dicts = [exact.checkpoint(index) for index in range(checkpoints)]
    gradient = exact.checkpoint(0)
    errors = relative_errors(stored, dicts, coefficients)
    tasks: dict[str, Callable[[], object]] = {}
    for dtype, trajectory in stored.items():
        content = whole(trajectory)
        tasks[f"{dtype} read"] = content.sum
        tasks[f"{dtype} merge"] = functools.partial(trajectory.merge, coefficients)
        tasks[f"{dtype} project"] = functools.partial(trajectory.project, gradient)
    tasks |= {name: functools.partial(way, dicts, coefficients) for name, way in INSTEAD.items()}
    counts: dict[str, int] = {}
    for rule in ("layers", "channels"):
        divided = exact.in_rows(rule)
        counts[rule] = len(divided.layer_groups or ())
        rows = coefficients + np.random.default_rng(1).normal(scale=0.01, size=(counts[rule], checkpoints))
        rows -= (rows.sum(axis=1, keepdims=True) - 1) / checkpoints
        tasks[f"{rule} merge"] = functools.partial(divided.merge, rows)
        tasks[f"{rule} project"] = functools.partial(divided.project, gradient)
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(rounds + 1):  # the first reads from the disk
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            if number:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(some) for name, some in seconds.items()}
    times = {
        rule: {work: round(medians[f"{rule} {work}"] / medians[f"exact {work}"], 3) for work in ("merge", "project")}
        for rule in counts
    }
    for rule, of_rule in times.items():
        print(
            f"{counts[rule]} rows: merge {of_rule['merge']}, project {of_rule['project']} times as long as one row",
            flush=True,
        )
    return {
        "checkpoints": checkpoints,
        "rows": {rule: {"count": count, **times[rule]} for rule, count in counts.items()},
        "parameters": exact.parameters,
        "sum_abs": round(float(np.abs(coefficients).sum()), 2),
        "stored": {
            dtype: _stored(dtype, trajectory, seconds, medians) | {"relative_error": errors[dtype]}
            for dtype, trajectory in stored.items()
        },
        "instead": {name: _instead(name, exact.nbytes, seconds, medians) for name in INSTEAD},
        "seconds": seconds,
    }


def relative_errors(
    stored: Mapping[str, Trajectory], dicts: list[dict[str, torch.Tensor]], coefficients: np.ndarray
) -> dict[str, float]:
    """Norm of the error of merged weights over the norm of the merged weights, by dtype."""
    expected = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in dicts[0].items()}
    for coefficient, tensors in zip(coefficients.tolist(), dicts, strict=True):
        for name, tensor in tensors.items():
            expected[name].add_(tensor.double(), alpha=coefficient)
    norm = sum(float(tensor.square().sum()) for tensor in expected.values())
    errors: dict[str, float] = {}
    for dtype, trajectory in stored.items():
        merged = trajectory.merge(coefficients)
        squares = sum(float((merged[name].double() - expected[name]).square().sum()) for name in expected)
        errors[dtype] = (squares / norm) ** 0.5
        print(f"{dtype:9s} {trajectory.nbytes / stored['exact'].nbytes:.3f} of the bytes, error {errors[dtype]:.1e}")
    return errors


def _stored(
    dtype: str, trajectory: Trajectory, seconds: Mapping[str, list[float]], medians: Mapping[str, float]
) -> dict[str, float]:
    size, read, merge = trajectory.nbytes, medians[f"{dtype} read"], medians[f"{dtype} merge"]
    times = {work: medians[f"{dtype} {work}"] / medians[f"exact {work}"] for work in ("merge", "project")}
    print(
        f"{dtype:9s} {size / 1e9:5.2f} GB  read {size / read / 1e9:5.1f} GB/s  merge {size / merge / 1e9:5.1f} GB/s "
        f"({read / merge:.2f} of it; {_spread(seconds[f'{dtype} merge'])}); {times['merge']:.2f} times as long as "
        f"exact, projection {times['project']:.2f}",
        flush=True,
    )
    return {
        "bytes": size,
        "read_gb_s": round(size / read / 1e9, 2),
        "merge_gb_s": round(size / merge / 1e9, 2),
        "share_of_read": round(read / merge, 3),
        **{f"{work}_times_exact": round(value, 3) for work, value in times.items()},
    }


def _instead(
    name: str, size: int, seconds: Mapping[str, list[float]], medians: Mapping[str, float]
) -> dict[str, float]:
    times = medians[name] / medians["exact merge"]
    print(
        f"{name:9s} {size / 1e9:5.2f} GB  merge {size / medians[name] / 1e9:5.1f} GB/s ({_spread(seconds[name])}): "
        f"{times:.1f} times as long as exact",
        flush=True,
    )
    return {"times": round(times, 2)}


def _spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds) * 1e3:.0f} ms, {min(seconds) * 1e3:.0f} to {max(seconds) * 1e3:.0f}"


def whole(trajectory: Trajectory) -> torch.Tensor:
    """The bytes of the file as 64-bit integers, mapped."""
    path = trajectory.path / "weights.bin"
    return torch.from_file(str(path), shared=True, size=path.stat().st_size // 8, dtype=torch.int64)


def add(dicts: list[dict[str, torch.Tensor]], coefficients: np.ndarray) -> dict[str, torch.Tensor]:
    """Add up state dicts in the simplest way."""
    weights = coefficients.tolist()
    return {
        name: sum(weight * tensors[name] for weight, tensors in zip(weights, dicts, strict=True)) for name in dicts[0]
    }


def stack(dicts: list[dict[str, torch.Tensor]], coefficients: np.ndarray) -> dict[str, torch.Tensor]:
    """Stack each tensor's versions, weigh them, and sum."""
    weights = torch.from_numpy(coefficients).float()
    merged = {}
    for name, tensor in dicts[0].items():
        versions = torch.stack([tensors[name] for tensors in dicts])
        merged[name] = (weights.view(-1, *[1] * tensor.dim()) * versions).sum(dim=0)
    return merged


def add_in_place(dicts: list[dict[str, torch.Tensor]], coefficients: np.ndarray) -> dict[str, torch.Tensor]:
    """Add up state dicts in place, without temporary tensors."""
    first, *others = coefficients.tolist()
    merged = {name: first * tensor for name, tensor in dicts[0].items()}
    for weight, tensors in zip(others, dicts[1:], strict=True):
        for name, tensor in merged.items():
            tensor.add_(tensors[name], alpha=weight)
    return merged


INSTEAD = {"sum": add, "stack": stack, "in place": add_in_place}


def digits() -> dict[str, dict[str, float]]:
    """The effect of storing fewer bits on the FID of a found combination."""
    settings: dict[str, Any] = {"checkpoints": str(trained("digits")), "images": 10_000}
    objective: Any = load_objective(ObjectiveSpec(file="trained.py", settings=settings), BuildContext())
    exact = objective.trajectory
    coefficients = follow_gradient(objective)
    print(f"digits: K = {len(exact)}, sum of |a| {np.abs(coefficients).sum():.2f}")
    results: dict[str, dict[str, float]] = {}
    reference: np.ndarray | None = None
    with tempfile.TemporaryDirectory(dir=Path()) as folder:
        for dtype in DTYPES:
            objective.trajectory = again(exact, Path(folder) / f"{dtype}.trajectory", dtype)
            fid = held_out_fid(objective, coefficients)
            reference = fid if reference is None else reference  # of the exact checkpoints, on the same noise
            change = float((fid / reference - 1).mean())
            size = objective.trajectory.nbytes / exact.nbytes
            print(f"{dtype:9s} {size:.3f} of the bytes  FID {fid.mean():.4f}  {change:+.4%}", flush=True)
            results[dtype] = {"bytes": size, "fid": float(fid.mean()), "fid_change": change}
    return results


def held_out_fid(objective: Any, coefficients: np.ndarray) -> np.ndarray:
    """FID on three groups of noise that no search saw, ``[3]``."""
    candidates = [Candidate(coefficients, noise=Noise(HELD_OUT.group, seed)) for seed in range(3)]
    return np.array([objective.evaluate(candidate).loss for candidate in candidates])


def follow_gradient(objective: Any) -> np.ndarray:
    """``[K]``: Adam on the gradient of FID in the coefficients, on fresh noise each step, from equal coefficients."""
    steps = len(objective.steps)
    coefficients, first, second = np.full(steps, 1 / steps), np.zeros(steps), np.zeros(steps)
    for step in range(STEPS):
        candidate = Candidate(coefficients, images=STEP_IMAGES, noise=Noise("search", step + 1), gradient=True)
        gradient = objective.evaluate(candidate).gradient
        gradient = gradient - gradient.mean()
        first, second = 0.9 * first + 0.1 * gradient, 0.99 * second + 0.01 * gradient**2
        move = first / (1 - 0.9 ** (step + 1)) / (np.sqrt(second / (1 - 0.99 ** (step + 1))) + 1e-12)
        coefficients = coefficients - STEP_SIZE * (1 - step / STEPS) * (move - move.mean())
    return coefficients


def again(exact: Trajectory, path: Path, dtype: str) -> Trajectory:
    """The same checkpoints in another dtype."""
    with TrajectoryWriter(path, dtype=dtype) as writer:
        for index, step in enumerate(exact.steps):
            writer.append(step, exact.checkpoint(index))
    return Trajectory.open(path)


if __name__ == "__main__":
    main()
