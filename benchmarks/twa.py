"""Trainable Weight Averaging (TWA) against searches, on checkpoints of the classifier of ``studies/any_weights``.

    python benchmarks/twa.py [--seeds 5] [--evaluations 100] [--way WORD]

TWA (Li et al. 2023, arXiv 2205.13104) moves a network in the span of its checkpoints by SGD on a loss of single images.
Here it is as in the authors' code (github.com/nblt/TWA): an orthonormal basis of the checkpoints, from their average,
momentum 0.9, weight decay 1e-5, batches of 128, a rate that falls to a tenth after a half and after three quarters. The
sum of the coefficients is free. It takes as many images as ``LCSCGradient`` in its evaluations of 1,000. The rate is
one of 0.02, 0.2 and 2 (theirs for CIFAR), the one with the lowest loss on selection data. It sees the data of the
training, as theirs, or the data that searches see.

Each seed is a training of its own (about a minute), in ``results/any_weights/``. Results that are already in
``results/twa.csv`` are not measured again. Answers are reported on data that decided nothing.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import any_weights
import torch
from common import markdown, measure_missing, parse, read_csv
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

EXAMPLE = "characters"
SEARCHES = (any_weights.LAST, "EMAGrid", "Grid, extrapolated", "LCSCGradient")
TWA = {"TWA, training data": "train", "TWA, search data": "search"}
RATES = (0.02, 0.2, 2.0)
MOMENTUM, WEIGHT_DECAY, BATCH = 0.9, 1e-5, 128
IMAGES_PER_EVALUATION = 1000
REPORTED = 10_000


def main() -> None:
    """Measure what is missing, and print the table."""
    word = {"default": "", "help": "only ways whose name contains this"}
    arguments = parse(__doc__, seeds=5, evaluations=100, way=word)
    keys = [
        (way, seed, arguments.evaluations)
        for seed in range(arguments.seeds)
        for way in (*SEARCHES, *TWA)
        if arguments.way in way
    ]
    measure_missing(
        "twa", keys, measured, named=("way", "seed", "budget"), metrics=("cross-entropy", "accuracy", "rate")
    )
    against_ema()


def against_ema() -> None:
    """Print how much lower the cross-entropy is than EMA*'s of the same training."""
    losses = {(way, seed): float(loss) for way, seed, _, loss, *_ in read_csv("twa")}
    table = [["way", "EMA*'s cross-entropy minus its own: mean over trainings, range"]]
    for way in dict.fromkeys(way for way, _ in losses):
        gains = []
        for (other_way, seed), loss in losses.items():
            if other_way == way and ("EMAGrid", seed) in losses:
                gains.append(losses["EMAGrid", seed] - loss)
        if gains:
            table.append([way, f"{sum(gains) / len(gains):+.4f} ({min(gains):+.4f} to {max(gains):+.4f})"])
    print(*markdown(table), sep="\n")


def measured(way: str, seed: int, budget: int) -> tuple[float, float, float]:
    """Held-out cross-entropy and accuracy, and the rate of TWA that was chosen, else zero."""
    if way in TWA:
        return trained(TWA[way], seed, budget)
    loss, accuracy, _ = any_weights.measured(EXAMPLE, way, seed, 0 if way == any_weights.LAST else budget)
    return loss, accuracy, 0.0


def trained(group: str, seed: int, budget: int) -> tuple[float, float, float]:
    """TWA on the images of a group: the best rate on selection data, reported on held-out data."""
    characters = importlib.import_module(EXAMPLE)  # in the folder of the examples

    folder = any_weights.KEPT / f"{EXAMPLE}-{seed}"
    if not folder.exists():
        script = [sys.executable, f"{EXAMPLE}.py", "--folder", str(folder), "--seed", str(seed)]
        subprocess.run(script, check=True, stdout=subprocess.DEVNULL)
    model = characters.build()
    checkpoints = [torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pt"))]
    images, labels = characters.pool(group)
    candidates = []
    for rate in RATES:
        subspace = Subspace(model, checkpoints)
        subspace.train(images, labels, rate=rate, count=budget * IMAGES_PER_EVALUATION, seed=seed)
        loss, _ = scores(subspace, *characters.drawn("selection", 0, REPORTED))
        candidates.append((loss, rate, subspace))
    _, rate, best = min(candidates, key=lambda candidate: candidate[0])
    loss, accuracy = scores(best, *characters.drawn("held-out", 0, REPORTED))
    return loss, accuracy, rate


class Subspace:
    """A network in the span of its checkpoints; at first their average.

    Args:
        model: the network.
        checkpoints: its state dicts, of parameters only.
    """

    def __init__(self, model: nn.Module, checkpoints: list[dict[str, Tensor]]) -> None:
        self._model = model
        self._shapes = {name: value.shape for name, value in checkpoints[0].items()}
        rows = torch.stack([torch.cat([value.flatten() for value in weights.values()]) for weights in checkpoints])
        basis, _ = torch.linalg.qr(rows.double().T)
        self._basis = basis.T.float()  # [K, P], orthonormal
        self.position = nn.Parameter(self._basis @ rows.mean(dim=0))  # [K]

    def logits(self, images: Tensor) -> Tensor:
        """``[N, classes]``."""
        flat = self.position @ self._basis
        weights = {}
        start = 0
        for name, shape in self._shapes.items():
            weights[name] = flat[start : start + shape.numel()].view(shape)
            start += shape.numel()
        logits: Tensor = functional_call(self._model, weights, (images,))
        return logits

    def train(self, images: Tensor, labels: Tensor, *, rate: float, count: int, seed: int) -> None:
        """SGD in the subspace, on ``count`` images in random order.

        In an orthonormal basis, the gradient in the position is the projected gradient of all weights, and momentum and
        weight decay are the same in both.
        """
        steps = count // BATCH
        optimizer = torch.optim.SGD([self.position], lr=rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [steps // 2, 3 * steps // 4])
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            batch = torch.randint(len(labels), (BATCH,), generator=generator)
            loss: Any = F.cross_entropy(self.logits(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def scores(subspace: Subspace, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Cross-entropy and accuracy; an infinite loss where the training diverged."""
    logits: Any = subspace.logits(images)
    loss = float(F.cross_entropy(logits, labels))
    accuracy = float((logits.argmax(1) == labels).double().mean())
    return (loss if loss == loss else float("inf")), accuracy


if __name__ == "__main__":
    any_weights.KEPT.mkdir(parents=True, exist_ok=True)
    os.chdir(Path(any_weights.EXAMPLES))  # where the objective's functions are looked for
    sys.path.insert(0, str(any_weights.EXAMPLES))
    main()
