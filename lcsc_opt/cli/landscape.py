"""``lcsc landscape``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lcsc_opt.cli.options import AcceptEnvironment, Output, Storage, TakeOver
from lcsc_opt.cli.output import Format, console, number, print_json, say, table
from lcsc_opt.cli.stored import study_in, to_change
from lcsc_opt.coefficients.plane import DEFAULT_MARGIN, DEFAULT_SIZE, LARGEST_SIZE, SMALLEST_SIZE, parse_corners


def add_commands(app: typer.Typer) -> None:
    """Put this module's commands into the app."""
    app.command("landscape")(landscape)


def landscape(
    study: Annotated[str, typer.Argument(help="experiment/optimizer/seed, any search of the experiment")],
    grid: Annotated[
        int | None,
        typer.Option(min=SMALLEST_SIZE, max=LARGEST_SIZE, help=f"Points on each side; {DEFAULT_SIZE} if not given."),
    ] = None,
    corners: Annotated[
        str | None,
        typer.Option(
            help="Three models: steps, as 100,2000,4000, or EMAs, as ema:0.9,ema:0.99,ema:0.999. Without it three EMAs "
            "of the experiment's EMAGrid, else the first, the middle and the last checkpoint."
        ),
    ] = None,
    margin: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help=f"How far the grid reaches beyond the corners, in units of their distance; {DEFAULT_MARGIN:g} if not "
            "given.",
        ),
    ] = None,
    images: Annotated[
        int | None, typer.Option(min=2, help="Sampled at each point; as many as in the search if not given.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Tells several landscapes of one experiment apart.")] = 0,
    plot: Annotated[
        list[Path] | None, typer.Option(help="Draw it, too: .html, .png, .svg, .pdf or .json; may be repeated.")
    ] = None,
    storage: Storage = None,
    take_over: TakeOver = False,
    accept_environment: AcceptEnvironment = False,
    output: Output = Format.table,
) -> None:
    """Evaluate the plane through three models, as a study. It can be interrupted; run again, it continues."""
    from lcsc_opt.search.landscape import LandscapeOptions, run_landscape

    if plot:
        from lcsc_opt.views.figures.writing import check_figure_names

        check_figure_names(plot)
    opened = to_change(storage)
    options = LandscapeOptions(None if corners is None else parse_corners(corners), grid, margin, images)
    name, outcome = run_landscape(
        opened,
        study_in(opened, study),
        options,
        seed=seed,
        take_over=take_over,
        accept_environment=accept_environment,
    )
    say(f"{name}: {outcome}")
    _report(opened, name, plot or [], output)


def _report(opened: Any, name: str, plots: list[Path], output: Format) -> None:
    from lcsc_opt.database.reader import HistoryReader
    from lcsc_opt.views.figures.landscape import landscape_figure
    from lcsc_opt.views.figures.writing import write_figures
    from lcsc_opt.views.landscape import LandscapeReader

    data = LandscapeReader(HistoryReader(opened)).read(name)
    if output is Format.json:
        print_json(data.as_row())
    else:
        shown = table("", "x", "y", data.metric, title=name)
        for label, point in data.named_points():
            shown.add_row(label, f"{point.x:.3g}", f"{point.y:.3g}", number(point.loss))
        console().print(shown)
        say(f"answers of searches are projected in the space of {data.space}; lcsc dashboard shows all candidates")
    if data.at_edge:
        say("the lowest point is on the edge of the grid: a larger --margin, with another --seed, may show lower ones")
    figure = landscape_figure(data)
    for path in write_figures(dict.fromkeys(plots, figure)):
        say(f"drawn: {path}")
