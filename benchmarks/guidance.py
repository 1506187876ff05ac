"""Coefficients together with the scale of guidance, on class-conditional digits (DDPM and flow matching).

    python benchmarks/guidance.py [--seeds 2] [--trainings 3] [--only WORD] [--images 5000] [--tables]

DDPM is sampled in six steps, flow matching in three. ``EMA*`` is the best average of EMAGrid, with its best guidance,
and with each of the five values that the grid begins with. LCSCGradient searches a row of coefficients for each layer:
at one guidance after the other, at EMA*'s (``best``), and together with the guidance (``both``), from EMA*'s guidance
and from none. With ``keep``, the precision of EMA* at its best guidance, on 5,000 images of the search's noise, is the
bound of both kinds of searches. Searches see half A of the real images through one network. The answer of the five best
checks is chosen on 2,000 images of selection noise, and measured on 5,000 of held-out noise; no search saw half B.
Results that are already in ``results/guidance.csv`` are not measured again. ``results/guidance_averages.csv`` has the
FID of the running answer after every fourth trial, on the search's noise, which costs the search nothing. ``--tables``
only prints what is known, and draws ``docs/images/guidance.png``.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from common import cell, machine, markdown, measure_missing, parse, read_csv, write_csv
from fidelity import TOP, objective_of
from plotly.subplots import make_subplots
from rows import metrics_of

from lcsc_opt.base.records import HELD_OUT, SELECTION, Candidate, Constraint
from lcsc_opt.base.study_file import OptimizerSpec
from lcsc_opt.coefficients.layer_groups import Rule
from lcsc_opt.coefficients.profiles import default_origin
from lcsc_opt.coefficients.spaces import AffineSpace, CoefficientSpace
from lcsc_opt.coefficients.tuning import TunedNumber, TunedSpace
from lcsc_opt.objective.merge_sample_score import MergeSampleScore
from lcsc_opt.optimizers import build_optimizer
from lcsc_opt.optimizers.parametrization import attach_evaluation, candidate_of, request_of
from lcsc_opt.views.figures.writing import write_figures

SETTINGS: Mapping[str, Any] = {"training_steps": 1000, "checkpoint_every": 10, "images": 500}
NFE = {"ddpm": 6, "flow": 3}
RECIPES = tuple(NFE)
LOW = 0.0  # the range of guidance that is searched
HIGH = 4.0
GUIDANCES = ("0", "1", "2", "3", "4")  # EMAGrid begins with these in that range
SEARCHED_AT = ("1", "2", "3")  # where coefficients are searched
IMAGES = 5_000  # of a search
SELECTED = 2_000
REPORTED = 5_000
BOUND = 5_000
EVERY = 4  # steps between two losses of the running answer
EMA, FIXED, BOTH, FROM_NONE = "EMA*", "coefficients", "both", "both, from 1"
KEEP = ", keep"
BEST, SEARCHED = "best", "searched"
NAMED = ("recipe", "training", "way", "guidance", "seed", "images")
METRICS = ("fid A", "fid B", "precision A", "recall A")
COLUMNS = (*METRICS, "scale", "bound")
AVERAGES = ("recipe", "training", "way", "guidance", "seed", "trial", "fid")
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "guidance.png"
Key = tuple[str, int, str, str, int, int]


@dataclasses.dataclass(frozen=True)
class Check:
    """A trial whose loss compares with others."""

    loss: float
    candidate: Candidate


def main() -> None:
    """Measure what is missing, and print the tables."""
    arguments = parse(
        __doc__,
        seeds=2,
        trainings=3,
        only={"default": "", "help": "only searches whose RECIPE, TRAINING: WAY, GUIDANCE contains this"},
        images=IMAGES,
        tables={"action": "store_true", "help": "measure nothing"},
    )
    if not arguments.tables:
        keys = []
        for key in ordered(arguments.seeds, arguments.trainings, arguments.images):
            recipe, training, way, guidance, *_ = key
            if arguments.only in f"{recipe}, {training}: {way}, {guidance}":
                keys.append(key)
        measure_missing("guidance", keys, measured, named=NAMED, metrics=COLUMNS)
    print(machine())
    results = known()
    print_curves(results)
    print_figures(results)
    print_trials()
    if arguments.tables:
        draw(results)


def ordered(seeds: int, trainings: int, images: int) -> Iterator[Key]:
    """All searches; EMA* first, since its guidance and precision decide how others are searched."""
    models = [(recipe, training) for training in range(trainings) for recipe in RECIPES]
    for seed in range(seeds):
        for recipe, training in models:
            if seed == 0:
                yield recipe, training, EMA, SEARCHED, 0, 0
            yield recipe, training, BOTH + KEEP, SEARCHED, seed, images
            yield recipe, training, FIXED + KEEP, BEST, seed, images
    for recipe, training in models:
        yield from ((recipe, training, EMA, guidance, 0, 0) for guidance in GUIDANCES)
        yield from ((recipe, training, FIXED, guidance, 0, images) for guidance in SEARCHED_AT)
        for seed in range(seeds):
            yield recipe, training, BOTH, SEARCHED, seed, images
            yield recipe, training, FIXED, BEST, seed, images
            yield recipe, training, FROM_NONE, SEARCHED, seed, images


def measured(recipe: str, training: int, way: str, guidance: str, seed: int, images: int) -> list[float]:
    """The metrics of one answer, its guidance, and for EMA* with its best guidance the bound of ``keep``."""
    bound = np.nan
    if way == EMA:
        objective = objective_of_model(recipe, training)
        answer = ema_of(recipe, training, guidance)
        if guidance == SEARCHED:
            bound = bound_of(objective_of_model(recipe, training, keep="precision"), answer)
    else:
        answer, objective = search(recipe, training, way, guidance, seed, images)
    scale = answer.tuned.get("guidance", objective.tunable["guidance"].value)
    sampled = objective.images(answer.coefficients, HELD_OUT, REPORTED, tuned=answer.tuned)
    return [*metrics_of(sampled, METRICS), scale, bound]


def objective_of_model(recipe: str, training: int, *, rows: Rule | None = None, **settings: Any) -> MergeSampleScore:
    """The objective of one model, which sees half A."""
    model = {**SETTINGS, "recipe": recipe, "nfe": NFE[recipe], "training_seed": training}
    return objective_of("digits_classes.py", rows=rows, **model, **settings)


def bound_of(objective: MergeSampleScore, answer: Candidate) -> float:
    """The precision of EMA* with its best guidance, on the search's noise."""
    evaluation = objective.evaluate(dataclasses.replace(answer, images=BOUND))
    assert evaluation.constraint is not None
    return evaluation.constraint.value


