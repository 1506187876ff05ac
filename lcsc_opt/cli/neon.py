"""``lcsc neon``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lcsc_opt.cli.options import Output, Storage
from lcsc_opt.cli.output import Format, console, number, print_json, say, table
from lcsc_opt.cli.refine import Begin

if TYPE_CHECKING:
    from lcsc_opt.search.self_training import Appended


def add_commands(app: typer.Typer) -> None:
    """Put this module's commands into the app."""
    app.command("neon")(neon)


def neon(
    source: Annotated[str, typer.Argument(metavar="STUDY", help="experiment/optimizer/seed, or a study file.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings of the recipe, as in learning_rate=0.0003."),
    ] = None,
    *,
    recipe: Annotated[str, typer.Option(help="What the checkpoints were trained with: ict, ddpm, edm …")],
    out: Annotated[Path, typer.Option("--output", "-o", help="The new trajectory, NAME.trajectory.")],
    begin: Annotated[
        Begin, typer.Option("--from", help="The best EMA of the checkpoints, or the best combination that STUDY found.")
    ] = Begin.ema,
    samples: Annotated[int, typer.Option(min=2, help="Images that are sampled once, and trained on.")] = 10_000,
    steps: Annotated[int, typer.Option(min=1, help="Of training.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Of the samples, the batches and the noise.")] = 0,
    storage: Storage = None,
    output: Output = Format.table,
) -> None:
    """Add a checkpoint that was trained on the model's own samples. Searches give it a negative coefficient."""
    from lcsc_opt.database.names import is_ours
    from lcsc_opt.search.self_training import SelfTraining, append_self_trained
    from lcsc_opt.search.starts import start_from_file, start_from_study
    from lcsc_opt.training.preparing import parse_recipe

    asked = SelfTraining(parse_recipe(recipe, settings or ()), samples=samples, steps=steps, seed=seed)
    begun = start_from_study(source, storage) if is_ours(source) else start_from_file(source)
    start = begun.best if begin is Begin.best else begun.ema
    found = append_self_trained(begun.objective, asked, out, start=start)
    if output is Format.json:
        losses = [{"w": weight, "loss": loss} for weight, loss in found.losses.items()]
        print_json({"step": found.step, "losses": losses})
    else:
        _print(found)
    say(f"{out}: the checkpoints and, as step {found.step}, the self-trained one; for checkpoints of a study file")


def _print(found: Appended) -> None:
    shown = table("w", "loss", title="(1 + w) start − w self-trained, on the search's noise")
    for weight, loss in found.losses.items():
        shown.add_row(f"{weight:g}", number(loss))
    console().print(shown)
