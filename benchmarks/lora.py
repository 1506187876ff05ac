"""What combining the products of LoRA factors brings over combining the factors, and what a merge costs.

A network that tells the digits 0 to 4 apart is frozen, and a LoRA of rank 4 teaches it all ten, with step sizes
that leave noise in the weights. CMA-ES searches the coefficients of the last 40 checkpoints, once merged by factors and
once by products, from the same EMA; the cross-entropy that is reported is of digits that neither training nor search
saw. The exact product's LoRA has a rank of up to 128; cut to rank 4, it costs as much to use as the factors'.

    OMP_NUM_THREADS=1 python -m benchmarks.lora
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import timeit
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import nevergrad as ng
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional

from benchmarks.common import write_json
from lcsc_opt.checkpoints.lora import LoraAlphas
from lcsc_opt.coefficients.profiles import ema_coefficients
from lcsc_opt.trajectory import Trajectory, TrajectoryWriter
from lcsc_opt.trajectory.lora_products import LoraProducts

WIDTHS = (64, 128, 128, 10)
RANK, CHECKPOINTS, EVERY, WARM_UP, BATCH = 4, 40, 5, 400, 32
STEP_SIZES = (0.01, 0.05)  # of Adam: one that converges, one that leaves noise
RATES = (0.5, 0.8, 0.9, 0.95, 0.98)  # of EMAs, per checkpoint
Weights = Mapping[str, Tensor]
Merge = Callable[[Any], Weights]


def logits(base: Weights, lora: Weights, images: Tensor) -> Tensor:
    """``[N, 64]`` → ``[N, 10]``, through weights to which the LoRA's products are added."""
    x = images
    for layer in range(len(WIDTHS) - 1):
        weight = base[f"{layer}.weight"]
        if lora:
            weight = weight + lora[f"{layer}.lora_B.weight"] @ lora[f"{layer}.lora_A.weight"]
        x = functional.linear(x, weight, base[f"{layer}.bias"])
        x = functional.relu(x) if layer < len(WIDTHS) - 2 else x
    return x


