"""``lcsc front``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lcsc_opt.base.errors import SearchFailedError
from lcsc_opt.cli.options import AcceptCode, AcceptEnvironment, Output, Storage, Study, TakeOver
from lcsc_opt.cli.output import Format, console, print_json, say, table
from lcsc_opt.cli.stored import study_in, to_read
from lcsc_opt.cli.studies import print_estimates, run_plans

if TYPE_CHECKING:
    from lcsc_opt.views.front import Front


def add_commands(app: typer.Typer) -> None:
    """Put this module's command into the app."""
    app.command()(front)


def front(
    study: Study,
    weights: Annotated[
        str, typer.Option(help="Of the term in the loss, where each term has its own unit.")
    ] = "0,3,6,12",
    term: Annotated[
        str, typer.Option(help="near: the distance to the nearest real image; hinge: how far outside of the real ones.")
    ] = "near",
    budget: Annotated[
        int | None, typer.Option(min=1, help="Of each search, in the unit of the study's; without it the study's own.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw it: a file ending in .png, .svg, .pdf, .html or .json.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be run, and run nothing.")] = False,
    take_over: TakeOver = False,
    accept_environment: AcceptEnvironment = False,
    accept_code: AcceptCode = False,
    storage: Storage = None,
    output: Output = Format.table,
) -> None:
    """Search with several weights of a fidelity term. It shows what FID costs in precision, and where EMA* is.

    The studies are points of a sweep in the same database. Run again, it continues what is unfinished.
    """
    from lcsc_opt.database.urls import storage_url
    from lcsc_opt.search.front import front_plans
    from lcsc_opt.search.studies import rehearse

    if plot is not None:
        from lcsc_opt.views.figures.writing import check_figure_names

        check_figure_names([plot])
    url = storage_url(storage)
    stored = study_in(to_read(url), study)
    chosen = front_plans(stored, _numbers(weights), term=term, budget=budget)
    accepted = {"accept_environment": accept_environment, "accept_code": accept_code}
    if dry_run:
        print_estimates(rehearse(chosen, url, **accepted), url)
        return
    try:
        run_plans(chosen, url, take_over=take_over, lower_budget=budget is not None, **accepted)
    except SearchFailedError:  # some searches failed; the others are shown
        _show(url, chosen[0].spec.name, output, plot)
        raise
    _show(url, chosen[0].spec.name, output, plot)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"--weights: expected numbers with commas between, got {text!r}") from error


def _show(url: str, experiment: str, output: Format, plot: Path | None) -> None:
    from lcsc_opt.database.reader import HistoryReader
    from lcsc_opt.views.front import front_of, front_rows

    found = front_of(HistoryReader(to_read(url)), experiment)
    if output is Format.json:
        print_json([] if found is None else front_rows(found))
    elif found is not None:
        _print(found)
    if found is None:
        say("nothing is measured on other noise than the search's yet, so there is no front to show")
        return
    if found.headline is not None:
        say(found.headline)
    if plot is not None:
        from lcsc_opt.views.figures.front import front_figure
        from lcsc_opt.views.figures.writing import write_figure

        write_figure(front_figure(found), plot)
        say(f"drawn: {plot}")


def _print(front: Front) -> None:
    from lcsc_opt.views.front import front_table

    header, rows = front_table(front)
    shown = table(*header, title=f"front of {front.name}")
    for row in rows:
        shown.add_row(*row)
    console().print(shown)
