"""``lcsc trajectory pack`` and ``lcsc trajectory show``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lcsc_opt.base.settings import parse_settings
from lcsc_opt.cli.options import Output, Steps, assignments
from lcsc_opt.cli.output import print_described, print_json, say

app = typer.Typer(help="Pack checkpoints into a trajectory, and look at one.", no_args_is_help=True)

_KEY_HELP = "Where in a nested file or a folder the weights are, such as ema, model.ema or unet_ema."
_DTYPE_HELP = "Keep every bit, or round floating-point weights to 16 bits, which halves what is read."


@app.command()
def pack(
    checkpoints: Annotated[list[Path], typer.Argument(help="Files, quoted globs, or folders of checkpoints.")],
    out: Annotated[Path, typer.Option("--output", "-o", help="The trajectory to write, NAME.trajectory.")],
    steps: Steps = None,
    key: Annotated[str | None, typer.Option(help=_KEY_HELP)] = None,
    select: Annotated[
        list[str] | None,
        typer.Option(help="window=STEPS, interval=STEPS, last=N, first_step=STEP, last_step=STEP; or several."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing trajectory.")] = False,
    dtype: Annotated[Literal["exact", "float16", "bfloat16"], typer.Option(help=_DTYPE_HELP)] = "exact",
) -> None:
    """Pack checkpoints of one training run into one trajectory. It is memory-mapped, so that merges are quick."""
    from lcsc_opt.checkpoints.finding import Selection
    from lcsc_opt.trajectory import packing

    chosen = parse_settings(Selection, assignments(select or ()), source="--select")
    how: dict[str, Any] = {"key": key, "selection": chosen, "overwrite": overwrite, "dtype": dtype}
    trajectory = packing.pack(checkpoints, out, steps=steps, **how)
    size = f"{trajectory.nbytes / 1e9:,.2f} GB"
    say(f"{out}: {len(trajectory)} checkpoints of {trajectory.parameters:,} parameters in {size}")


@app.command()
def show(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="A trajectory; or files, globs, folders.")],
    key: Annotated[str | None, typer.Option(help=_KEY_HELP)] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read a trajectory whole, and compare hashes.")] = False,
    output: Output = "table",
) -> None:
    """Show what is in a trajectory, and what looks wrong with it. It also shows how far the weights move."""
    from lcsc_opt.trajectory.inspection import inspect

    described = inspect(paths, key=key, verify=verify)
    if output == "json":
        print_json(described)
        return
    norms, warnings, _steps = (described.pop(name) for name in ("difference_norms", "warnings", "steps"))
    if moved := [norm for norm in norms if norm is not None]:
        described["moved"] = f"{min(moved):.3g} to {max(moved):.3g} between checkpoints"
    print_described("trajectory", described)
    for warning in warnings:
        typer.echo(f"warning: {warning}")
