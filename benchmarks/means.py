"""Few rows in place of many checkpoints: plain ones and interval means, with the same bytes on the disk.

    python benchmarks/means.py [--seeds 3] [--trainings 3] [--only WORD] [--classifier]
    python benchmarks/means.py --tables | --averages | --figure

The trainings are those of ``rows.py``: digits (a consistency model in one step), DDPM in six steps, and photographs.
``32 checkpoints`` are evenly spaced among all, with the last one; ``32 means`` are 31 uniform means of all checkpoints
and the last one. Searches by ``LCSCGradient`` see half A of the real images through one network; no search saw half B.
Searches of layers have the step of a new study. Those named ``step 0.1`` are of before, when it was not longer for
fewer than 32 rows. With ``keep``, the precision of EMA* of all checkpoints is the bound, whatever rows are searched.
``--classifier`` searches the classifier of ``studies/any_weights`` by its cross-entropy in place of FID; it is trained
with a checkpoint every 10 steps, and the results are in ``results/means_classifier.csv``.
Results that are already in ``results/means.csv`` are not measured again, and those that decide come first. ``--tables``
only prints what is known. ``--averages`` writes to ``results/means_averages.csv`` how far EMAs of few rows are from the
EMA of all checkpoints, relative to the distance of the last checkpoint from it, for the first training of digits.
``--figure`` draws FID B against megabytes, of what is known by now, into ``docs/images/few_rows.png``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import any_weights
import numpy as np
import plotly.graph_objects as go
import torch
from common import machine, markdown, measure_missing, parse, read_csv, write_csv
from fidelity import REPORTED, answer_of, objective_of
from rows import DDPM, DIGITS, PHOTOGRAPHS, metrics_of
from torch import Tensor

import lcsc_opt
from lcsc_opt.base.paths import cache_directory
from lcsc_opt.base.records import HELD_OUT, Candidate
from lcsc_opt.coefficients.profiles import ema_coefficients, window_ema_rates
from lcsc_opt.metrics.bundled_images import Bundled
from lcsc_opt.optimizers.gradient import MANY_CHECKPOINTS, STEP_WITH_FEW_CHECKPOINTS
from lcsc_opt.trajectory import Trajectory, pack
from lcsc_opt.views.figures.theme import figure_layout, style
from lcsc_opt.views.figures.writing import write_figures

DOCS = Path(__file__).parents[1] / "docs"
ALL = "all"
NAMED = ("model", "training", "rows", "coefficients", "seed", "images")
METRICS = ("fid A", "fid B", "precision A", "recall A")
COLUMNS = (*METRICS, "megabytes")
KEEP = ", keep"
FIRST = ("32 means", "32 checkpoints", ALL, "16 means", "16 checkpoints")  # of every model, before the others
OTHERS = tuple(f"{count} {kind}" for count in (8, 64, 4) for kind in ("means", "checkpoints"))
ORDER = (
    ("layers", FIRST),
    ("layers" + KEEP, FIRST),
    ("one row", FIRST),
    ("layers", OTHERS),
    ("one row", OTHERS),
    ("layers" + KEEP, OTHERS),
)
CLASSIFIER = "characters"
CLASSIFIER_EVALUATIONS = 100
MOST_FID, GOAL = 1.03, "required: FID B of 32 rows at most 1.03 of that of all, and no lower precision"


@dataclasses.dataclass(frozen=True)
class Model:
    """A model that is trained several times, and how it is searched."""

    file: str
    settings: Mapping[str, Any]
    images: int
    dataset: Bundled = "digits"
    selected: int = 10_000


MODELS = {
    "digits": Model("digits.py", DIGITS, 20_000),
    "DDPM, 6 steps": Model("digits_ddpm.py", {**DDPM, "nfe": 6}, 8_000, selected=3_000),
    "photographs": Model("photographs.py", PHOTOGRAPHS, 10_000, dataset="photographs", selected=3_000),
}
Key = tuple[str, int, str, str, int, int]


def main() -> None:
    """Measure what is missing, and print the tables."""
    arguments = parse(
        __doc__,
        seeds=3,
        trainings=3,
        only={"default": "", "help": "only searches whose MODEL, TRAINING: ROWS, COEFFICIENTS contains this"},
        tables={"action": "store_true", "help": "measure nothing"},
        averages={"action": "store_true", "help": "search nothing"},
        classifier={"action": "store_true", "help": "search the classifier, and nothing else"},
        figure={"action": "store_true", "help": "draw what is known"},
    )
    if arguments.averages:
        write_averages()
        return
    if arguments.figure:
        print(*write_figures({DOCS / "images" / "few_rows.png": figure(known_results())}), sep="\n")
        return
    if arguments.classifier:
        measure_classifier(arguments.trainings)
        return
    keys = []
    for model, training, rows, coefficients, seed, images in ordered(arguments.seeds, arguments.trainings):
        if arguments.only in f"{model}, {training}: {rows}, {coefficients}":
            keys.append((model, training, rows, coefficients, seed, images))
    if not arguments.tables:
        measure_missing("means", keys, measured, named=NAMED, metrics=COLUMNS)
    print(machine())
    print_pairs()


def ordered(seeds: int, trainings: int) -> Iterator[Key]:
    """All searches, the ones that decide first: layers before one row, 32 and 16 rows before the others."""
    for coefficients, kept in ORDER:
        for name, model in MODELS.items():
            for seed in range(seeds):
                for training in range(trainings):
                    yield from ((name, training, rows, coefficients, seed, model.images) for rows in kept)


def measured(name: str, training: int, rows: str, coefficients: str, seed: int, images: int) -> list[float]:
    """The metrics of one answer, and the megabytes of the rows."""
    model = MODELS[name]
    settings = {**model.settings, "training_seed": training}
    if coefficients.endswith(KEEP):
        settings["keep"] = "precision"
    objective = objective_of(model.file, **settings)
    trajectory = kept_rows(objective.trajectory, rows)
    objective.trajectory = trajectory
    if coefficients.startswith("layers"):
        objective.merge_in_rows("layers")
    options = {}
    if coefficients.startswith("layers") and len(trajectory.steps) < MANY_CHECKPOINTS:
        options["step_size"] = STEP_WITH_FEW_CHECKPOINTS
    answer = answer_of(
        objective,
        "LCSCGradient",
        seed,
        images,
        selected_on=model.selected,
        bounded_by=objective_of(model.file, **settings),
        options=options,
    )
    sampled = objective.images(np.asarray(answer), HELD_OUT, REPORTED)
    return [*metrics_of(sampled, METRICS, model.dataset), trajectory.nbytes / 1e6]


def kept_rows(trajectory: Any, rows: str) -> Trajectory:
    """``all``, ``32 checkpoints`` or ``32 means`` of a trajectory; means are packed once, in the cache."""
    assert isinstance(trajectory, Trajectory)
    if rows == ALL:
        return trajectory
    number, _, kind = rows.partition(" ")
    count = int(number)
    if kind == "checkpoints":
        last = len(trajectory) - 1
        positions = [last - round(last * place / count) for place in reversed(range(count))]
        return Trajectory.open(trajectory.path, steps=[trajectory.steps[position] for position in positions])
    path = cache_directory() / "means" / f"{trajectory.path.stem}-{count}.trajectory"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        pack(trajectory.path, path, means=count - 1)
    return Trajectory.open(path)


def measure_classifier(trainings: int) -> None:
    """Search the checkpoints and the rows of each training of the classifier, and print what few rows cost."""
    any_weights.KEPT.mkdir(parents=True, exist_ok=True)
    os.chdir(any_weights.EXAMPLES)  # where the objective's functions are looked for
    sys.path.insert(0, str(any_weights.EXAMPLES))
    keys: list[tuple[str, str, int]] = []
    for training in range(trainings):
        keys += [(ALL, "EMA*", training), (ALL, "one row", training)]
        keys += [(rows, "layers", training) for rows in (*FIRST, *OTHERS)]
        keys += [("32 means", "one row", training), ("16 means", "one row", training)]
    named = ("rows", "coefficients", "seed")
    measure_missing(
        "means_classifier",
        keys,
        measured_classifier,
        named=named,
        metrics=("cross-entropy", "accuracy", "megabytes"),
    )
    losses = {(rows, way, seed): float(loss) for rows, way, seed, loss, *_ in read_csv("means_classifier")}
    table = [["rows", "coefficients", "cross-entropy / that of all with layers: mean over trainings, range"]]
    for rows, way in dict.fromkeys(key[:2] for key in losses):
        ratios = []
        for (other_rows, other_way, seed), loss in losses.items():
            if (other_rows, other_way) == (rows, way) and (ALL, "layers", seed) in losses:
                ratios.append(loss / losses[ALL, "layers", seed])
        table.append([rows, way, f"{statistics.fmean(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"])
    print(*markdown(table), sep="\n")


def measured_classifier(rows: str, coefficients: str, training: int) -> tuple[float, float, float]:
    """Held-out cross-entropy and accuracy of an answer, and the megabytes of the rows."""
    characters = importlib.import_module(CLASSIFIER)
    folder = any_weights.KEPT / f"{CLASSIFIER}-dense-{training}"
    packed = folder.with_suffix(".trajectory")
    if not packed.exists():
        with contextlib.redirect_stdout(None):
            characters.train(folder, every=10, seed=training)
        pack(folder, packed)
    trajectory = kept_rows(Trajectory.open(packed), rows)
    specification = any_weights.specification(CLASSIFIER, training)
    settings = specification["objective"]["settings"]
    settings["checkpoints"] = str(trajectory.path)
    if rows.endswith("checkpoints"):
        settings["checkpoints"] = [str(folder / f"step_{step:06}.pt") for step in trajectory.steps]
    optimizer = "LCSCGradient"
    if coefficients == "EMA*":
        optimizer = "EMAGrid"
    specification["budget"] = {"evaluations": CLASSIFIER_EVALUATIONS}
    name = f"{CLASSIFIER}-{training}-{rows}-{coefficients}"
    specification["name"] = name.replace(" ", "-").removesuffix("*")
    specification["space"] = {}
    if coefficients == "layers":
        specification["space"] = {"rows": "layers"}
    (study,) = lcsc_opt.run(specification, optimizers=[optimizer], seeds=[training])
    held_out = Candidate(study.coefficients, images=specification["held_out"]["images"], noise=HELD_OUT)
    metrics = study.objective.evaluate(held_out).metrics
    return metrics["cross-entropy"], metrics["accuracy"], trajectory.nbytes / 1e6


def write_averages() -> None:
    """EMAs of 16 and 32 rows against those of all checkpoints, for the rates of the window."""
    model = MODELS["digits"]
    trajectory = objective_of(model.file, **model.settings).trajectory
    rates = window_ema_rates(trajectory.steps)
    last = _vector(trajectory.merge(np.eye(len(trajectory.steps))[-1]))
    table = []
    for rows in ("32 means", "32 checkpoints", "16 means", "16 checkpoints"):
        kept = kept_rows(trajectory, rows)
        for rate in rates:
            exact = _vector(trajectory.merge(ema_coefficients(trajectory.steps, rate)))
            distance = (_vector(kept.merge(ema_coefficients(kept.steps, rate))) - exact).norm()
            table.append([rows, f"{rate:.5f}", f"{float(distance / (last - exact).norm()):.4f}"])
    header = ["rows", "rate", "distance"]
    print(write_csv("means_averages", header, table))
    print(*markdown([header, *table]), sep="\n")


def _vector(weights: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in weights.values() if tensor.is_floating_point()])


def print_pairs() -> None:
    """For each model and number of rows: means against checkpoints of the same training and seed, and against all."""
    known = known_results()
    header = ["model", "coefficients", "rows", "pairs", "FID B lower", "precision higher", "FID B / all", "precision"]
    groups = dict.fromkeys((key[0], key[3], key[2]) for key in known if key[2] != ALL)
    table = [[*header, "precision of all"], *(_pairs(known, *group) for group in groups)]
    print(GOAL)
    print(*markdown(table), sep="\n")


def known_results() -> dict[Key, dict[str, float]]:
    """What ``results/means.csv`` has: a search → its metrics, and the megabytes of its rows."""
    known: dict[Key, dict[str, float]] = {}
    for model, training, rows, coefficients, seed, images, *values in read_csv("means"):
        key = (model, int(training), rows, coefficients, int(seed), int(images))
        known[key] = dict(zip(COLUMNS, map(float, values), strict=True))
    return known


def figure(known: Mapping[Key, Mapping[str, float]], model: str = "digits") -> go.Figure:
    """FID B against rows and megabytes: a line for means and one for checkpoints, with layers and with one row."""
    drawn = go.Figure(layout=figure_layout("light", view="few rows", height=420))
    for coefficients, colour in (("layers", style("LCSCGradient").colour), ("one row", style("LCSC").colour)):
        for kind, dash in (("means", "solid"), ("checkpoints", "dot")):
            points = _points(known, model, coefficients, kind)
            if len(points) < 2:
                continue
            megabytes, means, deviations = zip(*points, strict=True)
            drawn.add_scatter(
                x=megabytes,
                y=means,
                error_y={"array": deviations, "thickness": 1},
                name=f"{coefficients}, {kind}",
                line={"color": colour, "dash": dash, "width": 2.5},
                marker={"size": 8},
            )
    sizes = {values["megabytes"]: key[2].partition(" ")[0] for key, values in known.items() if key[0] == model}
    ticks = [f"{rows}<br>{megabytes:.3g} MB" for megabytes, rows in sizes.items()]
    drawn.update_xaxes(title_text="rows kept", type="log", tickvals=list(sizes), ticktext=ticks)
    drawn.update_yaxes(title_text="FID on images that no search saw", rangemode="tozero")
    return drawn


def _points(
    known: Mapping[Key, Mapping[str, float]], model: str, coefficients: str, kind: str
) -> list[tuple[float, float, float]]:
    """Megabytes, and the mean and the deviation of FID B over trainings; of each training, the mean over its seeds."""
    by_size: dict[float, dict[int, list[float]]] = {}
    for (name, training, rows, space, _, _), values in known.items():
        if (name, space) == (model, coefficients) and (rows == ALL or rows.endswith(kind)):
            by_training = by_size.setdefault(values["megabytes"], {})
            by_training.setdefault(training, []).append(values["fid B"])
    points = []
    for megabytes, by_training in sorted(by_size.items()):
        of_trainings = [statistics.fmean(values) for values in by_training.values()]
        points.append((megabytes, statistics.fmean(of_trainings), statistics.pstdev(of_trainings)))
    return points


def _pairs(known: Mapping[Key, Mapping[str, float]], model: str, coefficients: str, rows: str) -> list[str]:
    own = {key: values for key, values in known.items() if (key[0], key[3], key[2]) == (model, coefficients, rows)}
    number, _, kind = rows.partition(" ")
    other = f"{number} checkpoints" if kind == "means" else f"{number} means"
    pairs = _beside(known, own, other)
    with_all = _beside(known, own, ALL)
    lower = sum(mine["fid B"] < theirs["fid B"] for mine, theirs in pairs)
    higher = sum(mine["precision A"] > theirs["precision A"] for mine, theirs in pairs)
    cells = [model, coefficients, rows, str(len(pairs)), f"{lower} of {len(pairs)}", f"{higher} of {len(pairs)}"]
    if not with_all:
        return [*cells, "", "", ""]
    ratio = statistics.fmean(mine["fid B"] / of_all["fid B"] for mine, of_all in with_all)
    precision = statistics.fmean(mine["precision A"] for mine, _ in with_all)
    precision_of_all = statistics.fmean(of_all["precision A"] for _, of_all in with_all)
    verdict = "" if ratio > MOST_FID or precision < precision_of_all else " ✓"
    return [*cells, f"{ratio:.3f}{verdict}", f"{precision:.3f}", f"{precision_of_all:.3f}"]


def _beside(
    known: Mapping[Key, Mapping[str, float]], own: Mapping[Key, Mapping[str, float]], rows: str
) -> Sequence[tuple[Mapping[str, float], Mapping[str, float]]]:
    """Each result with that of the same training and seed with other ``rows``, where both are known."""
    pairs = []
    for key, values in own.items():
        there = known.get((*key[:2], rows, *key[3:]))
        if there is not None:
            pairs.append((values, there))
    return pairs


if __name__ == "__main__":
    main()