def ema_of(recipe: str, training: int, guidance: str) -> Candidate:
    """The best average: with its best guidance, chosen as in a study; with one guidance, on the search's noise."""
    checks = averages_of(recipe, training)
    if guidance == SEARCHED:
        return chosen(objective_of_model(recipe, training), checks)
    at_guidance = [check for check in checks if abs(check.candidate.tuned["guidance"] - float(guidance)) < 1e-6]
    return min(at_guidance, key=lambda check: check.loss).candidate


@functools.cache
def averages_of(recipe: str, training: int) -> list[Check]:
    """All trials of EMAGrid."""
    objective = objective_of_model(recipe, training)
    numbers = (TunedNumber("guidance", LOW, HIGH, objective.tunable["guidance"].value),)
    space = TunedSpace(AffineSpace(objective.steps, default_origin(objective.steps)), numbers)
    asking: Any = build_optimizer(OptimizerSpec(name="EMAGrid"), space, budget=500, workers=1, seed=0)
    checks = []
    while not asking.finished:
        parameter = asking.ask()
        candidate = candidate_of(parameter)
        evaluation = objective.evaluate(candidate)
        asking.tell(parameter, evaluation.loss)
        checks.append(Check(evaluation.loss, candidate))
    return checks


def search(
    recipe: str, training: int, way: str, guidance: str, seed: int, images: int
) -> tuple[Candidate, MergeSampleScore]:
    """The answer of one search by LCSCGradient, and its objective."""
    ema = known()[recipe, training, EMA, SEARCHED, 0, 0]
    settings: dict[str, Any] = {"guidance": ema["scale"]}
    if way == FROM_NONE:
        settings["guidance"] = 1.0
    elif guidance not in (BEST, SEARCHED):
        settings["guidance"] = float(guidance)
    constraint = None
    if way.endswith(KEEP):
        settings["keep"] = {"precision": ema["bound"]}
    objective = objective_of_model(recipe, training, rows="layers", **settings)
    if way.endswith(KEEP):  # the penalty is scaled by the loss of an average
        constraint = objective.evaluate(Candidate(default_origin(objective.steps))).constraint
    origin = np.tile(default_origin(objective.steps), (len(objective.layer_groups or ()), 1))
    space: CoefficientSpace = AffineSpace(objective.steps, origin)
    if guidance == SEARCHED:
        space = TunedSpace(space, (TunedNumber("guidance", LOW, HIGH, settings["guidance"]),))
    checks, averages = searched(objective, space, seed, images, constraint)
    if guidance in (BEST, SEARCHED) and images == IMAGES:
        write_averages((recipe, training, way, guidance, seed), averages)
    return chosen(objective, checks, constraint), objective


