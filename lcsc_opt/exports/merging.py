"""Models that are merged and written: a study's, one made again from its recipe, and one merge without a study."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.paths import BuildContext
from lcsc_opt.base.progress import notice
from lcsc_opt.base.records import Coefficients
from lcsc_opt.checkpoints.finding import find_checkpoints, is_packed
from lcsc_opt.checkpoints.lora import LoraAlphas, lora_flavour
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.exports.coefficients import CoefficientsOf
from lcsc_opt.exports.exact_merge import CheckpointFiles, Checkpoints, cast, merge_exactly
from lcsc_opt.exports.recipe import LoraNaming, Recipe, packed_trajectory
from lcsc_opt.exports.writing import CONFIG, Destination
from lcsc_opt.objective.contract import Objective
from lcsc_opt.sampling.base import Sampler
from lcsc_opt.trajectory import Trajectory, open_or_pack
from lcsc_opt.trajectory.sources import find_sources


def export(study: StoredStudy, objective: Objective, to: Destination, *, number: int | None = None) -> Recipe:
    """Write the best model so far, or one trial's. It only reads the database: the study may be running meanwhile.

    Returns:
        The recipe inside the model.

    Raises:
        ObjectiveError: the objective has no weights, or they do not fit the configuration.
        StudyStoreError: the checkpoints are not those of the study, no such trial, or the file cannot be written.
        TrajectoryError: the checkpoints are damaged.
    """
    recipe = Recipe.of_trial(study, objective, number=number, dtype=to.dtype)
    trajectory = packed_trajectory(objective)
    _check_adapter(trajectory, to)
    default_config = network_config(objective.sampler)
    if default_config is None and to.config is None:
        to = dataclasses.replace(to, config=_model_folder(study))
    config = to.config_text(default_config)
    changes: dict[str, Any] = {}
    if to.form == "lora":
        alphas = _searched_alphas(study)
        if alphas is None:
            alphas = trajectory.lora_alphas()
        changes["lora"] = lora_naming(objective.sampler, alphas)
    statistics = objective.statistics(np.array(recipe.coefficients, dtype=np.float64))
    if statistics:
        changes["statistics"] = save(cast(dict(statistics), to.dtype)).hex()
    return _write(trajectory, recipe.model_copy(update=changes), to, config)


def _model_folder(study: StoredStudy) -> Path | None:
    """The folder with a configuration that the setting ``model`` of a score names; ``None`` if it names none."""
    model = study.attributes["specification"]["objective"]["settings"].get("model")
    if not isinstance(model, str):
        return None
    directory = study.attributes["directory"]
    context = BuildContext(None if directory is None else Path(directory))
    folder = context.path(model)
    return folder if (folder / CONFIG).is_file() else None


def rebuild(
    recipe: Recipe,
    patterns: Sequence[str | Path],
    to: Destination,
    *,
    key: str | None = None,
    steps: Sequence[int] | None = None,
) -> Recipe:
    """Combine the checkpoints of a recipe again, bit for bit on any machine, and write the model.

    Args:
        recipe: the recipe of an exported model; its key and dtype hold where no other is given.
        patterns: checkpoint files, folders or globs, or one packed trajectory.
        to: where the model is written, and how.
        key: which state dict of each file.
        steps: the training step of each file, ``[N]``; ``None`` reads them from metadata, contents and names.

    Returns:
        The recipe that is inside the new model.

    Raises:
        ObjectiveError: the recipe cannot be followed, or the weights do not fit the configuration.
        TrajectoryError: a checkpoint is missing, or is not the one that the recipe names.
        StudyStoreError: the disk refuses.
    """
    config = to.config_text()
    checkpoints: Checkpoints
    if len(patterns) == 1 and is_packed(Path(patterns[0])):
        checkpoints = Trajectory.open(patterns[0])
    else:
        if key is None:
            key = recipe.key
        paths = find_sources(find_checkpoints(patterns, key=key), steps)
        checkpoints = CheckpointFiles(paths, key=key)
    naming = recipe.lora
    if naming is None and to.form == "lora":  # the first export kept the checkpoints' own names
        naming = LoraNaming(alphas=checkpoints.lora_alphas())
    recipe = recipe.model_copy(update={"dtype": to.dtype or recipe.dtype, "lora": naming})
    return _write(checkpoints, recipe, to, config)


def average(
    patterns: Sequence[str | Path],
    coefficients_of: CoefficientsOf,
    to: Destination,
    *,
    name: str,
    key: str | None = None,
    steps: Sequence[int] | None = None,
) -> Recipe:
    """Combine checkpoints once, and write the model with its recipe inside; :func:`rebuild` makes the same bytes again.

    ``coefficients_of`` comes from :func:`lcsc_opt.exports.coefficients.coefficients_named`, and ``name`` is the model's
    in the recipe; the rest is as for :func:`rebuild`. Files are packed beside it meanwhile.

    Raises:
        TrajectoryError: checkpoints that cannot be read or do not belong together.
        StudySpecError: the coefficients' number is not that of the checkpoints, or of their layer groups, or their sum
            is not one.
        ObjectiveError: a folder of diffusers without a configuration.
        StudyStoreError: the disk refuses.
    """
    config = to.config_text()
    beside = to.path.absolute().parent
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".lcsc-", dir=beside) as folder:
        packed = open_or_pack(patterns, folder=Path(folder), key=key, steps=steps)
        trajectory, coefficients = coefficients_of(packed)
        return write_average(trajectory, coefficients, to, name=name, config=config)


def write_average(
    trajectory: Trajectory,
    coefficients: Coefficients,
    to: Destination,
    *,
    name: str,
    config: str | None = None,
    naming: LoraNaming | None = None,
) -> Recipe:
    """Combine the checkpoints of a trajectory, and write the model with its recipe inside.

    Args:
        trajectory: K checkpoints.
        coefficients: ``[K]``, or a row for each layer group of the trajectory.
        to: where the model is written, and how.
        name: the model's in the recipe.
        config: ``config.json`` of a model folder.
        naming: what the names of a LoRA depend on; ``None`` is a U-Net's, with the alphas of the checkpoints.

    Returns:
        The recipe that is inside the model.

    Raises:
        ObjectiveError: a model folder for a LoRA, or weights that do not fit the configuration.
        TrajectoryError: the form is that of a LoRA, and the checkpoints are not LoRAs.
        StudyStoreError: the disk refuses.
    """
    _check_adapter(trajectory, to)
    recipe = Recipe.of(trajectory, coefficients, study=name, dtype=to.dtype)
    if to.form == "lora":
        naming = naming or LoraNaming(alphas=trajectory.lora_alphas())
        recipe = recipe.model_copy(update={"lora": naming})
    return _write(trajectory, recipe, to, config)


def _write(checkpoints: Checkpoints, recipe: Recipe, to: Destination, config: str | None) -> Recipe:
    """Merge by a recipe and write the model. Returns the recipe."""
    weights = merge_exactly(checkpoints, recipe)
    if checkpoints.stored is not None:
        notice(f"{to.path}: merged from checkpoints that were rounded to {checkpoints.stored} when they were packed")
    weights.update(_statistics_in(recipe))
    to.write(weights, recipe, config)
    return recipe


def _statistics_in(recipe: Recipe) -> dict[str, Tensor]:
    if recipe.statistics is None:
        return {}
    try:
        return load(bytes.fromhex(recipe.statistics))
    except (ValueError, SafetensorError) as error:
        raise ObjectiveError(f"{recipe.study}: the recipe's statistics cannot be read: export it again") from error


def _check_adapter(trajectory: Trajectory, to: Destination) -> None:
    """Refuse a model's folder for an adapter; say which form its user loads."""
    flavour = lora_flavour(trajectory.names)
    if flavour is None:
        return
    if to.form == "diffusers":
        file = to.path / "adapter_model.safetensors"
        raise ObjectiveError(
            f"{to.path}: an adapter is written as a file, not as a model folder. For PEFT: -o {file}, and copy the "
            "checkpoints' adapter_config.json next to it; for a pipeline of diffusers: --as lora"
        )
    if to.form != "lora" and flavour != "kohya":
        notice(f"{to.path}: holds a LoRA under its own names; --as lora writes what load_lora_weights loads")


