"""``lcsc export``, ``recipe``, ``apply``: write the merged model, print how it was merged, and merge it again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lcsc_opt.cli.options import Output, Steps, Storage, Study, parse_steps
from lcsc_opt.cli.output import Format, console, number, print_json, say, table
from lcsc_opt.cli.stored import study_in, to_read

if TYPE_CHECKING:
    from lcsc_opt.exports import Recipe

SHOWN = 10  # coefficients, the largest ones
DIGITS = 12  # of a hash

Out = Annotated[Path, typer.Option("--output", "-o", help="A .safetensors or .pt file, or a folder for diffusers.")]
Form = Annotated[
    str | None,
    typer.Option("--as", help="safetensors, pt, diffusers or lora; without it as the name of the output ends."),
]
Dtype = Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; without it as the checkpoints.")]
Config = Annotated[
    Path | None, typer.Option(help="A model's folder with config.json, for --as diffusers of another network.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing export.")]


def add_commands(app: typer.Typer) -> None:
    """Put this module's commands into the app."""
    for command in (export, recipe, apply, average):
        app.command()(command)


def export(
    study: Study,
    out: Out,
    form: Form = None,
    dtype: Dtype = None,
    trial: Annotated[
        int | None, typer.Option(min=0, help="Its number; without it the one chosen on held-out noise.")
    ] = None,
    config: Config = None,
    overwrite: Overwrite = False,
    storage: Storage = None,
) -> None:
    """Write the merged model, with the recipe in its metadata. Works while the study runs, too."""
    from lcsc_opt.exports import writing
    from lcsc_opt.search.experiment import Experiment
    from lcsc_opt.search.plan import stored_plan

    to = writing.Destination.of(out, form=form, dtype=dtype, config=config, overwrite=overwrite)
    opened = to_read(storage)
    stored = study_in(opened, study)
    made = writing.export(stored, Experiment(opened, stored_plan(stored)).objective, to, number=trial)
    known = "" if made.held_out is None else f", held-out {made.held_out['loss']:.4g}"
    say(f"{out}: trial {made.trial} of {study}, searched {number(made.loss)}{known}")


def recipe(
    source: Annotated[str, typer.Argument(help="An exported model, a recipe as JSON, or experiment/optimizer/seed.")],
    trial: Annotated[int | None, typer.Option(min=0, help="Of a study; without it the one it would export.")] = None,
    storage: Storage = None,
    output: Output = Format.table,
) -> None:
    """Print how a model was merged. A recipe is the checkpoints, their coefficients, and the trial."""
    shown = _recipe(source, trial, storage)
    if output is Format.json:
        print_json(shown.model_dump())
    else:
        _print_recipe(shown)


def _recipe(source: str, trial: int | None, storage: str | None) -> Recipe:
    from lcsc_opt.exports.recipe import read_recipe, recipe_of

    if Path(source).exists() or Path(source).suffix:
        return read_recipe(Path(source))
    from lcsc_opt.search.experiment import Experiment
    from lcsc_opt.search.plan import stored_plan

    opened = to_read(storage)
    stored = study_in(opened, source)
    return recipe_of(stored, Experiment(opened, stored_plan(stored)).objective, number=trial)


def _print_recipe(shown: Recipe) -> None:
    import numpy as np

    from lcsc_opt.cli.trajectory import sparkline
    from lcsc_opt.database.summary import describe_coefficients

    coefficients = np.array(shown.coefficients)
    summary = table(shown.title, "")
    summary.columns[1].justify = "left"
    numbers: dict[str, Any] = {"loss": shown.loss, **shown.metrics}
    scores = {
        "searched": ", ".join(f"{name} {number(value)}" for name, value in numbers.items()),
        "held out": _held_out(shown.held_out),
    }
    rows = {
        **(scores if shown.trial is not None else {}),  # a merge without a study has no scores
        "checkpoints": f"{len(shown.steps)}, steps {shown.steps[0]} to {shown.steps[-1]}",
        "key": "-" if shown.key is None else shown.key or "the bare state dict",
        "trajectory": shown.trajectory_sha256,
        "method": shown.method,
        "dtype": shown.dtype or "as the checkpoints",
        "coefficients": ", ".join(
            f"{name.replace('_', ' ')} {value:.4g}"
            for name, value in describe_coefficients(coefficients, shown.steps).items()
        ),
        "positive": sparkline(np.maximum(coefficients, 0).tolist()),
        "negative": sparkline(np.maximum(-coefficients, 0).tolist()),
        "made with": f"lcsc_opt {shown.lcsc_opt}, " + ", ".join(f"{k} {v}" for k, v in shown.versions.items()),
    }
    for name, value in rows.items():
        summary.add_row(name, value)
    console().print(summary)
    largest = table("step", "coefficient", "SHA-256", title=f"\nthe {min(SHOWN, len(coefficients))} largest")
    hashes = shown.checkpoint_sha256 or ("",) * len(coefficients)
    for index in sorted(np.argsort(-np.abs(coefficients), kind="stable")[:SHOWN]):
        largest.add_row(str(shown.steps[index]), f"{coefficients[index]:+.4f}", hashes[index][:DIGITS])
    console().print(largest)


