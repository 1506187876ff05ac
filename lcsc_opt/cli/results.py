"""``lcsc compare``, ``report``, ``evaluate``, ``dashboard``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lcsc_opt.base.errors import StudySpecError, StudyStoreError
from lcsc_opt.base.imports import import_extra
from lcsc_opt.cli.options import (
    AcceptChanges,
    Experiment,
    Output,
    Storage,
    chosen_storage,
    open_database,
    open_reader,
)
from lcsc_opt.cli.output import print_json, print_tables, say
from lcsc_opt.views import Table, number

if TYPE_CHECKING:  # with Optuna
    from lcsc_opt.database.history import Standing
    from lcsc_opt.database.reader import HistoryReader


def compare(
    experiments: Annotated[
        list[str],
        typer.Argument(
            metavar="EXPERIMENT...", help="The name of a study file, such as digits. Of several, answers are compared."
        ),
    ],
    plot: Annotated[
        Path | None, typer.Option(help="Also draw the comparison, to this file: .html, .png, .svg, .pdf or .json.")
    ] = None,
    axis: Annotated[
        Literal["evaluations", "images", "model_calls", "seconds"] | None, typer.Option(help="X axis of the curves.")
    ] = None,
    all_metrics: Annotated[
        bool, typer.Option("--all", help="All held-out metrics; by default those that judge, precision and recall.")
    ] = False,
    storage: Storage = None,
    output: Output = "table",
) -> None:
    """Compare the optimizers of an experiment, or the answers of several.

    Prints a table over seeds; --plot draws curves. Of several experiments, it prints the metrics that all of them have
    measured, and how their settings and files differ.
    """
    experiment = experiments[0]
    reader = open_reader(storage, database_of=experiment)
    if len(experiments) > 1:
        if plot is not None:
            raise StudySpecError("--plot: draws the curves of one experiment")
        _compare_answers({name: reader.read(name) for name in experiments}, reader, output)
        return
    if plot is not None:
        from lcsc_opt.views.figures.writing import check_suffix

        check_suffix(plot)  # before the tables are printed
    studies = reader.read(experiment)
    from lcsc_opt.views.answer import first_line
    from lcsc_opt.views.ranking import ranking
    from lcsc_opt.views.tables import comparison_rows, comparison_tables, ranking_table

    report = studies[0].report
    if output == "json":
        print_json(comparison_rows(studies))
    else:
        say(first_line(studies))
        rows = ranking(studies)
        print_tables(ranking_table(rows, experiment), *comparison_tables(rows, all_metrics=all_metrics))
    unfinished = [study.study for study in studies if not study.ended]
    if unfinished:
        say(f"unfinished: {', '.join(unfinished)}")
    if report is not None:
        for warning in report.warnings:
            say(f"{experiment}: {warning}")
        if report.metrics.cross_check_text:
            say(f"{experiment}: the cross-check is {report.metrics.cross_check_text}")
    if plot is not None:
        from lcsc_opt.views.figures.comparison import comparison_figure
        from lcsc_opt.views.figures.writing import write_figure

        write_figure(plot, comparison_figure(studies, axis))
        say(f"drawn: {plot}")


def _compare_answers(experiments: Mapping[str, Sequence[Standing]], reader: HistoryReader, output: str) -> None:
    """Print the answers of several experiments; raises :class:`StudyStoreError` if one of them has no report."""
    from lcsc_opt.database.store import read_contents
    from lcsc_opt.objective.key import Key
    from lcsc_opt.views.answer import first_line
    from lcsc_opt.views.tables import answers_table, comparison_rows

    if output == "json":
        print_json([row for studies in experiments.values() for row in comparison_rows(studies)])
        return
    reports = {}
    for name, studies in experiments.items():
        report = studies[0].report
        if report is None:
            raise StudyStoreError(f"{name}: has no report to compare. {first_line(studies)}")
        reports[name] = report
        say(f"{name}: {first_line(studies)}")
    table = answers_table(reports)
    if table is None:
        say("no metric was measured of all of them, so their answers stand in no table")
    else:
        print_tables(table)
    contents = read_contents(reader.storage)
    keys = {name: Key.from_json(contents.experiment(name)["key"]) for name in experiments}
    (first, of_first), *others = keys.items()
    for name, key in others:
        differ = of_first.changes_to(key, "given")
        line = f"from {first} to {name}: {'; '.join(differ) or 'the same settings and files, but for the searches'}"
        if not key.measures_as(of_first):
            line += ". Distances to other images, and what other code measures, do not compare"
        say(line)


def report(
    experiment: Experiment,
    out: Annotated[Path | None, typer.Option("-o", "--output", help="The page. Default: EXPERIMENT.html.")] = None,
    storage: Storage = None,
) -> None:
    """Write one page with everything about an experiment. Its tables, figures and images need no network."""
    from lcsc_opt.views.report import write_report

    path = write_report(open_database(storage, database_of=experiment), experiment, out or Path(f"{experiment}.html"))
    say(f"written: {path}")


def evaluate(
    experiment: Experiment,
    images: Annotated[
        int | None, typer.Option(min=2, help="Images per model and group. Default: as in the study file, else 10,000.")
    ] = None,
    top: Annotated[
        int | None, typer.Option(min=1, help="Best trials to choose from. Default: as in the study file, else 5.")
    ] = None,
    groups: Annotated[int, typer.Option(min=1, help="Groups of held-out noise; several give a spread.")] = 1,
    first_group: Annotated[int, typer.Option(min=0, help="The seed of the first group; the others follow.")] = 0,
    keep: Annotated[bool, typer.Option("--keep", help="Make this the report that export and compare use.")] = False,
    accept_changes: AcceptChanges = False,
    storage: Storage = None,
    output: Output = "table",
) -> None:
    """Report an experiment again, on noise that no search saw.

    All models are measured, and the answer is chosen among them. The first report becomes the experiment's where it is
    no smaller than planned; later ones with --keep.
    """
    from lcsc_opt.database.opened import Database
    from lcsc_opt.experiment.running import evaluate_again
    from lcsc_opt.views.answer import answer_line
    from lcsc_opt.views.tables import report_tables

    report, is_kept = evaluate_again(
        Database(chosen_storage(storage, experiment)),
        experiment,
        images=images,
        top=top,
        seeds=tuple(range(first_group, first_group + groups)),
        keep=keep,
        accept_changes=accept_changes,
    )
    if not is_kept:
        say(f"{experiment}: a preview, which is not stored; --keep makes it the report, unless it has too few images")
    if output == "json":
        print_json(report.to_json())
        return
    rows = [
        (name, number(value), "answer" if name == report.answer else "") for name, value in report.selection.items()
    ]
    print_tables(Table(("model", "selection", ""), rows, experiment), *report_tables(report, report.answer))
    say(answer_line(report))


def dashboard(
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8080,
    storage: Storage = None,
) -> None:
    """Compare optimizers in the browser, live. Studies are only read."""
    from lcsc_opt.database.connection import open_storage
    from lcsc_opt.database.urls import is_there, masked

    for package in ("dash", "dash_ag_grid"):
        import_extra(package)
    from lcsc_opt.views.dashboard.server import serve

    url = chosen_storage(storage)
    if not is_there(url):  # a missing file is created, without studies
        open_storage(url, write=True).engine.dispose()
    database = open_storage(url, write=False)
    serve(database, port=port, ready=lambda address: say(f"{address} shows {masked(url)}; Ctrl-C ends it"))
