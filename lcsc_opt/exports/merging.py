"""Models that are merged and written: a study's, one made again from its recipe, and one merge without a study."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load, save

from lcsc_opt.base.errors import ObjectiveError, StudySpecError
from lcsc_opt.base.paths import cache_directory
from lcsc_opt.base.progress import notice
from lcsc_opt.base.records import Coefficients
from lcsc_opt.base.settings import parse_settings
from lcsc_opt.base.study_file import SpaceSpec
from lcsc_opt.checkpoints.finding import find_checkpoints, is_packed
from lcsc_opt.checkpoints.lora import LoraAlphas, lora_flavour
from lcsc_opt.coefficients.profiles import check_coefficients, ema_coefficients, power_ema_coefficients
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.exports.exact_merge import CheckpointFiles, cast, merge_exactly
from lcsc_opt.exports.lists import LISTS, write_list
from lcsc_opt.exports.recipe import LoraNaming, Recipe, packed_trajectory
from lcsc_opt.exports.writing import Destination
from lcsc_opt.objective.contract import Objective
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
    networks: Any = (getattr(objective.sampler, name, None) for name in ("network", "denoiser"))  # or of a pipeline
    own = (str(network.to_json_string()) for network in networks if hasattr(network, "to_json_string"))
    config = to.config_text(next(own, None))
    trajectory = packed_trajectory(objective)
    if to.form == "lora":
        recipe = recipe.model_copy(update={"lora": _lora_of(study, objective, trajectory)})
    if statistics := cast(dict(objective.statistics(np.array(recipe.coefficients, dtype=np.float64))), to.dtype):
        recipe = recipe.model_copy(update={"statistics": save(statistics).hex()})
    if to.form not in ("lora", *LISTS) and lora_flavour(trajectory.names) not in (None, "kohya"):
        notice(f"{to.path}: holds a LoRA under its own names; --as lora writes what load_lora_weights loads")
    return _write(trajectory, recipe, to, config)


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
        recipe: of an exported model; its key and dtype hold where no other is given.
        patterns: checkpoint files, folders or globs, or one packed trajectory.
        to: where the model is written, and how.
        key: which state dict of each file.
        steps: the training step of each file, ``[N]``; ``None`` takes them from metadata and names.

    Returns:
        The recipe that is inside the new model.

    Raises:
        ObjectiveError: the recipe cannot be followed, or the weights do not fit the configuration.
        TrajectoryError: a checkpoint is missing, or is not the one that the recipe names.
        StudyStoreError: the disk refuses.
    """
    config = to.config_text()
    if len(patterns) == 1 and is_packed(Path(patterns[0])):
        checkpoints: CheckpointFiles | Trajectory = Trajectory.open(patterns[0])
    else:
        key = recipe.key if key is None else key
        checkpoints = CheckpointFiles(find_sources(find_checkpoints(patterns, key=key), steps), key=key)
    naming = recipe.lora
    if naming is None and to.form == "lora":  # the checkpoints' own names were kept
        naming = LoraNaming(alphas=checkpoints.lora_alphas())
    recipe = recipe.model_copy(update={"dtype": to.dtype or recipe.dtype, "lora": naming})
    return _write(checkpoints, recipe, to, config)


def average(
    patterns: Sequence[str | Path],
    named: Callable[[Trajectory], tuple[Trajectory, Coefficients]],
    to: Destination,
    *,
    name: str,
    key: str | None = None,
    steps: Sequence[int] | None = None,
) -> Recipe:
    """Combine checkpoints once, and write the model with its recipe inside; :func:`rebuild` makes the same bytes again.

    ``named`` comes from :func:`coefficients_named`, and ``name`` is the model's in the recipe; the others are as
    for :func:`rebuild`. Files are packed into the cache.

    Raises:
        TrajectoryError: checkpoints that cannot be read or do not belong together.
        StudySpecError: the coefficients' number is not that of the checkpoints, or of their layer groups, or their sum
            is not one.
        ObjectiveError: a folder of diffusers without a configuration.
        StudyStoreError: the disk refuses.
    """
    config = to.config_text()
    trajectory, coefficients = named(open_or_pack(patterns, cache=cache_directory(), key=key, steps=steps))
    return _write(trajectory, Recipe.of(trajectory, coefficients, study=name, dtype=to.dtype), to, config)


