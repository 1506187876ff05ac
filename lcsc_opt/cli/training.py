"""``lcsc train`` and ``refine``: commands that train and write a trajectory."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lcsc_opt.base.settings import parse_settings
from lcsc_opt.cli.options import Output, Storage, assignments
from lcsc_opt.cli.output import print_json, print_table, say
from lcsc_opt.views import number

_SHEETS = 10  # sheets of samples, by default
_RECIPE_HELP = "ddpm, edm, ct, ict, cd, ect, flow or slct; see docs/training.md."

_Out = Annotated[Path, typer.Option("--output", "-o", help="The trajectory, NAME.trajectory.")]
_EVERY_HELP = "Steps between two checkpoints. 16 to 32 checkpoints are enough for a search with rows: layers."


def train(
    recipe: Annotated[str, typer.Argument(help=_RECIPE_HELP)],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings of the recipe, such as learning_rate=0.0003."),
    ] = None,
    *,
    data: Annotated[str, typer.Option(help="digits, photographs, characters, cifar10, or a folder of images.")],
    steps: Annotated[int, typer.Option(min=1, help="How many training steps.")],
    checkpoint_every: Annotated[int, typer.Option(min=1, help=_EVERY_HELP)],
    out: _Out,
    teacher: Annotated[
        Path | None, typer.Option(help="The model that cd distils: a model folder or its trajectory.")
    ] = None,
    begin: Annotated[Path | None, typer.Option("--from", help="The folder of the model to start from.")] = None,
    network: Annotated[
        Path | None, typer.Option(help="A model folder of diffusers or a config.json. Default: a small U-Net.")
    ] = None,
    autoencoder: Annotated[
        Path | None,
        typer.Option(
            help="Train on the latents of this autoencoder of diffusers. Default for slct: train a small one."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the weights, the batches and the noise.")] = 0,
    precision: Annotated[
        Literal["fp32", "bf16"], typer.Option(help="Precision of matrix products and convolutions.")
    ] = "fp32",
    samples_every: Annotated[
        int | None,
        typer.Option(min=0, help="Steps between two sheets of samples. Default: a tenth of all steps; 0: no sheets."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted training.")] = False,
) -> None:
    """Train a model and write a trajectory to search, with a learning curve, a model folder and a study file."""
    from lcsc_opt.training.preparing import parse_recipe, run
    from lcsc_opt.training.trainer import Training

    if samples_every is None:
        samples_every = max(steps // _SHEETS, 1)
    elif samples_every == 0:
        samples_every = None
    training = Training(
        recipe=parse_recipe(recipe, settings or ()),
        data=data,
        out=out,
        steps=steps,
        checkpoint_every=checkpoint_every,
        teacher=teacher,
        begin=begin,
        network=network,
        autoencoder=autoencoder,
        seed=seed,
        precision=precision,
        samples_every=samples_every,
    )
    study = run(training, resume=resume)
    if study is not None:  # else another process of the same training has written it
        say(f"{out}: trained; next: lcsc run {shlex.quote(str(study))}")


def refine(
    source: Annotated[str, typer.Argument(metavar="STUDY", help="experiment/optimizer/seed, or a study file.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="images_per_step (200), rate (Adam's; 1e-4 at 200 images a step, scaled with their square root), "
            "checkpoint_every (steps; by default 50 checkpoints), seed (0), held_out (images; by default the study's).",
        ),
    ] = None,
    *,
    out: _Out,
    begin: Annotated[
        Literal["ema", "best"],
        typer.Option("--from", help="Start from the best EMA, or from the best coefficients of STUDY."),
    ] = "ema",
    images: Annotated[int, typer.Option(min=2, help="Images sampled by all steps together.")] = 60_000,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted refinement.")] = False,
    storage: Storage = None,
    output: Output = "table",
) -> None:
    """Fine-tune all weights by the objective's gradient. Writes a trajectory to search, and the average as a file."""
    from lcsc_opt.search.forking import starting_point
    from lcsc_opt.search.refining import RefineSettings, refine

    values = {"images": images, **assignments(settings or ())}
    refine_settings = parse_settings(RefineSettings, values, source="refine")
    objective, start, held_out_images = starting_point(source, storage, best=begin == "best")
    answer, before, after = refine(
        objective,
        refine_settings,
        out,
        start=start,
        held_out_images=held_out_images,
        resume=resume,
    )
    if output == "json":
        print_json({"answer": str(answer), "start": _row(before), "refined": _row(after)})
    else:
        rows = [("loss", number(before.loss), number(after.loss))]
        rows += [(name, number(value), number(after.metrics.get(name))) for name, value in before.metrics.items()]
        title = f"{before.cost.images:,} images of held-out noise"
        print_table(("held out", "start", "refined"), rows, title=title)
    say(f"{answer}: the average; {out}: its checkpoints, to search on with a study file (setting: checkpoints)")


def _row(evaluation: Any) -> dict[str, Any]:
    return {
        "loss": float(evaluation.loss),
        "metrics": {name: float(value) for name, value in evaluation.metrics.items()},
        "images": evaluation.cost.images,
    }
