"""The model card in an exported folder: what was merged, and how it scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lcsc_opt.base.imports import import_extra
from lcsc_opt.exports.chosen import Chosen
from lcsc_opt.exports.recipe import Recipe, packed_trajectory
from lcsc_opt.exports.writing import CARD
from lcsc_opt.objective.contract import Objective
from lcsc_opt.views.tables import report_table

_INHERITED = (  # entries of the checkpoints' own card
    "license",
    "license_name",
    "license_link",
    "base_model",
    "base_model_relation",
    "library_name",
    "pipeline_tag",
    "datasets",
    "language",
)
_INTRODUCTION = """# {title}

The weights are a linear combination of {count} checkpoints of one training run. Its coefficients were searched by
lcsc_opt {recipe.lcsc_opt} (LCSC, [Liu et al. 2024](https://arxiv.org/abs/2404.02241)): {model} of the experiment
`{experiment}`. `lcsc show` prints the recipe that is inside the weights; with it, `lcsc apply` merges the checkpoints
again.
"""


def model_card(name: str, chosen: Chosen, objective: Objective, recipe: Recipe, *, library: str) -> str:
    """What was merged, with which coefficients, and what was measured, in Markdown.

    Licence and base model are those of the checkpoints' own card, if one is in their folder or in the one above.

    Args:
        name: the model's.
        chosen: the model of an experiment.
        objective: of the experiment, with a packed trajectory.
        recipe: inside the model.
        library: what loads the model.
    """
    sources = [source for source in packed_trajectory(objective).sources if source]
    entries: dict[str, Any] = {}
    if sources:  # else a training loop wrote the trajectory
        entries = _card_of_checkpoints(Path(sources[0]))
    entries |= {"library_name": library, "tags": ["lcsc", "merge"]}
    sections = [
        f"---\n{yaml.safe_dump(entries)}---\n",
        _INTRODUCTION.format(
            title=name,
            count=len(recipe.steps),
            recipe=recipe,
            model=chosen.model.title,
            experiment=chosen.experiment,
        ),
        _results_section(chosen, recipe),
        _coefficients_table(recipe),
    ]
    return "\n".join(sections)


def _card_of_checkpoints(source: Path) -> dict[str, Any]:
    """The entries that a merged model inherits from the card of the first checkpoint."""
    for folder in (source, *source.parents[:2]):  # of a file, or of a folder that a trainer wrote next to others
        card = folder / CARD
        if card.is_file():
            entries = _inherited_from(card)
            if entries:
                return entries
    return {}


def _inherited_from(card: Path) -> dict[str, Any]:
    """Empty if the card cannot be read."""
    client = import_extra("huggingface_hub")
    try:
        entries = client.ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, yaml.YAMLError):
        return {}
    return {key: entries[key] for key in _INHERITED if entries.get(key)}


def _results_section(chosen: Chosen, recipe: Recipe) -> str:
    """What was measured of the model, and the report of the experiment."""
    searched: dict[str, Any] = {"loss": recipe.loss, **recipe.metrics}
    held_out: dict[str, Any] = {}
    if recipe.held_out is not None:
        measured: Mapping[str, Any] = recipe.held_out
        held_out = {"loss": measured["loss"], **measured["metrics"]}
    lines = []
    for metric in searched | held_out:
        values = [values.get(metric) for values in (searched, held_out)]
        lines.append([f"`{metric}`", *(f"{value:.6g}" if isinstance(value, (int, float)) else "" for value in values)])
    text = f"## Results\n\n{_table(['metric', 'noise of the search', 'held-out noise'], lines)}"
    report = chosen.report
    if report is None or report.measured(chosen.model.name) is None:
        return text
    for index, part in enumerate(report.parts):
        sampler = ""
        if part.sampler is not None:
            sampler = f", sampled with {part.sampler}"
        images = part.models[0].images
        sampled = ""  # a score may sample none
        if images:
            sampled = f", {images:,} images"
        title = f"On held-out noise{sampled}{sampler}"
        table = _table(*report_table(report, chosen.model.name, part=index))
        text += f"\n{title}; brackets are 95 % intervals over this noise:\n\n{table}"
    notes = list(report.warnings) if chosen.model.name == report.answer else []
    if report.metrics.cross_check_text is not None:
        notes.append(f"The cross-check is {report.metrics.cross_check_text}")
    return text + "".join(f"\n{note}.\n" for note in notes)


def _coefficients_table(recipe: Recipe) -> str:
    rows = ["coefficient"]
    if recipe.rows:
        rows = [f"`{row}`" for row in recipe.rows]
    _, coefficients = recipe.in_rows()
    lines = []
    for index, step in enumerate(recipe.steps):
        column = [repr(value) for value in coefficients[:, index].tolist()]
        lines.append([str(step), *column, f"`{recipe.checkpoint_sha256[index][:12]}`"])
    return f"## Coefficients\n\n{_table(['step', *rows, 'SHA-256'], lines)}"


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    alignment = ["---", *["---:"] * (len(heads) - 1)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (heads, alignment, *lines))