def _write(checkpoints: Trajectory | CheckpointFiles, recipe: Recipe, to: Destination, config: str | None) -> Recipe:
    """Merge by a recipe and write the model, or only the list; gives the recipe."""
    if to.form in LISTS:
        return write_list(checkpoints, recipe, to)
    weights = merge_exactly(checkpoints, recipe)
    if recipe.statistics is not None:
        try:
            weights |= load(bytes.fromhex(recipe.statistics))
        except (ValueError, SafetensorError) as error:
            raise ObjectiveError(f"{recipe.study}: the recipe's statistics cannot be read: export it again") from error
    to.write(weights, recipe, config)
    return recipe


def _lora_of(study: StoredStudy, objective: Objective, trajectory: Trajectory) -> LoraNaming:
    """The naming of the study's LoRA, with the alphas that it was searched with."""
    pipeline = getattr(objective.sampler, "pipeline", None)
    layers = getattr(getattr(getattr(pipeline, "unet", None), "config", None), "layers_per_block", None)
    known: Any = study.attributes.get("fingerprint")
    for name in ("objective", "sampler", "lora", "alphas"):  # as a text-to-image objective describes itself
        known = known.get(name) if isinstance(known, dict) else None
    return LoraNaming(
        component="unet" if getattr(pipeline, "transformer", None) is None else "transformer",
        alphas=LoraAlphas(**known) if known else trajectory.lora_alphas(),
        layers_per_block=layers if isinstance(layers, int) else None,
    )


def coefficients_named(source: str) -> Callable[[Trajectory], tuple[Trajectory, Coefficients]] | None:
    """``ema:RATE``, ``power:WIDTH`` or a JSON file of coefficients, as a function of the checkpoints.

    The function gives the coefficients, and the trajectory in layer groups where there is a row for each of them.
    A file holds ``[K]`` numbers, or has them under the key ``coefficients``, as what ``lcsc show STUDY --format json``
    prints; there may be ``[S, K]`` of them then, with ``layer_groups``, a mapping with the ``names`` ``[S]`` and the
    ``rows`` of a study file's space.

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
        return lambda trajectory: (trajectory, by_rate(trajectory.steps, value))
    path = Path(source)
    if path.suffix != ".json":
        return None
    try:
        content: Any = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise StudySpecError(f"{path}: cannot be read as JSON ({error})") from error
    if isinstance(content, Mapping) and "checkpoint_sha256" in content:
        return None
    groups: Any = None
    if isinstance(content, Mapping) and "coefficients" in content:
        content, groups = content["coefficients"], content.get("layer_groups")
        if groups is not None and not (isinstance(groups, Mapping) and isinstance(groups.get("names"), list)):
            raise StudySpecError(f"{path}: layer_groups: expected rows and names, as of lcsc show STUDY --format json")

    def listed(trajectory: Trajectory) -> tuple[Trajectory, Coefficients]:
        steps = trajectory.steps
        if groups is not None:
            rule = parse_settings(SpaceSpec, {"rows": groups.get("rows")}, source=str(path)).rows
            trajectory = trajectory.in_rows(rule)
            names = [] if trajectory.layer_groups is None else list(trajectory.layer_groups.names)
            if names != groups["names"]:
                new = [name for name in names if name not in groups["names"]]
                other = f"there is no row for {new[0]}" if new else f"they have {len(names)} of {len(groups['names'])}"
                raise StudySpecError(f"{path}: the layer groups of these checkpoints are other ones: {other}")
            return trajectory, check_coefficients(content, len(steps), rows=len(names))
        return trajectory, check_coefficients(content, len(steps))

    return listed
