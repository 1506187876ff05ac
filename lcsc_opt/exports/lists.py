"""A recipe as other programs read it: Megatron-LM's list of ``PATH:WEIGHT``, and mergekit's YAML."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lcsc_opt.base.errors import ObjectiveError, StudyStoreError
from lcsc_opt.base.files import write_atomically
from lcsc_opt.base.records import Coefficients
from lcsc_opt.exports.exact_merge import Checkpoints
from lcsc_opt.exports.recipe import Recipe
from lcsc_opt.exports.writing import Destination

LISTS = ("megatron", "mergekit")


def write_list(checkpoints: Checkpoints, recipe: Recipe, to: Destination) -> Recipe:
    """Write the paths of the checkpoints with their coefficients, in the form of :data:`LISTS`; no weights are read.

    ``megatron`` is a line for each checkpoint, for ``weighted_merge.py --merge-inputs``. ``mergekit`` is YAML for its
    method ``linear`` in float32, without normalization; if each group of layers has a row of coefficients, it has a
    filter for each tensor. Checkpoints whose coefficients are all 0 are left out.

    Raises:
        ObjectiveError: the other program cannot do this merge, or a checkpoint has no file.
        TrajectoryError: a checkpoint is missing.
        StudyStoreError: the list cannot be written.
    """
    row_of, coefficients = recipe.in_rows()
    if to.form == "megatron" and len(coefficients) > 1:
        raise ObjectiveError(
            "Megatron-LM merges with one weight per checkpoint, and these coefficients have rows: use --as mergekit"
        )
    if recipe.statistics is not None:
        raise ObjectiveError(
            f"{to.form} only merges weights, and this model also has recomputed statistics: export the model itself"
        )
    paths: dict[int, str] = {}  # index in the recipe → absolute path
    for index, checkpoint in recipe.find_needed(checkpoints.steps).items():
        source = checkpoints.sources[checkpoint]
        if not source:
            step = checkpoints.steps[checkpoint]
            raise ObjectiveError(f"step {step} has no file: a training loop wrote it into the trajectory")
        paths[index] = str(Path(source).absolute())
    if to.form == "megatron":
        text = _megatron_list(paths, coefficients)
    else:
        text = _mergekit_yaml(paths, coefficients, row_of, recipe.dtype)
    write_atomically(to.path, text.encode(), error=StudyStoreError)
    return recipe


def _megatron_list(paths: Mapping[int, str], coefficients: Coefficients) -> str:
    return "".join(f"{path}:{float(coefficients[0, index])!r}\n" for index, path in paths.items())


def _mergekit_yaml(
    paths: Mapping[int, str], coefficients: Coefficients, row_of: Mapping[str, int], dtype: str | None
) -> str:
    # mergekit uses the first filter that is a part of a tensor's name, so the longest names come first
    names = sorted(row_of, key=lambda name: (-len(name), name))
    models = []
    for index, path in paths.items():
        column = coefficients[:, index].tolist()
        weight: float | list[dict[str, Any]] = column[0]
        if len(column) > 1:
            weight = [{"filter": name, "value": column[row_of[name]]} for name in names]
            weight.append({"value": column[0]})  # of all other tensors
        models.append({"model": path, "parameters": {"weight": weight}})
    content = {
        "merge_method": "linear",
        "models": models,
        "parameters": {"normalize": False},
        "dtype": "float32",  # in which mergekit multiplies and adds
    }
    if dtype is not None:
        content["out_dtype"] = dtype
    return yaml.safe_dump(content, sort_keys=False)
