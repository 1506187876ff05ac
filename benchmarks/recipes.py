"""Every recipe of ``lcsc train`` on digits: EMA* FID, samples, and what our loop costs against a plain one.

    OMP_NUM_THREADS=1 python benchmarks/recipes.py [--steps 1000] [--recipes ddpm edm ...] [--costs] [--quick]

Each recipe trains as ``lcsc train RECIPE --data digits`` does, with its defaults; ``cd`` distils the ``edm`` model and
``ect`` tunes it. EMA* is the best of the paper's EMA rates on 1,000 images. It and the last checkpoint are reported on
5,000 images of other noise, in the features of the digits objective. Consistency models are sampled in one step, the
others in ten. ``plain`` is the same loss, batches and optimizer in a loop of four lines, without Accelerate,
checkpoints, curve and state. Both loops take turns of 20 steps, and ours saves a checkpoint in each, as in the digits
study. Wall time is how long a user waits; other work on the machine affects CPU time less. ``--costs`` measures the
loops again, and keeps the FIDs.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import yaml
from common import RESULTS, machine, parse, write_json
from PIL import Image
from torch import nn

import lcsc_opt
from lcsc_opt.base.records import HELD_OUT, Candidate
from lcsc_opt.base.reproducibility import derive_seed
from lcsc_opt.base.study_file import ObjectiveSpec
from lcsc_opt.objective.loading import load_objective
from lcsc_opt.training import preparing, trainer
from lcsc_opt.training.data import as_floats
from lcsc_opt.training.recipes import RECIPES, Batch

TURN = 20  # steps; our loop then saves a checkpoint
EVERY = 5  # steps between checkpoints of a training
SIDE, ZOOM = 8, 4


def main() -> None:
    """Train, search EMA*, measure the loop, and write it all down."""
    arguments = _arguments()
    print(machine(), flush=True)
    rows = _known()
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.recipes:
            rows[name] = {**rows.get(name, {"recipe": name}), **measure(name, Path(folder), arguments)}
            print(json.dumps(rows[name]), flush=True)
            if not arguments.quick:
                write_json("recipes", {"rows": list(rows.values())})


def _known() -> dict[str, dict[str, Any]]:
    """Recipe → its row of an earlier run."""
    path = RESULTS / "recipes.json"
    return {row["recipe"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}


def _arguments() -> argparse.Namespace:
    arguments = parse(
        __doc__,
        steps={"type": int, "default": 1000, "help": "of training"},
        recipes={"nargs": "+", "choices": RECIPES, "default": ["edm", *(name for name in RECIPES if name != "edm")]},
        rounds={"type": int, "default": 30, "help": "turns of each loop"},
        images={"type": int, "default": 5000, "help": "of other noise"},
        costs={"action": "store_true", "help": "only the loops, after a short training"},
        small={"steps": 40, "rounds": 1, "images": 200},
    )
    if arguments.costs:
        arguments.steps = 2 * EVERY
    return arguments


def training(name: str, folder: Path, steps: int) -> trainer.Training:
    """What ``lcsc train NAME`` asks for."""
    edm = folder / "edm.model"
    return trainer.Training(
        recipe=RECIPES[name](),
        data="digits",
        out=folder / f"{name}.trajectory",
        steps=steps,
        checkpoint_every=EVERY,
        teacher=edm if name == "cd" else None,
        begin=edm if name == "ect" else None,
    )


def measure(name: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """FID, if the training is one that counts, and seconds a step."""
    made: list[Callable[..., trainer.Trainer]] = []

    def remembered(training: trainer.Training, network: nn.Module, images: torch.Tensor, **how: Any) -> trainer.Trainer:
        first = copy.deepcopy(network)

        def another(**changes: Any) -> trainer.Trainer:
            own = {**how, "accelerator": trainer.new_accelerator("fp32")}
            return trainer.Trainer(dataclasses.replace(training, **changes), copy.deepcopy(first), images, **own)

        made.append(another)
        return trainer.Trainer(training, network, images, **how)

    with mock.patch.object(preparing, "Trainer", remembered):
        study_file = preparing.run(training(name, folder, arguments.steps))
    assert study_file is not None  # there is only one process
    loops = costs(made[0], arguments.rounds)
    if arguments.costs:
        return loops
    trained = json.loads((folder / f"{name}.jsonl").read_text().splitlines()[-1])
    found = fid(name, study_file, arguments)
    return {"steps": arguments.steps, "training_seconds": trained["seconds"], **found, **loops}


def fid(name: str, study_file: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """EMA* and the last checkpoint on other noise, and a picture of samples of EMA*."""
    study = yaml.safe_load(study_file.read_text())
    study["held_out"] = {"images": arguments.images, "top": 1}
    study["storage"] = f"sqlite:///{study_file.with_suffix('.db')}"
    study_file.write_text(yaml.safe_dump(study))
    (best,) = lcsc_opt.run(study_file, optimizers=["EMAGrid"])
    assert best.held_out is not None
    objective: Any = load_objective(ObjectiveSpec(**study["objective"]), study_folder=study_file.parent)
    last = np.eye(len(objective.steps))[-1]
    candidate = Candidate(last, images=arguments.images, noise=HELD_OUT)
    after = objective.evaluate(candidate)
    if not arguments.quick:
        picture(objective.images(best.coefficients, HELD_OUT, SIDE * SIDE), RESULTS / "recipes" / f"{name}.png")
    return {
        "nfe": objective.sampler.nfe,
        "ema_star": round(float(best.held_out), 2),
        "last_checkpoint": round(float(after.loss), 2),
    }


def picture(images: torch.Tensor, path: Path) -> None:
    """``[64, 1, 8, 8]`` as a square of eight rows."""
    rows = images.reshape(SIDE, SIDE, *images.shape[2:]).permute(0, 2, 1, 3).reshape(SIDE * images.shape[2], -1)
    pixels = ((rows + 1) * 127.5).round().to(torch.uint8).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    shown = Image.fromarray(pixels)
    shown.resize((shown.width * ZOOM, shown.height * ZOOM), Image.Resampling.NEAREST).save(path, optimize=True)


def costs(make: Callable[..., trainer.Trainer], rounds: int) -> dict[str, Any]:
    """Milliseconds per step of both loops (medians of their turns), and the median of the rounds' ratios."""
    turns: dict[str, list[tuple[float, ...]]] = {"ours": [], "plain": []}
    with tempfile.TemporaryDirectory(dir=Path()) as folder:
        out, steps = Path(folder) / "turn.trajectory", TURN * (rounds + 1)
        ours, other = (make(out=out, steps=steps, checkpoint_every=TURN, samples_every=None) for _ in range(2))
        loops = {"ours": _ours(ours), "plain": _plain(other)}
        for turn in range(rounds + 1):  # the first one warms up
            for way in sorted(loops, reverse=turn % 2 == 0):
                start = _clocks()
                next(loops[way])
                each = tuple((after - before) / TURN for before, after in zip(start, _clocks(), strict=True))
                turns[way] += [each] * (turn > 0)
        loops["ours"].close()
    row: dict[str, Any] = {}
    for i, clock in enumerate(("wall", "cpu")):
        for way, measured in turns.items():
            row[f"{way}_{clock}_ms"] = round(statistics.median(turn[i] for turn in measured) * 1e3, 2)
        ratios = [ours[i] / plain[i] for ours, plain in zip(turns["ours"], turns["plain"], strict=True)]
        row[f"{clock}_ratio"] = round(statistics.median(ratios), 4)
        row[f"{clock}_ratios"] = [round(ratio, 3) for ratio in ratios]
    return row


