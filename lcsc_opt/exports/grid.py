"""A labelled picture of models side by side: each from the same noise, with the same prompts or classes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lcsc_opt.base.errors import LcscError, ObjectiveError
from lcsc_opt.base.labelled_grid import GridRow, labelled_grid
from lcsc_opt.base.progress import notice, progress
from lcsc_opt.base.records import HELD_OUT, Coefficients
from lcsc_opt.base.study_spec import Rule
from lcsc_opt.database.report import Report
from lcsc_opt.database.states import Attributes, row_rule_of
from lcsc_opt.exports.coefficients import average_coefficients
from lcsc_opt.objective.contract import Objective
from lcsc_opt.sampling.base import Sampler, fewest_report_images, prompts_of, title_of
from lcsc_opt.sampling.noise import ImageNoise
from lcsc_opt.trajectory.adapters import BASE_MODEL, base_coefficients

COLUMNS = 8  # by default
FEWEST_COLUMNS = 4  # by default, of prompts
MOST_COLUMNS = 12  # by default, of prompts
MOST_CHECKPOINTS = 16  # by default; of more, evenly spaced ones
REAL_ROW = "real images, unrelated to the columns"
# names of models
CHECKPOINTS = "checkpoints"  # all
FINALISTS = "finalists"  # of an experiment's report
ANSWER = "answer"  # of an experiment


class Shown(NamedTuple):
    """A model of a grid.

    Attributes:
        title: what it is.
        coefficients: ``[K]`` or ``[S, K]``; of the trainer's own average ``[K + 1]``; of the base model of LoRAs zeros.
        rows: the rule of its rows of coefficients; ``None`` for one row.
    """

    title: str
    coefficients: Coefficients
    rows: Rule | None = None


def checkpoints_of(objective: Objective, most: int = MOST_CHECKPOINTS) -> list[Shown]:
    """Each checkpoint alone; of more than ``most`` evenly spaced ones, among them the first and the last.

    Above LoRAs stands the base model, so that people see that they are loaded.
    """
    names = objective.checkpoint_names
    alone = np.eye(len(names))
    indices = np.unique(np.linspace(0, len(names) - 1, min(most, len(names))).round().astype(int))
    return [*_base_shown(objective), *(Shown(names[index], alone[index]) for index in indices)]


def _base_shown(objective: Objective) -> list[Shown]:
    """The base model without a LoRA, where the checkpoints are LoRAs; else nothing."""
    coefficients = None if objective.trajectory is None else base_coefficients(objective.trajectory)
    return [] if coefficients is None else [Shown(BASE_MODEL, coefficients)]


def named_shown(names: Iterable[str], objective: Objective) -> list[Shown]:
    """Models by name: ``checkpoints`` for an objective's own, or an average of them as ``lcsc apply`` names it.

    Raises:
        StudySpecError: a name is none of these.
    """
    shown: list[Shown] = []
    for name in names:
        if name == CHECKPOINTS:
            shown += checkpoints_of(objective)
        else:
            coefficients = average_coefficients(name, objective.steps)
            shown.append(Shown(objective.average_name(coefficients) or name, coefficients))
    return shown


def finalists_shown(report: Report, studies: Mapping[str, Attributes]) -> list[Shown]:
    """The models of a report: what the user had, the best of each search, and the answer, which is said."""
    shown = []
    for measured in report.models:
        model = measured.model
        title = model.title
        if model.name == report.answer:
            title = f"answer · {title}"
        shown.append(Shown(title, model.coefficients, row_rule_of(model.study, studies)))
    return shown


def each_once(models: Iterable[Shown]) -> list[Shown]:
    """Each model once, with all that it is called: ``step 300 = last checkpoint``."""
    of_weights: dict[bytes, Shown] = {}
    for model in models:
        key = model.coefficients.tobytes()
        known = of_weights.get(key)
        if known is None:
            of_weights[key] = model
            continue
        names = known.title.split(" = ")
        further = model.title
        for name in names:  # which a trial of a grid has behind its own: Grid, trial 10 (step 300)
            further = further.removesuffix(f" ({name})")
        if further not in names:
            of_weights[key] = known._replace(title=f"{known.title} = {further}")
    return list(of_weights.values())


def _column_titles(sampler: Sampler, count: int) -> list[str]:
    """What tells the images apart: their prompts, their classes, or the number of their noise."""
    prompts = prompts_of(sampler, HELD_OUT, 0, count)
    if prompts is not None:
        return prompts
    noise = getattr(sampler, "noise", None)
    classes = noise.classes(HELD_OUT, 0, count) if isinstance(noise, ImageNoise) else None
    if classes is not None:
        return [f"class {number}" for number in classes.tolist()]
    return [f"noise {number + 1}" for number in range(count)]


def default_columns(sampler: Sampler) -> int:
    """As many images of each model as show every prompt, each as often as another, between 4 and 12."""
    prompts = fewest_report_images(sampler)
    if not prompts:
        return COLUMNS
    return min(prompts * math.ceil(FEWEST_COLUMNS / prompts), MOST_COLUMNS)


def grid_of(objective: Objective, models: Sequence[Shown], count: int | None = None) -> bytes:
    """A PNG with a row for each model and a column for each image; below them real ones, where there are some.

    Args:
        objective: merges and samples them; afterwards it has the rows of the last one that has some.
        models: at least one.
        count: images of each; ``None`` is :func:`default_columns`.

    Raises:
        ObjectiveError: it samples no images, or sampling fails.
    """
    sampler = objective.sampler
    if sampler is None:
        raise ObjectiveError("this objective scores models without images, so there is nothing to look at")
    titles = _column_titles(sampler, count or default_columns(sampler))
    rows = []
    with progress("images", len(models) * len(titles), after=1.0) as advance:
        for model in models:
            if model.rows is not None:  # one row can be merged in any
                objective.merge_in_rows(model.rows)
            images = objective.images(model.coefficients, HELD_OUT, len(titles))
            rows.append(GridRow(model.title, images.numpy()))
            advance(len(titles))
    height, width = rows[0].images.shape[-2:]
    caption = f"{title_of(sampler).text}, {width} by {height} pixels"
    return labelled_grid([*rows, *_real_row(objective, len(titles))], titles, caption)


def _real_row(objective: Objective, count: int) -> list[GridRow]:
    """Real images, which no column's prompt or noise has made; no row where there are none, or none can be read."""
    try:
        images = objective.real_images(count)
    except LcscError as error:  # models can be looked at all the same
        notice(f"no real images beside the models: {error}")
        return []
    return [] if images is None else [GridRow(REAL_ROW, images.numpy())]


def first_look(objective: Objective) -> bytes:
    """The first, the middle and the last checkpoint, so that people see whether their sampler is right."""
    return grid_of(objective, checkpoints_of(objective, most=3))
