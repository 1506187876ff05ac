"""``lcsc refine``."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lcsc_opt.cli.options import Output, Storage
from lcsc_opt.cli.output import Format, console, number, print_json, say, table

if TYPE_CHECKING:
    from lcsc_opt.search.refining import Refined


class Begin(str, enum.Enum):
    """The model to begin with."""

    ema = "ema"
    best = "best"


def add_commands(app: typer.Typer) -> None:
    """Put this module's commands into the app."""
    app.command("refine")(refine)


def refine(
    source: Annotated[str, typer.Argument(metavar="STUDY", help="experiment/optimizer/seed, or a study file.")],
    out: Annotated[Path, typer.Option("--output", "-o", help="The trajectory, NAME.trajectory.")],
    begin: Annotated[
        Begin, typer.Option("--from", help="The best EMA of the checkpoints, or the best combination that STUDY found.")
    ] = Begin.ema,
    images: Annotated[int, typer.Option(min=2, help="Sampled by all steps together.")] = 60_000,
    images_per_step: Annotated[int, typer.Option(min=2, help="Sampled for each gradient.")] = 200,
    rate: Annotated[
        float | None, typer.Option(help="Of Adam; without it 1e-4 at 200 images a step, and more with their root.")
    ] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between two checkpoints; without it 50 checkpoints are left.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise.")] = 0,
    held_out: Annotated[
        int | None, typer.Option(min=2, help="Images that start and answer are compared on, else as the study's.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a refinement that was interrupted.")] = False,
    storage: Storage = None,
    output: Output = Format.table,
) -> None:
    """Fine-tune all weights by the objective's gradient. Leaves a trajectory to search, and the average as a file."""
    from lcsc_opt.database.names import is_ours
    from lcsc_opt.search.refining import RefineSettings, refine
    from lcsc_opt.search.starts import start_from_file, start_from_study

    settings = RefineSettings.of(
        images=images, images_per_step=images_per_step, rate=rate, checkpoint_every=checkpoint_every, seed=seed
    )
    begun = start_from_study(source, storage) if is_ours(source) else start_from_file(source)
    found = refine(
        begun.objective,
        settings,
        out,
        start=begun.best if begin is Begin.best else begun.ema,
        held_out_images=held_out or begun.held_out_images,
        resume=resume,
    )
    if output is Format.json:
        print_json({"answer": str(found.answer), "start": _row(found.start), "refined": _row(found.refined)})
    else:
        _print(found)
    say(f"{found.answer}: the average; {out}: its checkpoints, for the setting checkpoints of a study file")


def _row(evaluation: Any) -> dict[str, Any]:
    return {
        "loss": float(evaluation.loss),
        "metrics": {name: float(value) for name, value in evaluation.metrics.items()},
        "images": evaluation.cost.images,
    }


def _print(found: Refined) -> None:
    shown = table("held out", "start", "refined", title=f"{found.start.cost.images:,} images of noise that no step saw")
    shown.add_row("loss", number(found.start.loss), number(found.refined.loss))
    for name, value in found.start.metrics.items():
        shown.add_row(name, number(value), number(found.refined.metrics.get(name)))
    console().print(shown)
