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
from lcsc_opt.coefficients.profiles import check_coefficients
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


def listed_coefficients(path: Path, steps: Sequence[int]) -> Coefficients:
    """The coefficients in a JSON file: ``[K]`` numbers, or a mapping from steps; steps that it leaves out are zero.

    They may be under the key ``coefficients``, as in recipes and in what ``lcsc show --format json`` prints.

    Raises:
        StudySpecError: it cannot be read, or holds something else.
    """
    try:
        content: Any = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise StudySpecError(f"{path}: cannot be read as JSON ({error})") from error
    if isinstance(content, Mapping) and "coefficients" in content:
        content = content["coefficients"]
    if isinstance(content, Mapping):
        given = {str(step): value for step, value in content.items()}
        if unknown := sorted(set(given) - {str(step) for step in steps}):
            there = f"there are {steps[0]} to {steps[-1]}"
            raise StudySpecError(f"{path}: no checkpoint has the step {unknown[0]}; {there}")
        content = [given.get(str(step), 0.0) for step in steps]
    return check_coefficients(content, len(steps))
