"""``lcsc compare``, ``evaluate``, ``dashboard``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lcsc_opt.cli.output import STORAGE_HELP, Format, console, number, print_json, say, storage_url, table
from lcsc_opt.database import masked, open_storage
from lcsc_opt.study_store import StoredStudy

Storage = Annotated[str | None, typer.Option("--storage", help=STORAGE_HELP)]
Output = Annotated[Format, typer.Option("--format", help="A table for people, or JSON for programs.")]


def add_commands(app: typer.Typer) -> None:
    """Put this module's commands into the app."""
    for command in (compare, evaluate, dashboard):
        app.command()(command)


def compare(
    experiment: Annotated[str, typer.Argument(help="The name of a study file, such as digits.")],
    figures: Annotated[
        Path | None, typer.Option(help="Folder for the PNG figures; without it EXPERIMENT.figures/.")
    ] = None,
    storage: Storage = None,
    output: Output = Format.table,
) -> None:
    """Compare the optimizers of an experiment: a table over seeds, and figures."""
    from lcsc_opt.analysis.comparison import over_seeds, summaries
    from lcsc_opt.results import copy_image_pairs

    opened = open_storage(storage_url(storage), write=False)
    studies = summaries(opened, experiment)
    if output is Format.json:
        print_json([study.as_row() for study in studies])
        return
    shown = table(
        "optimizer",
        "seeds",
        "searched",
        "held-out",
        "against EMA*",
        "evaluations",
        "images",
        "seconds",
        title=experiment,
    )
    for row in over_seeds(studies):
        losses = [number(*(value or (None, None))) for value in (row.searched, row.held_out)]
        relative = "-" if row.below_ema is None else f"{100 * row.below_ema:+.1f} %"
        costs = [f"{row.evaluations:.0f}", f"{row.images:,.0f}", f"{row.seconds:.1f}"]
        shown.add_row(row.label, str(row.seeds), *losses, relative, *costs)
    console().print(shown)
    unfinished = [study.study for study in studies if study.state != "finished"]
    if unfinished:
        say(f"unfinished: {', '.join(unfinished)}")
    folder = figures or Path(f"{experiment}.figures")
    for path in [*_draw(studies, folder), *copy_image_pairs(opened, studies, folder)]:
        say(f"drawn: {path}")


def _draw(studies: Any, folder: Path) -> list[Path]:
    from lcsc_opt.analysis.comparison import best_ema
    from lcsc_opt.analysis.figures import draw_coefficients, draw_comparison, save

    complete = [study for study in studies if study.best_coefficients is not None]
    if not complete:
        return []
    ema = best_ema(complete)
    paths = [save(draw_comparison(complete), folder / "best_so_far.png")]
    searches = [study for study in complete if study.label == study.optimizer]
    for study in searches:
        name = f"coefficients-{study.optimizer}-{study.seed}.png"
        paths.append(save(draw_coefficients(study, ema), folder / name))
    return paths


def evaluate(
    study: Annotated[str, typer.Argument(help="experiment/optimizer/seed")],
    images: Annotated[
        int | None,
        typer.Option(
            min=2, help="For each trial and group; without it the study file's, else 50,000.", show_default=False
        ),
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(min=1, help="How many of the best trials to choose from; without it the study file's, else 5."),
    ] = None,
    groups: Annotated[int, typer.Option(min=1, help="Groups of held-out noise; several give a spread.")] = 1,
    first_group: Annotated[int, typer.Option(min=0, help="The seed of the first group; the others follow.")] = 0,
    storage: Storage = None,
    output: Output = Format.table,
) -> None:
    """Choose among the best trials on noise the search never saw; report that one, and EMA*, on yet other noise."""
    from lcsc_opt.experiment import Experiment
    from lcsc_opt.held_out import HeldOutPlan
    from lcsc_opt.plan import stored_plan

    opened = open_storage(storage_url(storage), write=True)
    stored = StoredStudy.open(opened, study)
    plan = stored_plan(stored)
    asked = HeldOutPlan.of(plan.held_out, images=images, top=top, groups=groups, first_group=first_group)
    with stored.hold():
        report = Experiment(opened, plan).evaluate(stored, asked)
    if output is Format.json:
        print_json(report)
        return
    _print_choice(stored, report)
    _print_held_out(stored, report)


def _print_choice(study: StoredStudy, report: dict[str, Any]) -> None:
    by_number = {trial.number: trial for trial in study.trials()}
    shown = table("trial", "searched", f"selection, {report['images']:,} images", "", title=study.name)
    for chosen in report["chosen_from"]:
        trial = by_number[chosen]
        mark = "chosen" if chosen == report["trial"] else ""
        shown.add_row(str(chosen), number(trial.value), number(trial.user_attrs["selection"]["loss"]), mark)
    console().print(shown)


def _print_held_out(study: StoredStudy, report: dict[str, Any]) -> None:
    """A line for the answer and for each baseline, a column for each metric."""
    metrics = list(report["metrics"])
    seeds = ", ".join(str(group["seed"]) for group in report["groups"])
    title = f"held out, {report['images']:,} images, noise group{'s' * (len(report['groups']) > 1)} {seeds}"
    shown = table("", "loss", *metrics, title=title)
    for name, result in {f"{study.name}, trial {report['trial']}": report, **report.get("baselines", {})}.items():
        spread = result.get("metrics_std", {})
        cells = [number(result["metrics"].get(metric), spread.get(metric)) for metric in metrics]
        label = f"{name}: {result['study']}, trial {result['trial']}" if "study" in result else name
        shown.add_row(label, number(result["loss"], result.get("loss_std")), *cells)
    console().print(shown)


def dashboard(
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8080,
    storage: Storage = None,
) -> None:
    """Open the study database in the browser, with optuna-dashboard, on this machine only."""
    from lcsc_opt.dashboard_server import serve

    url = storage_url(storage)
    opened = open_storage(url, write=False)
    say(f"http://127.0.0.1:{port}/ shows {masked(url)}; Ctrl-C ends it")
    serve(opened, port=port)
