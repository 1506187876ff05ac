"""Few real images: is the answer as good as the best check of its search? And what a budget of seconds is spent on.

    python benchmarks/few_images.py [--quick] [--seeds 3] [--budget 200] [--seconds 60]

The flow of ``clipping.py`` is trained on 1,200 digits in 1,500 steps, with fifty checkpoints. ``LCSCGradient`` searches
it by ``loss: fdr``, a row of coefficients for each layer, against 60 or 120 further digits; 397 others are held out, of
which one half stops the search and chooses the answer. Every check of the search, the answer, and what the answer was
before it was chosen (the check with the lowest searched loss) are measured here against the other half, on noise that
nothing has seen: by the loss, and by FID alone. The best check is the one with the lowest of these very numbers, so no
choice can reach 1 every time.

Then the first of the trainings is searched with a budget of seconds. Each seed is a training of its own. Without
``--quick``, the tables are written to ``results/few_images.md``.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from clipping import Loop, Net, Trained, flow_loss, sample, write_reference
from common import RESULTS, machine, markdown, parse

import lcsc_opt
from lcsc_opt.base.records import Candidate, Coefficients, Noise, Yardstick
from lcsc_opt.experiment.result import Result
from lcsc_opt.metrics.bundled_images import bundled_images
from lcsc_opt.objective.contract import Objective

COUNTS = (60, 120)
TRAINED_ON = 1200
HELD_OUT_FROM = 1400  # the images before are those that are searched with
SAMPLES = 5000
NOISE = Noise("held-out", 7)  # reports use that of seed 0
TRAIN = Loop(Net, sample, flow_loss, steps=1500, every=30, batch=64)


def search(training: Trained, folder: Path, count: int, budget: int | str) -> Result:
    """The tool's search with ``count`` real images, in a database of its own."""
    images, _ = bundled_images("digits")
    searched, held_out = folder / str(count), folder / "held_out"
    write_reference(images[TRAINED_ON : TRAINED_ON + count], searched, count=count)
    write_reference(images[HELD_OUT_FROM:], held_out, count=len(images) - HELD_OUT_FROM)
    return lcsc_opt.search(
        training.checkpoints,
        build=training.build,
        sample=training.sample,
        reference={"train": str(searched), "held_out": str(held_out)},
        image_shape=(1, 8, 8),
        rows="layers",
        loss="fdr@digits",
        images=500,
        budget=budget,
        held_out=2000,
        storage=None,
    )


def yardstick_of(objective: Objective) -> Yardstick:
    """What the losses of :func:`held_out` are relative to."""
    assert objective.fixed_average is not None
    return objective.yardstick(objective.evaluate(Candidate(objective.fixed_average, images=SAMPLES, noise=NOISE)))


def held_out(objective: Objective, yardstick: Yardstick, coefficients: Coefficients) -> tuple[float, float]:
    """The loss and FID, against the half of the held-out images that reports use."""
    candidate = Candidate(np.asarray(coefficients), images=SAMPLES, noise=NOISE, yardstick=yardstick)
    measured = objective.evaluate(candidate)
    assert measured.unseen is not None
    return measured.unseen, measured.metrics["fid_held_out@digits"]


def name_of_answer(result: Result) -> str:
    """As ``LCSCGradient, trial 38``."""
    return str(result.compare()[-1]["model"])


def ratios(result: Result) -> tuple[int, list[float]]:
    """The number of checks; then by the loss, and by FID, how many times the best check the answer is and what it was.

    What it was is the check with the lowest searched loss.
    """
    *_, study = result.studies
    checks = [trial for trial in study.trials if trial["state"] == "COMPLETE"]
    lowest_loss = min(range(len(checks)), key=lambda index: checks[index]["loss"])
    yardstick = yardstick_of(study.objective)
    of_checks = [held_out(study.objective, yardstick, trial["coefficients"]) for trial in checks]
    of_answer = held_out(study.objective, yardstick, result.coefficients)
    divided = []
    for answer, values in zip(of_answer, zip(*of_checks, strict=True), strict=True):
        divided += [answer / min(values), values[lowest_loss] / min(values)]
    return len(checks), divided


def compare(trainings: list[Trained], folder: Path, budget: int) -> list[list[str]]:
    """A line for each number of real images and training."""
    columns = ("loss: answer ÷ best check", "lowest searched loss ÷ best", "FID: answer ÷ best", "lowest ÷ best")
    table = [["real images", "seed", "checks", "the answer", *columns]]
    all_ratios = []
    for count in COUNTS:
        for seed, training in enumerate(trainings):
            result = search(training, folder, count, budget)
            checks, divided = ratios(result)
            all_ratios.append(divided)
            table.append([str(count), str(seed), str(checks), name_of_answer(result), *map("{:.3f}".format, divided)])
            print(*table[-1], file=sys.stderr, flush=True)
    for name, of in (("mean", statistics.fmean), ("worst", max)):
        table.append([name, "", "", "", *(f"{of(column):.3f}" for column in zip(*all_ratios, strict=True))])
    return table


def seconds_spent(training: Trained, folder: Path, budget: int) -> list[list[str]]:
    """What the seconds of a budget were spent on: evaluations of the grid and of the search, and the whole call."""
    start = time.perf_counter()
    result = search(training, folder, COUNTS[-1], f"{budget} s")
    whole = time.perf_counter() - start
    table = [["", "evaluations", "seconds in them"]]
    for study in result.studies:
        trials: list[dict[str, Any]] = [trial for trial in study.trials if trial["seconds"] is not None]
        seconds = sum(trial["seconds"] for trial in trials)
        table.append([study.name.split("/")[1], str(len(trials)), f"{seconds:.1f}"])
    return [*table, ["the whole call, with reports", "", f"{whole:.1f}"]]


def main() -> None:
    """Train, search, and write the tables."""
    small = {"seeds": 1, "budget": 20, "seconds": 5}
    arguments = parse(__doc__, small=small, seeds=3, budget=200, seconds=60)
    images = bundled_images("digits")[0][:TRAINED_ON]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trainings = [TRAIN(images, folder, seed) for seed in range(arguments.seeds)]
        few = compare(trainings, folder, arguments.budget)
        spent = seconds_spent(trainings[0], folder, arguments.seconds)
    lines = [
        "# Few real images",
        "",
        machine(),
        "",
        f"`benchmarks/few_images.py`, {arguments.budget} evaluations of 500 images. Loss and FID against",
        "digits that neither training, search nor choice saw.",
        "",
        *markdown(few),
        "",
        f"{arguments.seconds} s for each search, 120 real images; the search ends earlier where no step gains:",
        "",
        *markdown(spent),
    ]
    print(*lines, sep="\n")
    if not arguments.quick:
        (RESULTS / "few_images.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
