"""``lcsc train``, which writes a trajectory."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from lcsc_opt.cli.options import assignments
from lcsc_opt.cli.output import say

_RECIPE_HELP = "ddpm, edm, ct, ict, cd or flow; see docs/reference.md."

_EVERY_HELP = "Steps between two checkpoints. 8 to 32 checkpoints are enough for a search by the gradient."


def train(
    recipe: Annotated[str, typer.Argument(help=_RECIPE_HELP)],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings of the recipe, such as learning_rate=0.0003."),
    ] = None,
    *,
    data: Annotated[str, typer.Option(help="digits, photographs, mnist, cifar10, or a folder of images.")],
    steps: Annotated[int, typer.Option(min=1, help="How many training steps.")],
    checkpoint_every: Annotated[int, typer.Option(min=1, help=_EVERY_HELP)],
    out: Annotated[Path, typer.Option("--output", "-o", help="The trajectory, NAME.trajectory.")],
    teacher: Annotated[
        Path | None, typer.Option(help="The model that cd distils: a model folder or its trajectory.")
    ] = None,
    begin: Annotated[Path | None, typer.Option("--from", help="The folder of the model to start from.")] = None,
    network: Annotated[
        Path | None, typer.Option(help="A model folder of diffusers or a config.json. Default: a small U-Net.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the weights, the batches and the noise.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted training.")] = False,
) -> None:
    """Train a model, and write its checkpoints and a study file.

    The checkpoints are a trajectory; a model folder is beside it.
    """
    from lcsc_opt.training.preparing import parse_recipe, run
    from lcsc_opt.training.trainer import Training

    training = Training(
        recipe=parse_recipe(recipe, assignments(settings or ())),
        data=data,
        out=out,
        steps=steps,
        checkpoint_every=checkpoint_every,
        teacher=teacher,
        begin=begin,
        network=network,
        seed=seed,
    )
    study = run(training, resume=resume)
    say(f"{out}: trained; next: lcsc run {shlex.quote(str(study))}")
