"""``lcsc landscape``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lcsc_opt.cli.options import Output, Storage, study_in, to_change
from lcsc_opt.cli.output import Format, console, number, print_json, say, table
from lcsc_opt.coefficients.plane import DEFAULT_MARGIN, DEFAULT_SIZE, LARGEST_SIZE, SMALLEST_SIZE, check_corners


def landscape(
    study: Annotated[str, typer.Argument(help="experiment/optimizer/seed, any search of the experiment")],
    grid: Annotated[
        int | None, typer.Option(min=SMALLEST_SIZE, max=LARGEST_SIZE, help=f"Points on each side: {DEFAULT_SIZE}.")
    ] = None,
    corners: Annotated[
        str | None,
        typer.Option(help="Three models: steps, as 100,2000,4000, or EMAs, as ema:0.9,ema:0.99,ema:0.999."),
    ] = None,
    margin: Annotated[
        float | None,
        typer.Option(min=0.0, help=f"How far it reaches beyond the corners, in units of theirs: {DEFAULT_MARGIN:g}."),
    ] = None,
    images: Annotated[int | None, typer.Option(min=2, help="Sampled at each point; else as in the search.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Tells several landscapes of one experiment apart.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Draw it, too: .html, .png, .svg, .pdf or .json.")] = None,
    storage: Storage = None,
    output: Output = Format.table,
) -> None:
    """Evaluate the loss on the plane through three models. Run again, it continues what is unfinished."""
    from lcsc_opt.database.reader import HistoryReader
    from lcsc_opt.search.landscape import run_landscape
    from lcsc_opt.views.figures.writing import check_figure_names, write_figure
    from lcsc_opt.views.landscape import landscape_figure, read_landscape

    if plot is not None:
        check_figure_names([plot])
    opened = to_change(storage)
    named = [int(one) if one.strip().isdecimal() else one.strip() for one in (corners or "").split(",")]
    given = {"corners": list(check_corners(named)) if corners else None, "size": grid, "margin": margin}
    options = {key: value for key, value in given.items() if value is not None}
    name, outcome = run_landscape(opened, study_in(opened, study), options, images=images, seed=seed)
    say(f"{name}: {outcome}")
    data = read_landscape(HistoryReader(opened), name)
    if output is Format.json:
        print_json(data.as_row())
    else:
        shown = table("", "x", "y", data.study.metric, title=name)
        for point in data.points:
            shown.add_row(point["name"], f"{point['x']:.3g}", f"{point['y']:.3g}", number(point["loss"]))
        console().print(shown)
    if plot is not None:
        write_figure(landscape_figure(data), plot)
        say(f"drawn: {plot}")
