"""``lcsc run``, ``resume``, ``list``, ``show``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lcsc_opt.base.catalog import SUFFIXES, entries, find
from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.settings import parse_settings
from lcsc_opt.base.study_file import OptimizerSpec, read_studies
from lcsc_opt.cli.options import AcceptChanges, Output, Storage, Study, study_in, to_change, to_read
from lcsc_opt.cli.output import Format, console, duration, number, print_json, print_report, say, table

_Ray = Annotated[
    str | None,
    typer.Option("--ray", metavar="ADDRESS", help="Evaluate on this Ray cluster: host:port of its head, or auto."),
]


def init(
    checkpoints: Annotated[Path, typer.Argument(help="A folder of checkpoints, a glob, or a packed trajectory.")],
    out: Annotated[Path, typer.Option("-o", "--output", help="The study file.")] = Path("study.yaml"),
    reference: Annotated[str | None, typer.Option(help="The real images: a folder, an .npz, a data set.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
) -> None:
    """Look at checkpoints and write a study file for them. What cannot be found out is asked, or marked in it."""
    from lcsc_opt.base.files import write_atomically
    from lcsc_opt.objective.starting import draft

    if out.exists() and not overwrite:
        raise StudySpecError(f"{out}: exists already; give another name with -o, or --overwrite")
    text, found, missing = draft(checkpoints, reference=reference, ask=_ask)
    write_atomically(out, text.encode(), error=StudySpecError)
    say(f"{out}: {found}")
    if missing:
        say(f"to be filled in: {', '.join(missing)}; then: lcsc run {out} --dry-run")
    else:
        say(f"next: lcsc run {out}")


def _ask(name: str, what: str) -> str | None:
    """Ask the user for a setting, if there is a terminal. An empty answer leaves it to be filled in."""
    if not sys.stdin.isatty():
        return None
    return str(typer.prompt(f"{name}: {what}", default="", show_default=False, err=True)) or None


def run(
    study_file: Annotated[str, typer.Argument(help="A study file, or the name of one in studies/.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Other values, as in objective.settings.images=500 seeds=[0,1]."),
    ] = None,
    optimizer: Annotated[list[str] | None, typer.Option(help="Only this optimizer; may be repeated.")] = None,
    seed: Annotated[list[int] | None, typer.Option(min=0, help="Only this seed; may be repeated.")] = None,
    budget: Annotated[int | None, typer.Option(min=1, help="Another total, in the unit of the file's budget.")] = None,
    storage: Storage = None,
    ray: _Ray = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be run, and run nothing.")] = False,
    accept_changes: AcceptChanges = False,
) -> None:
    """Run every search of a study file. What is unfinished continues, and what is finished is skipped."""
    from lcsc_opt.database.urls import storage_url
    from lcsc_opt.search import studies
    from lcsc_opt.search.plan import plans

    path = find("studies", study_file)
    specs = read_studies(path, overrides or ())
    if ray is not None:
        specs = tuple(spec.on_ray(ray) for spec in specs)
    url = storage_url(storage, specs[0].storage)
    chosen = plans(specs, path.parent, optimizers=optimizer or (), seeds=seed or (), budget=budget)
    if dry_run:
        _print_estimates(studies.dry_run(chosen, url, accept_changes=accept_changes), url)
        return
    studies.run_plans(chosen, url, on_end=say, accept_changes=accept_changes)


def _print_estimates(estimates: Any, url: str) -> None:
    """Print what would be run, how much of it is done, and about how long the rest takes."""
    from lcsc_opt.database.urls import masked

    shown = table("study", "optimizer options", "budget", "done", "left, about", title=f"would run, in {masked(url)}")
    for plan, evaluations, seconds in estimates:
        left = "-" if seconds is None else duration(seconds)
        options = ", ".join(f"{key}={value}" for key, value in plan.optimizer.options.items()) or "defaults"
        shown.add_row(plan.name, options, str(plan.spec.budget), f"{evaluations} evaluations", left)
    console().print(shown)
    known = [seconds for *_, seconds in estimates if seconds is not None]
    if len(known) < len(estimates):
        say("how long it takes is known from stored evaluations; lcsc run FILE name=try --budget 3 stores some")
    if known:
        say(f"searches and held-out reports together: about {duration(sum(known))} on one worker")


def resume(
    study: Study,
    budget: Annotated[
        int | None, typer.Option(min=1, help="A higher total, in the unit of the study's budget.")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Evaluate the failed trials again, once their cause is mended.")
    ] = False,
    storage: Storage = None,
    ray: _Ray = None,
    accept_changes: AcceptChanges = False,
) -> None:
    """Finish one study from the database, without its study file. It has its original budget; --budget raises that."""
    from lcsc_opt.search.plan import StudyPlan
    from lcsc_opt.search.study import StudyRunner

    opened = to_change(storage)
    plan = StudyPlan.of(study_in(opened, study))
    if budget is not None:
        plan = plan.with_budget(budget)
    if ray is not None:
        plan = plan.changed(workers=plan.spec.on_ray(ray).workers)
    outcome = StudyRunner(opened, accept_changes=accept_changes).run(plan, retry_failed=retry_failed)
    say(f"{plan.name}: {outcome}")


def fork(
    source: Annotated[str, typer.Argument(help="experiment/optimizer/seed, finished or not")],
    new: Annotated[str, typer.Argument(help="The name of a new experiment.")],
    optimizer: Annotated[str | None, typer.Option(help="Another optimizer, with its defaults.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Another seed.")] = None,
    budget: Annotated[int | None, typer.Option(min=1, help="New evaluations or images, as the source counts.")] = None,
    checkpoints: Annotated[
        list[str] | None,
        typer.Option(help="Begin on these, which hold the source's and more, from the coefficients that it found."),
    ] = None,
    accept_changes: AcceptChanges = False,
    storage: Storage = None,
) -> None:
    """Start a new study from the trials of another one. None of them is evaluated again."""
    from lcsc_opt.search import forking
    from lcsc_opt.search.study import StudyRunner

    opened = to_change(storage)
    chosen = None if optimizer is None else parse_settings(OptimizerSpec, {"name": optimizer}, source="--optimizer")
    how: dict[str, Any] = {"seed": seed, "budget": budget, "checkpoints": checkpoints or ()}
    plan = forking.fork(study_in(opened, source), new, optimizer=chosen, accept_changes=accept_changes, **how)
    say(f"{plan.name}: {StudyRunner(opened).run(plan)}")


def list_(
    catalog: Annotated[
        bool, typer.Option("--catalog", help="The objectives, studies and dashboards that can be used by name.")
    ] = False,
    storage: Storage = None,
    output: Output = Format.table,
) -> None:
    """List the studies of the database, or the catalog."""
    if catalog:
        _list_catalog(output)
        return
    from lcsc_opt.database.reader import HistoryReader
    from lcsc_opt.database.store import other_studies
    from lcsc_opt.database.urls import masked

    opened = to_read(storage)
    reader = HistoryReader(opened)
    ours = reader.read_studies(reader.names())
    if others := other_studies(opened):
        say(f"{others} studies of other programs are in {masked(opened.url)}, too; they are left alone")
    if output is Format.json:
        print_json([study.as_row() for study in ours])
        return
    shown = table("study", "state", "evaluations", "failed", "searched", "held-out", "images", "seconds")
    for study in ours:
        total = study.budget.get("evaluations")
        done = f"{study.evaluations}/{total}" if total else str(study.evaluations)
        numbers = [number(study.searched), number(study.held_out_loss), f"{study.images:,}", f"{study.seconds:.0f}"]
        shown.add_row(study.study, study.state, done, str(len(study.failed)), *numbers)
    console().print(shown)


def _list_catalog(output: Format) -> None:
    found = {kind: entries(kind) for kind in SUFFIXES}
    if output is Format.json:
        print_json({kind: {name: str(path) for name, path in files.items()} for kind, files in found.items()})
        return
    shown = table("kind", "name", "file")
    shown.columns[1].justify = shown.columns[2].justify = "left"
    for kind, files in found.items():
        for name, path in files.items():
            shown.add_row(kind, name, _near(path))
    console().print(shown)


def _near(path: Path) -> str:
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def show(
    study: Annotated[str, typer.Argument(help="experiment/optimizer/seed; or an exported model, or its recipe.")],
    storage: Storage = None,
    output: Output = Format.table,
) -> None:
    """Show one study: settings, state, best trial, failures, time. Or how an exported model was merged."""
    from lcsc_opt.views.progress import overview

    if Path(study).exists() or Path(study).suffix:
        from lcsc_opt.cli.exports import print_recipe
        from lcsc_opt.exports.recipe import Recipe

        recipe = Recipe.read(Path(study))
        print_json(recipe.model_dump()) if output is Format.json else print_recipe(recipe)
        return
    opened = to_read(storage)
    described = overview(study_in(opened, study))
    if output is Format.json:
        print_json(described)
        return
    shown = table(study, "")
    shown.columns[1].justify = "left"
    for name, value in described.items():
        if name not in ("coefficients", "tracebacks", "held_out_report", "held_out_rows"):
            shown.add_row(name.replace("_", " "), _readable(value))
    console().print(shown)
    print_report(described["held_out_report"])
    for text in described["tracebacks"].values():
        console().print(f"\n{text.rstrip()}", markup=False)


def _readable(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_readable(part)}" for key, part in value.items())
    if isinstance(value, list):
        return "; ".join(_readable(part) for part in value) or "none"
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)