def _ours(loop: trainer.Trainer) -> Generator[None]:
    """Our loop; stops after each turn, when the checkpoint of the turn is on the disk."""
    loop.restore_or_start(resume=False)
    try:
        for _ in loop.run():
            if loop.step % TURN == 0:
                loop.saver.flush()
                yield
    finally:
        loop.saver.close()


def _plain(made: trainer.Trainer) -> Generator[None]:
    """The plain loop with the parts of a trainer; stops after each turn."""
    network, recipe, steps = made.raw, made.training.recipe, made.training.steps
    average = made.average
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = getattr(torch.optim, recipe.optimizer)(trained, lr=recipe.learning_rate)
    generator = torch.Generator()
    for step in range(steps):
        generator.manual_seed(derive_seed(0, "training", step, 0))
        chosen = torch.randint(len(made.images), (recipe.batch_size,), generator=generator)
        batch = Batch(
            images=as_floats(made.images[chosen]),
            step=step,
            steps=steps,
            network=network,
            target=network if average is None else average,
            generator=generator,
            noise_scale=made.noise_scale,
            teacher=made.teacher,
        )
        loss = recipe.loss(batch)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        rate = recipe.target_rate(step, steps)
        if average is not None and rate is not None:
            with torch.no_grad():
                torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - rate)
        if (step + 1) % TURN == 0:
            yield


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


if __name__ == "__main__":
    main()
