"""One merge without a study: checkpoints with given coefficients, and the recipe."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lcsc_opt.base.errors import ObjectiveError, StudySpecError
from lcsc_opt.base.paths import cache_directory
from lcsc_opt.base.progress import notice
from lcsc_opt.base.records import Coefficients
from lcsc_opt.coefficients.profiles import check_coefficients, ema_coefficients, power_ema_coefficients
from lcsc_opt.exports.model_folder import read_config
from lcsc_opt.exports.recipe import Recipe
from lcsc_opt.exports.writing import Destination, write
from lcsc_opt.trajectory import open_or_pack
from lcsc_opt.trajectory.exact_merge import PackedCheckpoints, merge_exactly


def average(
    patterns: Sequence[str | Path],
    coefficients_of: Callable[[tuple[int, ...]], Coefficients],
    to: Destination,
    *,
    name: str,
    key: str | None = None,
    steps: Sequence[int] | None = None,
) -> Recipe:
    """Combine checkpoints once, and write the model with its recipe inside; ``lcsc apply`` makes the same bytes again.

    Args:
        patterns: a packed trajectory; else files, globs or folders, which are packed into the cache.
        coefficients_of: training steps ``[K]`` → coefficients ``[K]`` that sum to one.
        to: the path and the form.
        name: of the model, in the recipe.
        key: which state dict of each file.
        steps: the training step of each file, where the names do not say them.

    Raises:
        TrajectoryError: checkpoints that cannot be read or do not belong together.
        StudySpecError: their number is not that of the checkpoints, or their sum is not one.
        ObjectiveError: a folder of diffusers without a configuration.
        StudyStoreError: the disk refuses.
    """
    if to.form == "diffusers" and to.config is None:
        raise ObjectiveError(f"{to.path}: pass --config FOLDER of the model, which checkpoints do not hold")
    config = None if to.config is None else read_config(to.config)
    trajectory = open_or_pack(patterns, cache=cache_directory(), key=key, steps=steps)
    coefficients = check_coefficients(coefficients_of(trajectory.steps), len(trajectory))
    recipe = Recipe.of(trajectory, coefficients, study=name, dtype=to.dtype)
    weights = merge_exactly(PackedCheckpoints(trajectory), recipe.combination(), dtype=to.dtype)
    write(weights, recipe, to, config=config)
    if negative := [each for each, tensor in weights.items() if each.endswith("running_var") and (tensor < 0).any()]:
        notice(
            f"{to.path}: {negative[0]} holds variances below zero, as signed coefficients make them: estimate them on "
            "images (torch.optim.swa_utils.update_bn) before you use the model"
        )
    return recipe


def coefficients_named(source: str) -> Callable[[tuple[int, ...]], Coefficients] | None:
    """``ema:RATE``, ``power:WIDTH`` or a JSON file of coefficients, as a function of the training steps ``[K]``.

    A file holds ``[K]`` numbers, or a mapping from steps, where steps that it leaves out are zero. They may be
    under the key ``coefficients``, as in what ``lcsc show STUDY --format json`` prints.

    Returns:
        ``None`` for anything else, such as a recipe.

    Raises:
        StudySpecError: the rate or the width is no number, or a .json file cannot be read.
    """
    kind, _, text = source.partition(":")
    if kind in ("ema", "power"):
        try:
            value = float(text)
        except ValueError as error:
            raise StudySpecError(f"{source}: expected a number, as in ema:0.9999 or power:0.1") from error
        by_rate = ema_coefficients if kind == "ema" else power_ema_coefficients
        return lambda steps: by_rate(steps, value)
    path = Path(source)
    if path.suffix != ".json":
        return None
    try:
        content: Any = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise StudySpecError(f"{path}: cannot be read as JSON ({error})") from error
    if isinstance(content, Mapping) and "checkpoint_sha256" in content:
        return None
    if isinstance(content, Mapping) and "coefficients" in content:
        content = content["coefficients"]
    return lambda steps: _listed(content, steps, path)


def _listed(content: Any, steps: Sequence[int], path: Path) -> Coefficients:
    if isinstance(content, Mapping):
        given = {str(step): value for step, value in content.items()}
        if unknown := sorted(set(given) - {str(step) for step in steps}):
            there = f"there are {steps[0]} to {steps[-1]}"
            raise StudySpecError(f"{path}: no checkpoint has the step {unknown[0]}; {there}")
        content = [given.get(str(step), 0.0) for step in steps]
    return check_coefficients(content, len(steps))