def _held_out(held_out: dict[str, Any] | None) -> str:
    if held_out is None:
        return "not measured; `lcsc evaluate` does"
    numbers = {"loss": held_out["loss"], **held_out.get("metrics", {})}
    shown = ", ".join(f"{name} {number(value)}" for name, value in numbers.items())
    return f"{shown}, on {held_out['images']:,} images" if held_out["images"] else shown


def apply(
    recipe: Annotated[Path, typer.Argument(help="An exported model, or a recipe as JSON.")],
    checkpoints: Annotated[list[str], typer.Argument(help="Files, folders, globs, or one packed trajectory.")],
    out: Out,
    form: Form = None,
    dtype: Dtype = None,
    key: Annotated[str | None, typer.Option(help="Where in a nested file the weights are; else the recipe's.")] = None,
    steps: Steps = None,
    config: Config = None,
    overwrite: Overwrite = False,
) -> None:
    """Merge the same bits again elsewhere, by a recipe. Checkpoints are matched by step and verified by hash."""
    from lcsc_opt.exports.rebuild import rebuild
    from lcsc_opt.exports.recipe import read_recipe
    from lcsc_opt.exports.writing import Destination

    followed = read_recipe(recipe)
    if form is None and followed.lora is not None and out.suffix == ".safetensors":
        form = "lora"  # as it was exported before
    to = Destination.of(out, form=form, dtype=dtype, config=config, overwrite=overwrite)
    given = parse_steps(steps)
    made = rebuild(followed, checkpoints, to, key=key, steps=given, beside=recipe)
    say(f"{out}: {made.title}, from {len(made.steps)} checkpoints")


def average(
    checkpoints: Annotated[list[str], typer.Argument(help="Files, folders, globs, or one packed trajectory.")],
    out: Out,
    ema: Annotated[float | None, typer.Option(min=0, max=1, help="The rate per training step, as 0.9999.")] = None,
    power: Annotated[float | None, typer.Option(help="The relative width of EDM2's power profile, as 0.1.")] = None,
    coefficients: Annotated[
        Path | None, typer.Option(help="JSON: a list with one for each checkpoint, or a mapping from steps.")
    ] = None,
    form: Form = None,
    dtype: Dtype = None,
    key: Annotated[str | None, typer.Option(help="Where in a nested file the weights are.")] = None,
    steps: Steps = None,
    config: Config = None,
    overwrite: Overwrite = False,
) -> None:
    """Merge once, without a study; the recipe is inside. Give an EMA's rate, EDM2's power profile, or coefficients."""
    import functools

    from lcsc_opt.coefficients.profiles import ema_coefficients, power_ema_coefficients
    from lcsc_opt.exports import averaging
    from lcsc_opt.exports.writing import Destination

    ways: dict[str, Any] = {}
    if ema is not None:
        ways[f"EMA {ema:g}"] = functools.partial(ema_coefficients, rate=ema)
    if power is not None:
        ways[f"power EMA {power:g}"] = functools.partial(power_ema_coefficients, sigma_rel=power)
    if coefficients is not None:
        ways[f"coefficients of {coefficients.name}"] = functools.partial(averaging.listed_coefficients, coefficients)
    if len(ways) != 1:
        raise typer.BadParameter("give one of --ema, --power and --coefficients")
    [(name, way)] = ways.items()
    to = Destination.of(out, form=form, dtype=dtype, config=config, overwrite=overwrite)
    made = averaging.average(checkpoints, way, to, name=name, key=key, steps=parse_steps(steps))
    say(f"{out}: {name} of {len(made.steps)} checkpoints, steps {made.steps[0]} to {made.steps[-1]}")
