"""``lcsc compare``, ``evaluate``, ``export``, ``dashboard``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lcsc_opt.cli.output import STORAGE_HELP, Format, console, number, print_json, say, storage_url, table
from lcsc_opt.database import masked, open_storage
from lcsc_opt.errors import StudyStoreError
from lcsc_opt.study_store import StoredStudy

Storage = Annotated[str | None, typer.Option("--storage", help=STORAGE_HELP)]
Output = Annotated[Format, typer.Option("--format", help="A table for people, or JSON for programs.")]


def add_commands(app: typer.Typer) -> None:
    """Put this module's commands into the app."""
    for command in (compare, evaluate, export, dashboard):
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
    images: Annotated[int, typer.Option(min=2, help="Images for each trial.")] = 10_000,
    top: Annotated[int, typer.Option(min=1, help="How many of the best trials to choose from.")] = 5,
    storage: Storage = None,
    output: Output = Format.table,
) -> None:
    """Score the best trials on noise that the search never saw, keep the best of them, report it on yet other noise."""
    from lcsc_opt.experiment import Experiment
    from lcsc_opt.plan import stored_plan

    opened = open_storage(storage_url(storage), write=True)
    stored = StoredStudy.open(opened, study)
    with stored.hold():
        report = Experiment(opened, stored_plan(stored)).report(stored, images=images, top=top)
    if output is Format.json:
        print_json(report)
        return
    by_number = {trial.number: trial for trial in stored.trials()}
    shown = table("trial", "searched", f"selection, {images:,} images", "held-out", title=study)
    for chosen in report["chosen_from"]:
        trial = by_number[chosen]
        held_out = number(report["loss"]) if chosen == report["trial"] else ""
        shown.add_row(str(chosen), number(trial.value), number(trial.user_attrs["selection"]["loss"]), held_out)
    console().print(shown)


def export(
    study: Annotated[str, typer.Argument(help="experiment/optimizer/seed")],
    out: Annotated[Path, typer.Option("--output", "-o", help="A .safetensors file.")],
    trial: Annotated[
        int | None, typer.Option(min=0, help="Its number; without it the one chosen on held-out noise.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    storage: Storage = None,
) -> None:
    """Write the merged model, with the recipe in its metadata. Works while the study is unfinished, too."""
    from lcsc_opt.experiment import Experiment
    from lcsc_opt.plan import stored_plan
    from lcsc_opt.results import export as write

    if out.suffix != ".safetensors":
        raise StudyStoreError(f"{out}: expected a name that ends in .safetensors")
    if out.exists() and not overwrite:
        raise StudyStoreError(f"{out}: exists already; give another name, or --overwrite")
    opened = open_storage(storage_url(storage), write=False)
    stored = StoredStudy.open(opened, study)
    recipe = write(stored, Experiment(opened, stored_plan(stored)).objective, out, number=trial)
    held_out = recipe["held_out"]
    known = "" if held_out is None else f", held-out {held_out['loss']:.4g}"
    say(f"{out}: trial {recipe['trial']} of {study}, searched {recipe['loss']:.4g}{known}")


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
