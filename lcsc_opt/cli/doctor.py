"""``lcsc doctor``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lcsc_opt.cli.options import Output, Storage
from lcsc_opt.cli.output import Format, console, print_json, say, table

PROBLEMS_REMAIN = 1


def add_commands(app: typer.Typer) -> None:
    """Put this module's commands into the app."""
    app.command("doctor")(doctor)


def doctor(
    study: Annotated[
        str | None, typer.Argument(help="experiment/optimizer/seed; without it, every study of the database.")
    ] = None,
    storage: Storage = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Do what is offered, in studies that nobody is running.")
    ] = False,
    deep: Annotated[
        bool, typer.Option("--deep", help="Load the objectives, too, and read every checkpoint; may take long.")
    ] = False,
    output: Output = Format.table,
) -> None:
    """Check the study database for what is damaged or left over. Says what to do; status 1 if problems remain."""
    from lcsc_opt.database.urls import storage_url
    from lcsc_opt.diagnostics.doctor import diagnose

    report = diagnose(storage_url(storage), study, deep=deep, mend=repair)
    if output is Format.json:
        rows = [(finding, True) for finding in report.repaired] + [(finding, False) for finding in report.found]
        print_json([{**finding.as_row(), "repaired": repaired} for finding, repaired in rows])
    else:
        _print(report)
    if report.problems:
        raise typer.Exit(PROBLEMS_REMAIN)


def _print(report: Any) -> None:
    shown = table("study", "trial", "", "what", "repair")
    for column in shown.columns[2:]:
        column.justify = "left"
    for finding in report.repaired:
        shown.add_row(*_cells(finding), finding.text, f"done: {finding.advice}")
    for finding in report.found:
        shown.add_row(*_cells(finding), finding.text, finding.advice)
    console().print(shown)
    notes = len(report.found) - report.problems
    say(f"problems: {report.problems}, notes: {notes}, repaired: {len(report.repaired)}")


def _cells(finding: Any) -> tuple[str, str, str]:
    return finding.study or "", "" if finding.trial is None else str(finding.trial), finding.severity
