"""``lcsc init``, ``run``, ``list``, ``show``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from lcsc_opt.base.catalog import find
from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.overrides import with_overrides
from lcsc_opt.base.paths import BuildContext, from_here
from lcsc_opt.base.progress import notice
from lcsc_opt.base.settings import parse_yaml
from lcsc_opt.base.study_file import StudyFile, lines_to_fill_in, parse_study_file, read_study_file
from lcsc_opt.base.study_spec import BudgetSpec, ModelKind
from lcsc_opt.cli.options import (
    AcceptChanges,
    Output,
    Steps,
    Storage,
    assignments,
    chosen_storage,
    in_order_of,
    open_database,
    open_reader,
)
from lcsc_opt.cli.output import described_table, print_json, print_line, print_table, print_tables, say
from lcsc_opt.views import Table

if TYPE_CHECKING:
    from lcsc_opt.experiment.experiment import Experiment
    from lcsc_opt.exports import Recipe

_PRINTED_IF_ANY = ("maximized", "failed", "images", "shares_of_time")
_PRINTED_APART = ("coefficients", "layer_groups", "tracebacks", "held_out_rows")  # below the table, or in JSON alone


def _parse_budget(text: str) -> int | str:
    """``100`` → a number, in the unit of the study's budget; anything else is to be a time."""
    if text.isdecimal():
        return int(text)
    return text


_Ray = Annotated[str | None, typer.Option("--ray", metavar="ADDRESS", help="A Ray cluster: host:port, or auto.")]


def init(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[KIND] CHECKPOINTS [KEY=VALUE]...",
            help="What the checkpoints are of: diffusers, edm, lora (of a text-to-image model), module (any network "
            "with a sampler) or score (any with a function that scores it); LoRAs and model folders are known without. "
            "Then a folder of checkpoints, a glob, or a packed trajectory; and settings of the objective, as in "
            "reference=photographs.",
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--output", help="The study file.")] = Path("study.yaml"),
    key: Annotated[str | None, typer.Option(help="Which state dict of each file, if it has several.")] = None,
    steps: Steps = None,
) -> None:
    """Write a study file for checkpoints. It lists the lines that only you can fill in."""
    from lcsc_opt.base.files import write_atomically
    from lcsc_opt.objective.starting import draft, kind_of

    kind: ModelKind | None = None
    first, *more = words
    is_followed_by_a_setting = not more or ("=" in more[0] and not Path(more[0]).exists())
    if first in get_args(ModelKind) and not (Path(first).exists() and is_followed_by_a_setting):
        kind = cast("ModelKind", first)
        if not more:
            raise typer.BadParameter(f"where are the checkpoints? Give their folder, as lcsc init {first} FOLDER")
        first, *more = more
    further = [text for text in more if Path(text).exists()]
    settings = assignments([text for text in more if text not in further])
    if key is not None:
        settings["key"] = key
    files = in_order_of(steps, [Path(first), *map(Path, further)])
    if out.exists():
        raise StudySpecError(f"{out}: exists already; delete it, or give another name with -o")
    if kind is None:
        kind = kind_of(files, key=settings.get("key"), steps=steps)
    text, summary = draft(kind, files, settings, steps=steps)
    write_atomically(out, text, error=StudySpecError)
    say(f"{out}: {summary}")
    missing = lines_to_fill_in(text, parse_yaml(text))
    if missing:
        say("\n".join(["to be filled in:", *missing]))
    if kind in _WITHOUT_USERS_CODE:
        _show_first_look(text, out)
    say(f"next: lcsc run {out} --dry-run")


_WITHOUT_USERS_CODE = ("lora", "diffusers")  # kinds of which init may make images


def _show_first_look(text: str, out: Path) -> None:
    """Make images of the first, the middle and the last checkpoint, where the study file says all that this needs."""
    from lcsc_opt.base.errors import LcscError
    from lcsc_opt.base.paths import BuildContext
    from lcsc_opt.database.urls import files_directory
    from lcsc_opt.experiment.looking import sampling_spec, write_first_look
    from lcsc_opt.exports.grid import first_look
    from lcsc_opt.objective.loading import load_objective

    name, spec, missing = sampling_spec(text)
    if missing:
        return
    files = files_directory(chosen_storage(None, name))
    try:
        context = BuildContext(out.absolute().parent, files=files, samples_alone=True)
        path = write_first_look(first_look(load_objective(spec, context)), name, files)
    except LcscError as error:  # the study file is written, and its dry run says the same
        notice(f"no images: {error}")
        return
    say(f"{_FIRST_LOOK}: {from_here(path)}")