def drawn(generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """First weights of the network, and of a LoRA that changes nothing."""
    base, lora = {}, {}
    for layer, (columns, rows) in enumerate(itertools.pairwise(WIDTHS)):
        base[f"{layer}.weight"] = torch.randn(rows, columns, generator=generator) / columns**0.5
        base[f"{layer}.bias"] = torch.zeros(rows)
        lora[f"{layer}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator) / columns**0.5
        lora[f"{layer}.lora_B.weight"] = torch.zeros(rows, RANK)
    return base, lora


def train(
    loss: Callable[[Tensor], Tensor], weights: Weights, count: int, generator: torch.Generator, **how: Any
) -> list[dict[str, Tensor]]:
    """The weights behind every step of Adam; ``count`` examples are drawn from in batches."""
    for tensor in weights.values():
        tensor.requires_grad_(True)
    optimizer, seen = torch.optim.Adam(weights.values(), lr=how["lr"]), []
    for _ in range(how["steps"]):
        optimizer.zero_grad()
        loss(torch.randint(count, (BATCH,), generator=generator)).backward()
        optimizer.step()
        seen.append({name: tensor.detach().clone() for name, tensor in weights.items()})
    return seen


def search(loss: Callable[[Any], float], start: Any, seed: int, budget: int) -> Any:
    """The best coefficients that CMA-ES finds."""
    space = ng.p.Array(init=start).set_mutation(sigma=0.02)
    space.random_state.seed(seed)
    optimizer = ng.optimizers.registry["CMA"](space, budget=budget)
    best = (loss(start), start)
    for _ in range(budget):
        asked = optimizer.ask()
        coefficients = asked.value + (1 - asked.value.sum()) / len(start)
        found = loss(coefficients)
        optimizer.tell(asked, found)
        best = min(best, (found, coefficients), key=lambda pair: pair[0])
    return best[1]


def one_seed(seed: int, step_size: float, budget: int, folder: Path) -> dict[str, Any]:
    """Held-out cross-entropy by way, milliseconds of a merge, and how far the two sums of one search are apart."""
    generator = torch.Generator().manual_seed(seed)
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=generator)
    images, labels = torch.tensor(digits.data / 16, dtype=torch.float32)[order], torch.tensor(digits.target)[order]
    (x, y), (x_search, y_search), (x_held, y_held) = (
        (images[part], labels[part]) for part in (slice(0, 600), slice(600, 1200), slice(1200, None))
    )
    base, lora = drawn(generator)
    few = torch.nonzero(y < 5)[:, 0]
    *_, base = train(
        lambda i: functional.cross_entropy(logits(base, {}, x[few[i]]), y[few[i]]),
        base,
        len(few),
        generator,
        steps=400,
        lr=2e-3,
    )
    seen = train(
        lambda i: functional.cross_entropy(logits(base, lora, x[i]), y[i]),
        lora, len(x), generator, steps=WARM_UP + EVERY * CHECKPOINTS, lr=step_size,
    )  # fmt: skip
    with TrajectoryWriter(folder / "lora.trajectory") as writer:
        for index in range(CHECKPOINTS):
            writer.append(index + 1, seen[WARM_UP + EVERY * (index + 1) - 1])
    trajectory = Trajectory.open(folder / "lora.trajectory")
    alphas = LoraAlphas.constant(float(RANK))
    exact, cut = (LoraProducts(trajectory, rank=rank, alphas=alphas) for rank in (None, RANK))
    ways: dict[str, Merge] = {
        "factors": trajectory.merge,
        "products": exact.merge,
        "products, rank 4": cut.merge,
    }

    def loss(merge: Merge, coefficients: Any, x: Tensor, y: Tensor) -> float:
        with torch.no_grad():
            return float(functional.cross_entropy(logits(base, merge(coefficients), x), y))

    emas = [ema_coefficients(trajectory.steps, rate=rate) for rate in RATES]
    start = min(emas, key=lambda a: loss(trajectory.merge, a, x_search, y_search))
    found: dict[str, Any] = {"last": loss(trajectory.merge, np.eye(CHECKPOINTS)[-1], x_held, y_held)}
    for name, merge in ways.items():
        found[f"EMA*, {name}"] = loss(merge, start, x_held, y_held)
        found[f"ms, {name}"] = 1e3 * min(timeit.repeat(lambda merge=merge: merge(start), number=1, repeat=7))
        best = search(lambda a, merge=merge: loss(merge, a, x_search, y_search), start, seed, budget)
        found[name] = loss(merge, best, x_held, y_held)
        found[f"sum |a|, {name}"] = float(np.abs(best).sum())
        found[f"apart, {name}"] = _apart(ways["factors"](best), ways["products"](best))
    return found


def _apart(one: Weights, other: Weights) -> float:
    """‖factors' ΔW - products' ΔW‖ / ‖products' ΔW‖ over all layers."""
    deltas = [
        [w[f"{layer}.lora_B.weight"] @ w[f"{layer}.lora_A.weight"] for layer in range(len(WIDTHS) - 1)]
        for w in (one, other)
    ]
    squares = [sum(float(part.square().sum()) for part in parts) for parts in
               ([a - b for a, b in zip(*deltas, strict=True)], deltas[1])]  # fmt: skip
    return (squares[0] / squares[1]) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget", type=int, default=150)
    arguments = parser.parse_args()
    results = {}
    for step_size in STEP_SIZES:
        rows = []
        for seed in range(arguments.seeds):
            with tempfile.TemporaryDirectory() as folder:
                rows.append(one_seed(seed, step_size, arguments.budget, Path(folder)))
        each = {name: [row[name] for row in rows] for name in rows[0]}
        results[f"step size {step_size}"] = {
            name: [round(statistics.fmean(values), 5), round(statistics.stdev(values), 5)]
            for name, values in each.items()
        }
        for name, (mean, deviation) in results[f"step size {step_size}"].items():
            print(f"{step_size}  {name:30s} {mean:8.4f} ± {deviation:.4f}", flush=True)
    print(write_json("lora", {**vars(arguments), "mean_and_spread": results}))


if __name__ == "__main__":
    main()