def searched(
    objective: MergeSampleScore, space: CoefficientSpace, seed: int, images: int, constraint: Constraint | None
) -> tuple[list[Check], list[tuple[int, float]]]:
    """The trials whose losses compare; and number of trials and FID of the running answer, after every fourth trial."""
    per_evaluation = objective.images_per_evaluation
    spec = OptimizerSpec(name="LCSCGradient")
    asking: Any = build_optimizer(spec, space, budget=images // per_evaluation, workers=1, seed=seed)
    asking.plan_budget(evaluations=None, images=images, images_per_evaluation=per_evaluation)
    checks: list[Check] = []
    averages: list[tuple[int, float]] = []
    spent = 0
    while True:
        parameter = asking.ask()
        candidate = dataclasses.replace(candidate_of(parameter), constraint=constraint)
        request = request_of(parameter)
        spent += candidate.images or per_evaluation
        if spent > images:
            return checks, averages
        evaluation = objective.evaluate(candidate, gradient=request.gradient)
        attach_evaluation(parameter, evaluation)
        asking.tell(parameter, evaluation.loss)
        if request.compares(per_evaluation):
            checks.append(Check(evaluation.loss, candidate))
        if asking.num_tell % EVERY == 0:
            average = objective.evaluate(candidate_of(asking.recommend()))
            averages.append((asking.num_tell, average.metrics["fid"]))


def chosen(objective: MergeSampleScore, checks: Sequence[Check], constraint: Constraint | None = None) -> Candidate:
    """The one of the best few that is best on selection noise."""

    def selected(check: Check) -> float:
        candidate = dataclasses.replace(check.candidate, images=SELECTED, noise=SELECTION, constraint=constraint)
        return objective.evaluate(candidate).loss

    best = sorted(checks, key=lambda check: check.loss)[:TOP]
    return min(best, key=selected).candidate


def write_averages(search: tuple[Any, ...], averages: Sequence[tuple[int, float]]) -> None:
    """Add what one search gives to ``results/guidance_averages.csv``, in place of those of an earlier one."""
    named = [str(part) for part in search]
    rows = [row for row in read_csv("guidance_averages") if row[:5] != named]
    rows += [[*named, str(trial), f"{fid:.4f}"] for trial, fid in averages]
    write_csv("guidance_averages", AVERAGES, rows)


def known() -> dict[Key, dict[str, float]]:
    """Key → metrics of what was measured."""
    results: dict[Key, dict[str, float]] = {}
    for recipe, training, way, guidance, seed, images, *values in read_csv("guidance"):
        key = (recipe, int(training), way, guidance, int(seed), int(images))
        results[key] = dict(zip(COLUMNS, map(float, values), strict=True))
    return results


def print_curves(results: Mapping[Key, Mapping[str, float]]) -> None:
    """Means over trainings and seeds with their standard deviations."""
    groups: dict[tuple[str, str, str, int], list[Mapping[str, float]]] = {}
    for (recipe, _, way, guidance, _, images), values in results.items():
        groups.setdefault((recipe, way, guidance, images), []).append(values)
    table = [["recipe", "way", "guidance", "images", "searches", *METRICS, "scale"]]
    for recipe, way, guidance, images in sorted(groups):
        several = groups[recipe, way, guidance, images]
        metrics = [cell([values[name] for values in several]) for name in (*METRICS, "scale")]
        table.append([recipe, way, guidance, f"{images:,}", str(len(several)), *metrics])
    print(*markdown(table), sep="\n")


def print_figures(results: Mapping[Key, Mapping[str, float]]) -> None:
    """FID B of searches together with guidance, divided by that of others of the same training and seed."""
    table = [["recipe", "images", "FID B of", "divided by", "pairs", "ratio", "precision", "of the other"]]
    kinds = dict.fromkeys((key[0], key[5], key[2]) for key in results if key[2] in (BOTH + KEEP, BOTH))
    for recipe, images, way in sorted(kinds):
        end = way.removeprefix(BOTH)
        for other in ((EMA, SEARCHED), (FIXED + end, BEST)):
            pairs = pairs_of(results, recipe, way, images, other)
            if not pairs:
                continue
            ratios = [mine["fid B"] / theirs["fid B"] for mine, theirs in pairs]
            precisions = [cell([pair[place]["precision A"] for pair in pairs]) for place in (0, 1)]
            named = [recipe, f"{images:,}", way, " at ".join(other), str(len(pairs))]
            table.append([*named, cell(ratios), *precisions])
    print("required: 0.5 of EMA*'s and 0.95 of that of coefficients at EMA*'s best guidance, at equal precision")
    print(*markdown(table), sep="\n")


def pairs_of(
    results: Mapping[Key, Mapping[str, float]], recipe: str, way: str, images: int, other: tuple[str, str]
) -> list[tuple[Mapping[str, float], Mapping[str, float]]]:
    """Each result of a way, beside that of the other way with the same training, seed and number of images.

    EMA* is the same for all seeds and numbers of images.
    """
    pairs = []
    for (own_recipe, training, own_way, _, seed, own_images), values in results.items():
        if (own_recipe, own_way, own_images) != (recipe, way, images):
            continue
        search = (0, 0) if other[0] == EMA else (seed, images)
        theirs = results.get((recipe, training, *other, *search))
        if theirs is not None:
            pairs.append((values, theirs))
    return pairs


def print_trials() -> None:
    """Trials until the FID that both searches reach, of searches with and without a tuned number."""
    curves: dict[tuple[str, ...], list[tuple[int, float]]] = {}
    for recipe, training, way, guidance, seed, trial, fid in read_csv("guidance_averages"):
        curves.setdefault((recipe, training, seed, way, guidance), []).append((int(trial), float(fid)))
    table = [["recipe", "training", "seed", "way", "FID", "trials with tune", "without", "ratio"]]
    ratios = []
    for recipe, training, seed, way, _ in curves:
        if way not in (BOTH, BOTH + KEEP):
            continue
        end = way.removeprefix(BOTH)
        tuned = curves[recipe, training, seed, way, SEARCHED]
        fixed = curves.get((recipe, training, seed, FIXED + end, BEST))
        if fixed is None:
            continue
        reached = max(min(value for _, value in curve) for curve in (tuned, fixed))
        trials = [next(number for number, value in curve if value <= reached) for curve in (tuned, fixed)]
        ratios.append(trials[0] / trials[1])
        table.append([recipe, training, seed, way, f"{reached:.2f}", *map(str, trials), f"{ratios[-1]:.2f}"])
    if ratios:
        print(f"trials with tune against without, to the same FID: {cell(ratios)}; required 1.2")
        print(*markdown(table), sep="\n")


def draw(results: Mapping[Key, Mapping[str, float]]) -> None:
    """FID B and precision against guidance: a column for each recipe."""
    titles = [f"{recipe}, {NFE[recipe]} steps" for recipe in RECIPES]
    figure = make_subplots(2, len(RECIPES), shared_xaxes=True, column_titles=titles, vertical_spacing=0.06)
    for column, recipe in enumerate(RECIPES, start=1):
        for row, metric in enumerate(("fid B", "precision A"), start=1):
            for trace in traces(results, recipe, metric):
                trace.showlegend = (row, column) == (1, 1)
                figure.add_trace(trace, row, column)
    figure.update_xaxes(title_text="guidance", row=2)
    figure.update_yaxes(type="log", tickvals=[2, 5, 10, 20, 50, 100], row=1)
    figure.update_yaxes(title_text="FID to unseen images", row=1, col=1)
    figure.update_yaxes(title_text="precision", row=2, col=1)
    figure.update_layout(
        template="plotly_white",
        width=1000,
        height=620,
        margin={"t": 50},
        legend={"orientation": "h", "y": -0.15},
    )
    write_figures({PICTURE: figure})


def traces(results: Mapping[Key, Mapping[str, float]], recipe: str, metric: str) -> Iterator[go.Scatter]:
    """Means over trainings at each guidance as lines, and each search at or with the best guidance as a mark."""
    for way, label, color in ((EMA, "EMA*", "#888888"), (FIXED, "coefficients at this guidance", "#1f77b4")):
        points = [point(results, recipe, way, guidance, metric) for guidance in GUIDANCES]
        drawn = [each for each in points if each is not None]
        if drawn:
            places = [place for place, _ in drawn]
            means = [mean for _, mean in drawn]
            yield go.Scatter(x=places, y=means, name=label, mode="lines+markers", line={"color": color})
    at_best = "coefficients at EMA*'s guidance, keep"
    for way, label, color in ((FIXED + KEEP, at_best, "#0072B2"), (BOTH + KEEP, "both, keep", "#d62728")):
        marks = []
        for key, values in results.items():
            if (key[0], key[2], key[5]) == (recipe, way, IMAGES):
                marks.append(values)
        scales = [values["scale"] for values in marks]
        heights = [values[metric] for values in marks]
        marker = {"color": color, "symbol": "star", "size": 11}
        yield go.Scatter(x=scales, y=heights, name=label, mode="markers", marker=marker)


def point(
    results: Mapping[Key, Mapping[str, float]], recipe: str, way: str, guidance: str, metric: str
) -> tuple[float, float] | None:
    """Guidance and the mean of a metric over trainings; ``None`` if nothing was measured there."""
    several = []
    for key, values in results.items():
        if (key[0], key[2], key[3]) == (recipe, way, guidance) and key[5] in (0, IMAGES):
            several.append(values[metric])
    if not several:
        return None
    return float(guidance), statistics.fmean(several)


if __name__ == "__main__":
    main()
