"""``lcsc train``."""

from __future__ import annotations

import enum
import shlex
from pathlib import Path
from typing import Annotated

import typer

from lcsc_opt.cli.output import say

SHEETS = 10  # sheets of samples, by default
RECIPE_HELP = "ddpm, edm, ct, ict, cd, ect, flow or slct: docs/training.md."


class Precision(str, enum.Enum):
    """The precision of matrix products and convolutions."""

    fp32 = "fp32"
    bf16 = "bf16"


def add_commands(app: typer.Typer) -> None:
    """Put this module's commands into the app."""
    app.command("train")(train)


def train(
    recipe: Annotated[str, typer.Argument(help=RECIPE_HELP)],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings of the recipe, as in learning_rate=0.0003."),
    ] = None,
    *,
    data: Annotated[str, typer.Option(help="digits, photographs, cifar10, or a folder of images of one size.")],
    steps: Annotated[int, typer.Option(min=1, help="How many training steps.")],
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between two checkpoints.")],
    out: Annotated[Path, typer.Option("--output", "-o", help="The trajectory, NAME.trajectory.")],
    teacher: Annotated[
        Path | None, typer.Option(help="The diffusion model that cd distils, a folder or its trajectory.")
    ] = None,
    begin: Annotated[
        Path | None, typer.Option("--from", help="The model whose weights training begins with, a folder.")
    ] = None,
    network: Annotated[
        Path | None, typer.Option(help="A network of diffusers, a folder or config.json; else a small U-Net.")
    ] = None,
    autoencoder: Annotated[
        Path | None, typer.Option(help="Train on the latents of this one of diffusers; slct trains a small one else.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the weights, the batches and the noise.")] = 0,
    precision: Annotated[Precision, typer.Option(help="Of matrix products and convolutions.")] = Precision.fp32,
    samples_every: Annotated[
        int | None, typer.Option(min=0, help="Steps between two sheets of samples: a tenth of all; 0 writes none.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a training that was interrupted.")] = False,
) -> None:
    """Train a model that leaves a trajectory to search. Learning curve, model folder and study file lie beside it."""
    from lcsc_opt.training.preparing import Request, run

    request = Request(
        recipe=recipe,
        data=data,
        out=out,
        steps=steps,
        checkpoint_every=checkpoint_every,
        settings=settings or (),
        teacher=teacher,
        begin=begin,
        network=network,
        autoencoder=autoencoder,
        seed=seed,
        precision=precision.value,
        samples_every=(max(steps // SHEETS, 1) if samples_every is None else samples_every) or None,
    )
    study = run(request, resume=resume)
    if study is not None:
        say(f"{out}: trained; next: lcsc run {shlex.quote(str(study))}")
