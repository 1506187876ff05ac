"""``lcsc trajectory pack`` and ``lcsc trajectory show``."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Any

import typer

from lcsc_opt.base.settings import parse_settings
from lcsc_opt.cli.options import Output, Steps, assignments, parse_steps
from lcsc_opt.cli.output import Format, print_json, print_table, say, sparkline

app = typer.Typer(help="Pack checkpoints into a trajectory, and look at one.", no_args_is_help=True)

_KEY_HELP = "Where in a nested file or a folder the weights are, such as ema, model.ema or unet_ema."
_DTYPE_HELP = "Keep every bit, or round floating-point weights to 16 bits, which halves what is read."


class _Stored(str, enum.Enum):
    """How the rows of a trajectory are stored."""

    exact = "exact"
    float16 = "float16"
    bfloat16 = "bfloat16"


@app.command()
def pack(
    checkpoints: Annotated[list[Path], typer.Argument(help="Files, quoted globs, or folders of checkpoints.")],
    out: Annotated[Path, typer.Option("--output", "-o", help="The trajectory to write, NAME.trajectory.")],
    steps: Steps = None,
    key: Annotated[str | None, typer.Option(help=_KEY_HELP)] = None,
    select: Annotated[
        list[str] | None,
        typer.Option(help="window=STEPS, interval=STEPS, last=N, first_step=STEP or last_step=STEP; may be repeated."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing trajectory.")] = False,
    dtype: Annotated[_Stored, typer.Option(help=_DTYPE_HELP)] = _Stored.exact,
) -> None:
    """Pack checkpoints of one training run into one trajectory. It is memory-mapped, so that merges are quick."""
    from lcsc_opt.objective.settings import SelectionSettings
    from lcsc_opt.trajectory import packing

    given = parse_steps(steps)
    selection = parse_settings(SelectionSettings, assignments(select or ()), source="--select").selection
    trajectory = packing.pack(
        checkpoints, out, steps=given, key=key, selection=selection, overwrite=overwrite, dtype=dtype.value
    )
    size = f"{trajectory.nbytes / 1e9:,.2f} GB"
    say(f"{out}: {len(trajectory)} checkpoints of {trajectory.parameters:,} parameters in {size}")


@app.command()
def show(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH...", help="A packed trajectory; or files, globs, folders of checkpoints."),
    ],
    key: Annotated[str | None, typer.Option(help=_KEY_HELP)] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read a packed trajectory whole and compare the hashes.")
    ] = False,
    output: Output = Format.table,
) -> None:
    """Show what is in a trajectory, and what looks wrong with it. It also shows how far the weights move."""
    from lcsc_opt.trajectory.inspection import inspect

    described = inspect(paths, key=key, verify=verify)
    if output is Format.json:
        print_json(described)
        return
    norms, warnings, _steps = (described.pop(name) for name in ("difference_norms", "warnings", "steps"))
    rows = [(name.replace("_", " "), _text(value)) for name, value in described.items()]
    if moved := [norm for norm in norms if norm is not None]:
        rows.append(("moved", f"{sparkline(norms)}  {min(moved):.3g} to {max(moved):.3g} between checkpoints"))
    print_table(("trajectory", ""), rows, left=2)
    for warning in warnings:
        typer.echo(f"warning: {warning}")


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    if value is None or value == "":
        return "-"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
