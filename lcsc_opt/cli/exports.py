"""``lcsc export`` and ``apply``: write the merged model, and merge it again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from lcsc_opt.cli.options import Output, Steps, Storage, StudyName, assignments, find_study, in_order_of
from lcsc_opt.cli.output import print_json, print_table, say
from lcsc_opt.views import number

_Out = Annotated[Path, typer.Option("--output", "-o", help="A .safetensors or .pt file, or a model folder.")]
_Form = Annotated[
    str | None,
    typer.Option("--as", help="safetensors, pt, diffusers or lora. Default: by the suffix of PATH."),
]
_Dtype = Annotated[str | None, typer.Option(help="float32, float16 or bfloat16. Default: as the checkpoints.")]
_Config = Annotated[Path | None, typer.Option(help="For a model folder: a folder with another config.json.")]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing export.")]


def export(
    study: StudyName,
    out: _Out,
    form: _Form = None,
    dtype: _Dtype = None,
    trial: Annotated[
        int | None, typer.Option(min=0, help="Export this trial. Default: the one chosen on held-out noise.")
    ] = None,
    config: _Config = None,
    overwrite: _Overwrite = False,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload the model with a model card.")
    ] = None,
    storage: Storage = None,
) -> None:
    """Write the merged model with its recipe inside, or, to a .json file, the recipe alone."""
    from lcsc_opt.base.errors import StudyStoreError
    from lcsc_opt.base.files import write_atomically
    from lcsc_opt.database.history import as_known, sign_of
    from lcsc_opt.exports import merging, publishing, writing
    from lcsc_opt.exports.recipe import Recipe
    from lcsc_opt.search.execution import mergeable_objective_of

    destination = None
    if out.suffix != ".json":
        destination = writing.Destination.of(out, form=form, dtype=dtype, config=config, overwrite=overwrite)
    if push_to_hub is not None:
        publishing.check_repository(push_to_hub, destination)
    stored = find_study(study, storage)
    objective = mergeable_objective_of(stored)
    if destination is None:
        recipe = Recipe.of_trial(stored, objective, number=trial, dtype=dtype)
        write_atomically(out, recipe.as_text().encode(), error=StudyStoreError)
    else:
        recipe = merging.export(stored, objective, destination, number=trial)
    sign = sign_of(stored.attributes)
    line = f"{out}: trial {recipe.trial} of {study}, searched {number(as_known(recipe.loss, sign))}"
    if recipe.held_out is not None:
        held_out_loss: Any = recipe.held_out["loss"]
        line += f", held-out {sign * held_out_loss:.4g}"
    say(line)
    if destination is not None and push_to_hub is not None:
        say(publishing.push_to_hub(push_to_hub, destination, stored, objective, recipe))


def apply(
    recipe: Annotated[
        str,
        typer.Argument(help="A recipe, an exported model, ema:RATE, power:WIDTH (EDM2's), or coefficients in JSON."),
    ],
    checkpoints: Annotated[list[str], typer.Argument(help="Files, folders, globs, or one packed trajectory.")],
    out: _Out,
    form: _Form = None,
    dtype: _Dtype = None,
    key: Annotated[
        str | None, typer.Option(help="Where in a nested file the weights are. Default: as in the recipe.")
    ] = None,
    steps: Steps = None,
    config: _Config = None,
    overwrite: _Overwrite = False,
) -> None:
    """Merge by a recipe, bit for bit as before; or, without a study, by an EMA rate or given coefficients."""
    from lcsc_opt.exports.coefficients import coefficients_named
    from lcsc_opt.exports.merging import average, rebuild
    from lcsc_opt.exports.recipe import Recipe
    from lcsc_opt.exports.writing import Destination

    if steps is not None:
        checkpoints = in_order_of(steps, checkpoints)
    named = coefficients_named(recipe)
    if named is not None:
        destination = Destination.of(out, form=form, dtype=dtype, config=config, overwrite=overwrite)
        merged = average(checkpoints, named, destination, name=Path(recipe).name, key=key, steps=steps)
    else:
        stored_recipe = Recipe.read(Path(recipe))
        if form is None and stored_recipe.lora is not None and out.suffix == ".safetensors":
            form = "lora"  # as it was exported before
        if config is None and (Path(recipe) / "config.json").is_file():  # the recipe is in a folder of diffusers
            config = Path(recipe)
        destination = Destination.of(out, form=form, dtype=dtype, config=config, overwrite=overwrite)
        merged = rebuild(stored_recipe, checkpoints, destination, key=key, steps=steps)
    say(f"{out}: {merged.title}, from {len(merged.steps)} checkpoints")


def average(
    checkpoints: Annotated[
        list[str], typer.Argument(help="A LoRA's epochs, or a model's: files, a folder, globs, one packed trajectory.")
    ],
    prompts: Annotated[Path | None, typer.Option(help="A text file, one prompt a line; a row for each.")] = None,
    images: Annotated[
        int | None,
        typer.Option(min=1, help="Images of each column. Default: one a prompt, or 8; 500 with --reference."),
    ] = None,
    pipeline: Annotated[
        str | None, typer.Option(help="The folder of diffusers that they are for. Default: the one next to them.")
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="lcm, euler, dpm-solver++, ddim ... Default: the pipeline's own.")
    ] = None,
    sampling_steps: Annotated[int, typer.Option(min=1, help="Steps of the sampler.")] = 20,
    guidance: Annotated[
        float | None, typer.Option(min=0, help="The scale of guidance. Default: the pipeline's, 1 with lcm.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise, which is the same for all columns.")] = 0,
    reward: Annotated[str | None, typer.Option(help="Scores images: module:function.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="Real images, to measure the distance to them: a folder, an .npz, a data set.")
    ] = None,
    metric: Annotated[str, typer.Option(help="The distance to --reference, such as kid, fid@clip.")] = "fid",
    weights: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="Weights of an extractor."),
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND", help="A further column, such as last:4 or ema:0.999; may be repeated."),
    ] = None,
    most_checkpoints: Annotated[int, typer.Option(min=1, help="Of more, so many have a column, evenly spaced.")] = 24,
    out: Annotated[Path, typer.Option("--output", "-o", help="The contact sheet, a PNG.")] = Path("averages.png"),
    export: Annotated[Path | None, typer.Option(help="Write the best column, or --choose, as a model.")] = None,
    choose: Annotated[
        str | None, typer.Option(metavar="KIND", help="The column to export, such as step:300 or ema:0.999.")
    ] = None,
    form: _Form = None,
    overwrite: _Overwrite = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of the networks: fp32, bf16 or fp16.")] = "fp32",
    lora_alpha: Annotated[float | None, typer.Option(help="If no file of the LoRA tells it.")] = None,
    key: Annotated[str | None, typer.Option(help="Where in a nested file the weights are.")] = None,
    steps: Steps = None,
    output: Output = "table",
) -> None:
    """Sample each checkpoint and the usual averages from the same noise, on one sheet; measure and export them."""
    from lcsc_opt.base.errors import StudySpecError
    from lcsc_opt.base.files import write_atomically
    from lcsc_opt.exports.comparing import compare_averages
    from lcsc_opt.exports.writing import Destination

    if steps is not None:
        checkpoints = in_order_of(steps, checkpoints)
    if out.suffix != ".png":
        raise StudySpecError(f"{out}: the contact sheet is a PNG; end its name in .png")
    if choose is not None and export is None:
        raise StudySpecError("--choose: names what --export writes; give --export PATH, too")
    if export is None and (form is not None or overwrite):
        raise StudySpecError("--as and --overwrite: say how --export writes; give --export PATH, too")
    if export is not None:
        Destination.of(export, form=form, overwrite=overwrite)
        if choose is None and (reward is None) == (reference is None):
            raise StudySpecError("--export: give --choose KIND; or --reward or --reference, to choose the best by")
    further = list(also or ())
    if choose is not None:
        further.append(choose)
    compared = compare_averages(
        checkpoints,
        pipeline=pipeline,
        prompts=prompts,
        images=images,
        sampler=sampler,
        sampling_steps=sampling_steps,
        guidance=guidance,
        reward=reward,
        reference=reference,
        metric=metric,
        weights=assignments(weights or ()),
        also=further,
        most_checkpoints=most_checkpoints,
        seed=seed,
        device=device,
        dtype=dtype,
        lora_alpha=lora_alpha,
        key=key,
        steps=steps,
    )
    write_atomically(out, compared.sheet(), error=StudySpecError)
    rows = compared.rows_of_table()
    if output == "json":
        print_json(rows)
    elif compared.metrics:
        print_table(list(rows[0]), [_cells(row, compared.best) for row in rows])
    say(f"{out}: {len(compared.averages)} columns of {len(compared.labels)} images, from the same noise")
    if export is None:
        say(f"next: lcsc apply {compared.best or 'KIND'} {' '.join(checkpoints)} -o best.safetensors")
        return
    form = form or compared.default_form(export)
    destination = Destination.of(export, form=form, overwrite=overwrite)
    recipe = compared.export(destination, choose)
    say(f"{export}: {recipe.study}, from {len(recipe.steps)} checkpoints")


def _cells(row: Mapping[str, str | float | None], best: str | None) -> list[str]:
    """A row of the table of averages, with the best one marked."""
    cells = []
    for value in row.values():
        if isinstance(value, str):
            cells.append(f"{value} (best)" if value == best else value)
        else:
            cells.append(number(value))
    return cells
