"""A model made again from its recipe and the checkpoints, bit for bit, on any machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.checkpoints.finding import find_checkpoints, is_packed
from lcsc_opt.exports.model_folder import CONFIG, check_fits, read_config
from lcsc_opt.exports.recipe import LoraNaming, Recipe
from lcsc_opt.exports.writing import Destination, write
from lcsc_opt.trajectory import Trajectory
from lcsc_opt.trajectory.exact_merge import CheckpointFiles, PackedCheckpoints, merge_exactly
from lcsc_opt.trajectory.packing import find_sources


def rebuild(
    recipe: Recipe,
    patterns: Sequence[str | Path],
    to: Destination,
    *,
    key: str | None = None,
    steps: Sequence[int] | None = None,
    beside: Path | None = None,
) -> Recipe:
    """Combine the checkpoints of a recipe again, and write the model.

    Args:
        recipe: of an exported model.
        patterns: checkpoint files, folders or globs, or one packed trajectory.
        to: where the model is written, and how; without a dtype, in the recipe's.
        key: which state dict of each file; ``None`` takes the recipe's.
        steps: the training step of each file, ``[N]``; ``None`` takes them from metadata and names.
        beside: where the recipe was read: a folder of diffusers also has the configuration.

    Returns:
        The recipe that is inside the new model.

    Raises:
        ObjectiveError: the recipe cannot be followed, or the weights do not fit the configuration.
        TrajectoryError: a checkpoint is missing, or is not the one that the recipe names.
        StudyStoreError: the disk refuses.
    """
    combination = recipe.combination()
    config = None
    if to.form == "diffusers":
        own = beside is not None and (beside / CONFIG).is_file()
        place = beside if own and to.config is None else to.config
        if place is None:
            raise ObjectiveError(f"{to.path}: pass --config FOLDER of the model, which a recipe does not hold")
        config = read_config(place)
    to = dataclasses.replace(to, dtype=to.dtype or recipe.dtype)
    checkpoints = _open(patterns, recipe.key if key is None else key, steps)
    recipe = recipe.model_copy(update={"dtype": to.dtype, "lora": _lora_naming(recipe, checkpoints, to)})
    if config is not None:  # checked with one checkpoint, before all of them are read
        check_fits(config, checkpoints.read(checkpoints.steps[0]))
    weights = merge_exactly(checkpoints, combination, dtype=to.dtype)
    weights |= _statistics(recipe)
    write(weights, recipe, to, config=config)
    return recipe


def _statistics(recipe: Recipe) -> dict[str, Tensor]:
    """Name → tensor of the recipe's statistics."""
    if recipe.statistics is None:
        return {}
    try:
        return load(bytes.fromhex(recipe.statistics))
    except (ValueError, SafetensorError) as error:
        raise ObjectiveError(f"{recipe.study}: the recipe's statistics cannot be read: export it again") from error


def _open(
    patterns: Sequence[str | Path], key: str | None, steps: Sequence[int] | None
) -> CheckpointFiles | PackedCheckpoints:
    if len(patterns) == 1 and is_packed(Path(patterns[0])):
        return PackedCheckpoints(Trajectory.open(patterns[0]))
    found = find_sources(find_checkpoints(patterns, key=key), steps)
    return CheckpointFiles({source.step: source.path for source in found}, key=key)


def _lora_naming(
    recipe: Recipe, checkpoints: CheckpointFiles | PackedCheckpoints, to: Destination
) -> LoraNaming | None:
    """The recipe's naming; where it has none, since the checkpoints' own names were kept, one with their alphas."""
    if recipe.lora is not None or to.form != "lora":
        return recipe.lora
    return LoraNaming(alphas=checkpoints.lora_alphas())
