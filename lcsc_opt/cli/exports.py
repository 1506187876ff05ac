"""``lcsc export`` and ``apply``: write the merged model, and merge it again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lcsc_opt.cli.options import Steps, Storage, in_order_of, open_database
from lcsc_opt.cli.output import say
from lcsc_opt.views import number

if TYPE_CHECKING:
    from lcsc_opt.objective.contract import Objective

_Out = Annotated[
    Path,
    typer.Option(
        "--output", "-o", help="A .safetensors file, a file with the checkpoints' own ending, or a model folder."
    ),
]
_Form = Annotated[
    Literal["safetensors", "pt", "diffusers", "lora"] | None,
    typer.Option("--as", help="The form. Default: by the suffix of PATH."),
]
_Dtype = Annotated[
    Literal["float32", "float16", "bfloat16"] | None,
    typer.Option(help="Of floating-point weights. Default: the same as the checkpoints."),
]
_Config = Annotated[Path | None, typer.Option(help="For a model folder: a folder with another config.json.")]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing export.")]


def export(
    name: Annotated[
        str,
        typer.Argument(
            metavar="EXPERIMENT|STUDY", help="An experiment, whose answer is written, or experiment/optimizer/seed."
        ),
    ],
    out: _Out,
    form: _Form = None,
    dtype: _Dtype = None,
    trial: Annotated[
        int | None, typer.Option(min=0, help="Export this trial of a study. Default: the one that the report chose.")
    ] = None,
    config: _Config = None,
    overwrite: _Overwrite = False,
    storage: Storage = None,
) -> None:
    """Write the best model, with its recipe inside. A .json file gets the recipe alone.

    The answer of an experiment is the best model that is known: what a search found, or what was there before.
    """
    from lcsc_opt.base.errors import StudySpecError, StudyStoreError
    from lcsc_opt.base.files import write_atomically
    from lcsc_opt.base.progress import notice
    from lcsc_opt.checkpoints.lora import lora_flavour
    from lcsc_opt.database.names import has_study_form
    from lcsc_opt.exports import merging, writing
    from lcsc_opt.exports.chosen import Chosen
    from lcsc_opt.views.pictures import why_not_the_answer

    destination = None
    if out.suffix != ".json":
        destination = writing.Destination.of(out, form=form, dtype=dtype, config=config, overwrite=overwrite)
    elif out.exists() and not overwrite:
        raise StudySpecError(f"{out}: exists already; give another name, or pass --overwrite")
    if trial is not None and not has_study_form(name):
        raise typer.BadParameter("--trial belongs to a study: experiment/optimizer/seed")
    database = open_database(storage, database_of=name)
    chosen = Chosen.of(database, name, trial)
    # None where checkpoints alone cannot be merged; the whole objective runs the user's code and loads networks
    objective: Objective | None = chosen.checkpoints_alone()
    if objective is None or (destination is not None and merging.needs_network(chosen, objective, destination)):
        from lcsc_opt.experiment.stored import objective_of

        objective = objective_of(database, chosen.study)
    if destination is None:
        recipe = merging.recipe_of(chosen, objective, dtype=dtype)
        write_atomically(out, recipe.as_text(), error=StudyStoreError)
    else:
        recipe = merging.export(chosen, objective, destination)
    line = f"{out}: {chosen.title}"
    if recipe.loss is not None:
        line += f", searched {number(recipe.loss)}"
    if recipe.held_out is not None:
        held_out: Any = recipe.held_out["loss"]
        line += f", held-out {number(held_out)}"
    say(line)
    if destination is not None and objective.trajectory is not None:
        flavour = lora_flavour(objective.trajectory.names)
        if flavour == "kohya":
            say("load it as you load your checkpoints, with a weight of 1")
        elif flavour is not None:
            say("load it with load_lora_weights of diffusers, or as you load your checkpoints, with a weight of 1")
    if recipe.sampler:
        say(f"it is tuned to the sampler of its search, see lcsc show {out}")
    report = chosen.report
    if report is not None and chosen.model.name == report.answer:
        for warning in report.warnings:
            notice(f"{chosen.experiment}: {warning}")
    elif report is not None and trial is None:
        measured = report.measured(chosen.model.name)
        reason = "" if measured is None else f". {why_not_the_answer(report, measured)}"
        notice(
            f"{name} is not the answer, {report.answer} is{reason}; lcsc export {chosen.experiment} writes the answer"
        )


def apply(
    recipe: Annotated[
        str,
        typer.Argument(help="A recipe, an exported model, ema:RATE, power:WIDTH (EDM2's), uniform, last:N or step:N."),
    ],
    checkpoints: Annotated[list[str], typer.Argument(help="Files, folders, globs, or one packed trajectory.")],
    out: _Out,
    form: _Form = None,
    dtype: _Dtype = None,
    key: Annotated[
        str | None, typer.Option(help="Where in a nested file the weights are. Default: the same as in the recipe.")
    ] = None,
    steps: Steps = None,
    config: _Config = None,
    overwrite: _Overwrite = False,
) -> None:
    """Merge checkpoints by a recipe, or by an EMA rate or the like."""
    from lcsc_opt.exports.coefficients import is_average
    from lcsc_opt.exports.merging import average, rebuild
    from lcsc_opt.exports.recipe import Recipe
    from lcsc_opt.exports.writing import Destination
    from lcsc_opt.trajectory.sources import PackRequest

    checkpoints = in_order_of(steps, checkpoints)
    # packed beside the model: a system's temporary folder may be too small for checkpoints
    request = PackRequest(checkpoints, out.absolute().parent, key=key, steps=steps)
    if is_average(recipe):
        destination = Destination.of(out, form=form, dtype=dtype, config=config, overwrite=overwrite)
        merged = average(request, recipe, destination)
    else:
        stored_recipe = Recipe.read(Path(recipe))
        if form is None and stored_recipe.lora is not None and out.suffix == ".safetensors":
            form = "lora"  # as it was exported before
        if config is None and Path(recipe).is_dir():  # a folder that was exported has its configuration
            config = Path(recipe)
        destination = Destination.of(out, form=form, dtype=dtype, config=config, overwrite=overwrite)
        merged = rebuild(stored_recipe, request, destination)
    say(f"{out}: {merged.title}, from {len(merged.steps)} checkpoints")
