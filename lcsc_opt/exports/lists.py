"""A recipe as other programs take it: Megatron-LM's list of ``PATH:WEIGHT``, and mergekit's YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lcsc_opt.base.errors import ObjectiveError, StudyStoreError
from lcsc_opt.base.files import write_atomically
from lcsc_opt.exports.exact_merge import CheckpointFiles
from lcsc_opt.exports.recipe import Recipe
from lcsc_opt.exports.writing import Destination
from lcsc_opt.trajectory import Trajectory

LISTS = ("megatron", "mergekit")


def write_list(checkpoints: Trajectory | CheckpointFiles, recipe: Recipe, to: Destination) -> Recipe:
    """Write the paths of the checkpoints with their coefficients, in the form of :data:`LISTS`; no weights are read.

    ``megatron`` is a line for each checkpoint, to be given to ``weighted_merge.py --merge-inputs``. ``mergekit`` is
    its method ``linear`` in float32, without normalization. With a row for each group of layers it has a filter for
    each tensor. Checkpoints that have no weight are left out.

    Raises:
        ObjectiveError: the other program cannot do this merge, or a checkpoint is in no file.
        TrajectoryError: a checkpoint is missing.
        StudyStoreError: the disk refuses.
    """
    row_of, coefficients = recipe.in_rows()
    if to.form == "megatron" and len(coefficients) > 1:
        raise ObjectiveError(
            "Megatron-LM merges with one weight for each checkpoint, and these have rows: --as mergekit"
        )
    if recipe.statistics is not None:
        raise ObjectiveError(
            f"{to.form} only merges, and this model has statistics of its own: export the model itself"
        )
    places = recipe.needed_of(checkpoints.steps)
    paths = {index: checkpoints.sources[place] for index, place in places.items()}
    if unnamed := [recipe.steps[index] for index, path in paths.items() if not path]:
        raise ObjectiveError(f"step {unnamed[0]} was written by a training loop into the trajectory: there is no file")
    if to.form == "megatron":
        text = "".join(f"{Path(path).absolute()}:{float(coefficients[0, i])!r}\n" for i, path in paths.items())
    else:
        # a filter matches parts of names, and the first one that does counts
        by_length = sorted(row_of, key=lambda name: (-len(name), name))

        def weight(index: int) -> Any:
            column = coefficients[:, index].tolist()
            filters: list[dict[str, Any]] = [{"filter": name, "value": column[row_of[name]]} for name in by_length]
            return [*filters, {"value": column[0]}] if len(column) > 1 else column[0]

        named = ((str(Path(path).absolute()), weight(index)) for index, path in paths.items())
        content = {
            "merge_method": "linear",
            "models": [{"model": path, "parameters": {"weight": value}} for path, value in named],
            "parameters": {"normalize": False},
            "dtype": "float32",  # in which mergekit multiplies and adds
            **({} if recipe.dtype is None else {"out_dtype": recipe.dtype}),
        }
        text = yaml.safe_dump(content, sort_keys=False)
    write_atomically(to.path, text.encode(), error=StudyStoreError)
    return recipe