def network_config(sampler: Sampler | None) -> str | None:
    """The ``config.json`` of the network of a sampler, if it is one of diffusers."""
    for name in ("network", "denoiser"):  # alone, or of a pipeline
        network: Any = getattr(sampler, name, None)
        if hasattr(network, "to_json_string"):
            return str(network.to_json_string())
    return None


def lora_naming(sampler: Sampler | None, alphas: LoraAlphas) -> LoraNaming:
    """What the names of a LoRA for the pipeline of a sampler depend on."""
    pipeline = getattr(sampler, "pipeline", None)
    unet_config = getattr(getattr(pipeline, "unet", None), "config", None)
    layers_per_block = getattr(unet_config, "layers_per_block", None)
    if not isinstance(layers_per_block, int):
        layers_per_block = None
    component = "unet"
    if getattr(pipeline, "transformer", None) is not None:
        component = "transformer"
    return LoraNaming(component=component, alphas=alphas, layers_per_block=layers_per_block)


def _searched_alphas(study: StoredStudy) -> LoraAlphas | None:
    """The alphas in the fingerprint of a study, where a text-to-image objective has put them."""
    entry: Any = study.attributes.get("fingerprint")
    for name in ("objective", "sampler", "lora", "alphas"):
        if not isinstance(entry, dict):
            return None
        entry = entry.get(name)
    return LoraAlphas(**entry) if entry else None