def run(
    studies: Annotated[
        str,
        typer.Argument(metavar="FILE|STUDY", help="A study file, the name of one in studies/, or a stored study."),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Override values, as in objective.settings.images=500 seeds=[0,1]; ~KEY removes one, as '~held_out'.",
        ),
    ] = None,
    optimizer: Annotated[list[str] | None, typer.Option(help="Only this optimizer; may be repeated.")] = None,
    seed: Annotated[list[int] | None, typer.Option(min=0, help="Only this seed; may be repeated.")] = None,
    budget: Annotated[
        Any,
        typer.Option(
            parser=_parse_budget,
            metavar="NUMBER|TIME",
            help="Another total, in the unit of the study's budget; or a time, as in '5 min'.",
        ),
    ] = None,
    storage: Storage = None,
    ray: _Ray = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Evaluate one candidate on one batch, and print what would be run, and how long it takes."
        ),
    ] = False,
    accept_changes: AcceptChanges = False,
) -> None:
    """Run every search of a study file, or a stored study. What is unfinished continues; what is finished is skipped.

    A stored study, as digits/LCSC/0, needs no study file. With name=NEW, its settings begin another one.
    """
    study_file, context, url = _read(studies, overrides or (), storage)

    from lcsc_opt.base.machine import collector_resting
    from lcsc_opt.database.opened import Database
    from lcsc_opt.database.urls import masked

    if "torch" not in sys.modules:  # it takes seconds, as Nevergrad does
        notice("importing torch")
    with collector_resting():
        from lcsc_opt.objective.of_study import ObjectiveLoader, found_checkpoints, say_found

    study_file = study_file.with_choices(optimizers=optimizer or None, seeds=seed or None, budget=budget)
    if ray is not None:
        study_file = study_file.on_ray(ray)
    objectives = ObjectiveLoader(context)
    found = found_checkpoints(study_file.objective, objectives.context)
    say_found(found)
    if not found and "nevergrad" not in sys.modules:
        notice("importing the optimizers")

    from lcsc_opt.experiment.running import experiment_of, run_studies  # and with it Nevergrad

    experiment = experiment_of(study_file, Database(url), objectives, accept_changes=accept_changes)
    if dry_run:
        _print_rehearsed(experiment)
        return
    try:
        run_studies(experiment, on_end=say)
    finally:
        if experiment.database.storage is not None:
            say(f"database: {masked(url)}")
    say(_next_of(study_file))


def _next_of(study_file: StudyFile) -> str:
    """What people do with an experiment that has run."""
    line = f"next: lcsc report {study_file.name} (one page about it)"
    if "checkpoints" in study_file.objective.settings:
        line += f", lcsc export {study_file.name} -o best.safetensors"
    return line


def _read(studies: str, overrides: Sequence[str], storage: str | None) -> tuple[StudyFile, BuildContext, str]:
    """A study file, or what asks for a stored study alone; where its files are; and the URL of the database."""
    from lcsc_opt.database.names import has_study_form
    from lcsc_opt.database.urls import files_directory, storage_url

    if not has_study_form(studies) or Path(studies).exists():
        path = find("studies", studies)
        # before torch is imported: what is to be filled in is said at once
        study_file = read_study_file(path, overrides)
        url = storage_url(storage, study_file.storage)
        return study_file, BuildContext(path.absolute().parent, files=files_directory(url)), url

    from lcsc_opt.database.store import StoredStudy, read_contents
    from lcsc_opt.experiment.stored import spec_of
    from lcsc_opt.objective.checkpoints_alone import stored_context

    stored = StoredStudy.open(open_database(storage, database_of=studies, write=True), studies)
    contents = read_contents(stored.storage)
    spec = spec_of(studies, contents)
    content = with_overrides(spec.content(), overrides)
    study_file = parse_study_file(content, source=" ".join([studies, *overrides]))
    url = stored.storage.url
    return study_file, stored_context(contents.experiment(spec.experiment), files_directory(url)), url


_FIRST_LOOK = "the first, the middle and the last checkpoint, which have to look as they do in your own script"
_TIMES = {"10 min": 600.0, "1 h": 3600.0, "a night, 8 h": 8 * 3600.0}


