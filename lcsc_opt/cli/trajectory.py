"""``lcsc trajectory pack`` and ``lcsc trajectory show``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lcsc_opt.cli.output import Format, console, print_json, say, table

app = typer.Typer(help="Pack checkpoints into a trajectory, and look at one.", no_args_is_help=True)

SPARKS = "▁▂▃▄▅▆▇█"


@app.command()
def pack(
    checkpoints: Annotated[list[Path], typer.Argument(help="Files or diffusers checkpoint-N folders.")],
    out: Annotated[Path, typer.Option("--output", "-o", help="The trajectory to write, NAME.trajectory.")],
    steps: Annotated[
        str | None, typer.Option(help="Training steps, as 100,200,300, where the names do not say them.")
    ] = None,
    key: Annotated[
        str | None, typer.Option(help="Where in a nested file the weights are, such as ema or model.ema.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing trajectory.")] = False,
) -> None:
    """Pack saved checkpoints of one training run into one memory-mapped trajectory."""
    from lcsc_opt.trajectory import pack as pack_checkpoints

    given = None if steps is None else [_step(part) for part in steps.split(",")]
    trajectory = pack_checkpoints(checkpoints, out, steps=given, key=key, overwrite=overwrite)
    say(f"{out}: {len(trajectory)} checkpoints of {trajectory.parameters:,} parameters")


def _step(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise typer.BadParameter(f"--steps: expected whole numbers with commas between, got {text!r}") from error


@app.command()
def show(
    path: Annotated[Path, typer.Argument(help="A packed trajectory.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read everything and compare the hashes.")] = False,
    output: Annotated[Format, typer.Option("--format")] = Format.table,
) -> None:
    """What is in a trajectory: checkpoints, parameters, steps, types, size, and how far the weights move."""
    from lcsc_opt.trajectory import Trajectory

    trajectory = Trajectory.open(path)
    if verify:
        trajectory.verify()
    distances = [float(distance) for distance in trajectory.difference_norms()]
    described = {
        "path": str(path),
        "checkpoints": len(trajectory),
        "parameters": trajectory.parameters,
        "tensors": len(trajectory.names),
        "dtypes": [str(dtype) for dtype in trajectory.dtypes],
        "bytes": trajectory.nbytes,
        "first_step": trajectory.steps[0],
        "last_step": trajectory.steps[-1],
        "intervals": sorted(
            {after - before for before, after in zip(trajectory.steps, trajectory.steps[1:], strict=False)}
        ),
        "sha256": trajectory.sha256,
        "verified": verify,
    }
    if output is Format.json:
        print_json({**described, "steps": list(trajectory.steps), "difference_norms": distances})
        return
    shown = table("trajectory", "")
    shown.columns[1].justify = "left"
    for name, value in described.items():
        shown.add_row(
            name.replace("_", " "), f"{value:,}" if isinstance(value, int) and name != "verified" else str(value)
        )
    shown.add_row("moved", f"{sparkline(distances)}  {min(distances):.3g} to {max(distances):.3g} between checkpoints")
    console().print(shown)


def sparkline(values: list[float], width: int = 60) -> str:
    """Values as a row of bars, each the mean of its share."""
    shares = [values[i * len(values) // width : (i + 1) * len(values) // width] for i in range(width)]
    means = [sum(share) / len(share) for share in shares if share] if len(values) > width else values
    top = max(means, default=0.0) or 1.0
    return "".join(SPARKS[min(int(value / top * len(SPARKS)), len(SPARKS) - 1)] for value in means)
