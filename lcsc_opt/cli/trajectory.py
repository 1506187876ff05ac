"""``lcsc trajectory pack`` and ``lcsc trajectory show``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lcsc_opt.base.files import shown_size
from lcsc_opt.base.settings import parse_settings
from lcsc_opt.base.streams import results_apart
from lcsc_opt.cli.options import Output, Steps, assignments, in_order_of
from lcsc_opt.cli.output import described_table, print_json, print_line, print_table, say
from lcsc_opt.views import Table

app = typer.Typer(help="Pack checkpoints into a trajectory, and inspect one.", no_args_is_help=True)

_KEY_HELP = "Where in a nested file or a folder the weights are, such as ema, model.ema or unet_ema."
_DTYPE_HELP = "Keep every bit, or round floating-point weights to 16 bits."


@app.command()
@results_apart()
def pack(
    checkpoints: Annotated[list[Path], typer.Argument(help="Files, quoted globs or folders.")],
    out: Annotated[Path, typer.Option("--output", "-o", help="The trajectory to write, NAME.trajectory.")],
    steps: Steps = None,
    key: Annotated[str | None, typer.Option(help=_KEY_HELP)] = None,
    select: Annotated[
        list[str] | None,
        typer.Option(help="window=STEPS, interval=STEPS, last=N, first_step=STEP, last_step=STEP; may be repeated."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing trajectory.")] = False,
    dtype: Annotated[
        Literal["exact", "float16", "bfloat16"], typer.Option("--stored", "--dtype", help=_DTYPE_HELP)
    ] = "exact",
) -> None:
    """Pack the checkpoints of a training run into a trajectory.

    It is mapped into memory, and merges from it are fast.
    """
    from lcsc_opt.checkpoints.finding import Selection
    from lcsc_opt.trajectory import packing

    chosen = parse_settings(Selection, assignments(select or ()), source="--select")
    paths = in_order_of(steps, checkpoints)
    trajectory = packing.pack(paths, out, steps=steps, key=key, selection=chosen, overwrite=overwrite, dtype=dtype)
    size = shown_size(trajectory.nbytes)
    say(f"{out}: {len(trajectory)} checkpoints, of {trajectory.parameters:,} parameters in {size}")


@app.command()
@results_apart()
def show(
    path: Annotated[Path, typer.Argument(help="A packed trajectory; a run's folder, a glob, or one checkpoint.")],
    key: Annotated[str | None, typer.Option(help=_KEY_HELP)] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read the whole trajectory and compare hashes.")] = False,
    output: Output = "table",
) -> None:
    """Show what a trajectory holds, or what lies in a run: its steps, its weights and averages, and what is left out.

    Of a run, this is what a search would do with it. Nothing is packed.
    """
    from lcsc_opt.base.errors import TrajectoryError
    from lcsc_opt.base.paths import expanded_path
    from lcsc_opt.checkpoints.finding import is_packed
    from lcsc_opt.trajectory.inspection import inspect

    if verify or is_packed(expanded_path(path, error=TrajectoryError)):
        _print_packed(inspect(path, verify=verify), output)
    else:
        _print_run(path, key, output)


def _print_packed(described: dict[str, Any], output: str) -> None:
    """Print what a packed trajectory holds."""
    if output == "json":
        print_json(described)
        return
    warnings = described.pop("warnings")
    del described["steps"]  # too many for a table
    print_table(described_table("trajectory", described))
    for warning in warnings:
        print_line(f"warning: {warning}")


def _print_run(path: Path, key: str | None, output: str) -> None:
    """Print the table of a run that is not packed."""
    from lcsc_opt.checkpoints.finding import span_of
    from lcsc_opt.checkpoints.left_out import shown_left_out
    from lcsc_opt.checkpoints.table import table_of

    table = table_of(path, key=key)
    if output == "json":
        print_json(table.to_json())
        return
    steps = list(table.checkpoints)
    print_line(f"{path}: {span_of(steps)}")
    rows = [(held.file, held.key or "–", held.what, held.rate or "–", held.tensors, held.use) for held in table.held]
    title = f"\nin {table.checkpoints[steps[-1]]}"
    header = ("file", "key", "what it seems to be", "rate", "tensors", "use")
    print_table(Table(header, rows, title, text=len(header)))
    if table.left_out:
        print_line(f"left out: {shown_left_out(path, table.left_out)}")
    for sentence in table.said:
        print_line(sentence)