def _print_rehearsed(experiment: Experiment) -> None:
    """Rehearse, and print a table of the studies with what was chosen for them."""
    from lcsc_opt.database.reader import HistoryReader
    from lcsc_opt.database.urls import masked

    with experiment:
        attributes = experiment.rehearse()
        picture = experiment.first_look()
        bought = experiment.bought_by([*_TIMES.values()])
    if picture is not None:
        say(f"{_FIRST_LOOK}: {from_here(picture)}")
    database = experiment.database
    evaluations: dict[str, int] = {}
    if database.storage is not None:
        stored = HistoryReader(database.storage).read_studies(experiment.specs)
        evaluations = {study.study: study.summary.evaluations for study in stored}
    rows = []
    for name, spec in experiment.specs.items():
        options = spec.optimizer.options
        named_options = ", ".join(f"{key}={value}" for key, value in options.items())
        in_rows = "one row" if spec.is_grid or spec.space.rows is None else f"rows: {spec.space.rows}"
        budget = BudgetSpec(**attributes[name]["budget"])
        done = f"{evaluations.get(name, 0)} evaluations"
        rows.append((name, named_options or "defaults", f"{spec.space.kind}, {in_rows}", budget, done))
    header = ("study", "optimizer options", "space", "budget", "done")
    tables = [Table(header, rows, f"would run, in {masked(database.url)}")]
    if bought:
        title = "evaluations that a time buys, as --budget '10 min' for each search"
        counts_of = [(name, *(f"{count:,}" for count in counts)) for name, counts in bought.items()]
        tables.append(Table(("study", *_TIMES), counts_of, title))
    print_tables(*tables)


def list_(
    storage: Storage = None,
    output: Output = "table",
) -> None:
    """List the studies of the database."""
    studies = open_reader(storage).read_studies()
    from lcsc_opt.views.tables import studies_table, study_row

    if output == "json":
        print_json([study_row(study) for study in studies])
        return
    print_table(studies_table(studies))


def show(
    study: Annotated[
        str,
        typer.Argument(help="experiment/optimizer/seed; or an exported model, or its recipe."),
    ],
    storage: Storage = None,
    output: Output = "table",
) -> None:
    """Show one study: settings, state, best trial, failures, time. Or how an exported model was merged."""
    if Path(study).suffix in (".yaml", ".yml"):
        raise StudySpecError(f"{study}: is the name of a study file; see what it runs: lcsc run {study} --dry-run")
    if Path(study).exists() or Path(study).suffix:
        from lcsc_opt.exports.recipe import Recipe

        recipe = Recipe.read(Path(study))
        if output == "json":
            print_json(recipe.model_dump())
        else:
            _print_recipe(recipe)
        return
    reader = open_reader(storage, database_of=study)
    standing = reader.read_study(study)
    from lcsc_opt.views.study_status import overview
    from lcsc_opt.views.tables import grid_table, tables_of_study

    described = overview(reader, standing)
    if output == "json":
        print_json(described)
        return
    left_out = {name for name in _PRINTED_IF_ANY if not described[name]}.union(_PRINTED_APART)
    shown = {name: value for name, value in described.items() if name not in left_out}
    of_grid = grid_table(reader, standing)
    print_tables(described_table(study, shown), *tables_of_study(standing), *([] if of_grid is None else [of_grid]))
    for text in described["tracebacks"].values():
        print_line(f"\n{text.rstrip()}")


def _print_recipe(shown: Recipe) -> None:
    """Print how a model was merged: the coefficients by their measures."""
    import numpy as np

    from lcsc_opt.coefficients.profiles import describe_coefficients, strength_of

    printed_otherwise = {
        "format",
        "coefficients",
        "rows",
        "steps",
        "checkpoint_sha256",
        "statistics",
        "lora",
    }
    described: dict[str, Any] = shown.model_dump(exclude=printed_otherwise, exclude_none=True)
    described["checkpoints"] = f"{len(shown.steps)}, steps {shown.steps[0]} to {shown.steps[-1]}"
    described |= describe_coefficients(np.array(shown.coefficients), shown.steps)
    if shown.adapters is not None:
        strength = strength_of(np.array(shown.coefficients))
        described["strength"] = f"{strength:.4g}, which is in the file: load it with a weight of 1"
    print_table(described_table(shown.title, described))
