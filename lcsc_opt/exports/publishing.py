"""An exported model at the Hugging Face hub, with a model card that says what was merged and how it scored."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lcsc_opt.base.errors import StudySpecError, StudyStoreError
from lcsc_opt.base.imports import import_extra
from lcsc_opt.base.records import STANDARD_ERROR
from lcsc_opt.checkpoints.hub import repository_of
from lcsc_opt.database.report import HeldOutReport, Interval, MetricRow
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.exports.recipe import Recipe, packed_trajectory
from lcsc_opt.exports.writing import CONFIG, Destination
from lcsc_opt.objective.contract import Objective
from lcsc_opt.views.tables import with_interval

_CARD = "README.md"
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
lcsc_opt {recipe.lcsc_opt} (LCSC, [Liu et al. 2024](https://arxiv.org/abs/2404.02241)): trial {recipe.trial} of
`{recipe.study}`. `lcsc show` prints the recipe that is inside the weights, and with the checkpoints `lcsc apply` makes
the same bits again.
"""


def check_repository(name: str, to: Destination | None) -> None:
    """Before anything is merged, refuse what could not be uploaded; ``to`` is ``None`` for a recipe alone.

    Raises:
        StudySpecError: the name is not valid on the hub, the user is not logged in, or no model is written.
    """
    client = import_extra("huggingface_hub")
    if to is None:
        raise StudySpecError("--push-to-hub uploads a model with its card: give --output the name of a model")
    try:
        import_extra("huggingface_hub.utils").validate_repo_id(name)
    except ValueError as error:
        raise StudySpecError(f"--push-to-hub: expected OWNER/NAME, got {name!r}") from error
    if client.get_token() is None:
        raise StudySpecError("--push-to-hub: not logged in to the hub: run hf auth login, or set HF_TOKEN")


def push_to_hub(
    name: str,
    to: Destination,
    study: StoredStudy,
    objective: Objective,
    recipe: Recipe,
) -> str:
    """Upload the export at ``to`` and its card, in one commit, to the repository ``name``; create it if necessary.

    A new repository is public, unless its owner's are private by default.

    Returns:
        The address of the repository.

    Raises:
        StudyStoreError: the hub refuses or is out of reach; the export stays.
    """
    client = import_extra("huggingface_hub")
    try:
        api = client.HfApi()
        repository = api.create_repo(name, exist_ok=True)
        card = _model_card(repository.repo_id, to, study, objective, recipe)
        contents = {_CARD: str(card).encode(), **_files_of(to.path)}
        operations = []
        for path_in_repo, content in contents.items():
            operations.append(client.CommitOperationAdd(path_in_repo=path_in_repo, path_or_fileobj=content))
        message = f"{recipe.title}, merged by lcsc_opt"
        api.create_commit(repository.repo_id, operations, commit_message=message)
    except Exception as error:  # the client raises what its transport does
        reason = " ".join(str(error).split())[:200]
        raise StudyStoreError(
            f"{to.path} is written, but {name} at the hub was not ({type(error).__name__}: {reason}); "
            f"later: hf upload {name} {to.path}, or the same command with --overwrite"
        ) from error
    return str(repository)


def _files_of(export: Path, *, folder: Path = Path()) -> dict[str, Path]:
    """Path in the repository → file, of a file, or of a folder whose files are put into this one."""
    if not export.is_dir():
        return {export.name: export}
    files = sorted(path for path in export.rglob("*") if path.is_file())
    return {(folder / path.relative_to(export)).as_posix(): path for path in files}


def _model_card(
    name: str,
    to: Destination,
    study: StoredStudy,
    objective: Objective,
    recipe: Recipe,
) -> Any:
    """The card: what was merged, with which coefficients, and what was measured, in Markdown and as ``model-index``.

    Licence and base model are those of the checkpoints' own card, where they have one: in their folder, in the one
    above, or in their repository at the hub, which is then the base model.
    """
    client = import_extra("huggingface_hub")
    entries: dict[str, Any] = {}
    sources = [source for source in packed_trajectory(objective).sources if source]
    if sources:  # else a training loop wrote the trajectory
        entries = _card_of_checkpoints(Path(sources[0]))
    if to.form == "diffusers":
        is_diffusers = "_class_name" in json.loads((to.path / CONFIG).read_text("utf-8"))
        entries["library_name"] = "diffusers" if is_diffusers else "transformers"
    entries["tags"] = ["lcsc", "merge"]
    if to.form == "lora":
        entries["tags"] += ["lora", "diffusers"]
    results = _results(_task_of(objective, entries), recipe)
    data = client.ModelCardData(model_name=name, eval_results=results, **entries)
    introduction = _INTRODUCTION.format(title=name.split("/")[-1], count=len(recipe.steps), recipe=recipe)
    sections = [
        f"---\n{data.to_yaml()}\n---\n",
        introduction,
        _results_table(study, recipe),
        _coefficients_table(recipe),
    ]
    return client.ModelCard("\n".join(sections))


def _card_of_checkpoints(source: Path) -> dict[str, Any]:
    """The entries that a merged model inherits from the card of the first checkpoint."""
    repository = repository_of(source)
    if repository is not None:
        entries = _inherited_from(repository)
        entries["base_model"] = repository
        entries["base_model_relation"] = "merge"
        return entries
    for folder in (source, *source.parents[:2]):  # of a file, or of a folder that a trainer wrote next to others
        card = folder / _CARD
        if card.is_file():
            entries = _inherited_from(card)
            if entries:
                return entries
    return {}


def _inherited_from(card: str | Path) -> dict[str, Any]:
    """``card``: a file, or a repository at the hub; empty if it has no card that can be read."""
    client = import_extra("huggingface_hub")
    errors = import_extra("huggingface_hub.errors")  # the client imports its modules when they are named
    try:
        entries = client.ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except (errors.EntryNotFoundError, ValueError, yaml.YAMLError):
        return {}
    return {key: entries[key] for key in _INHERITED if entries.get(key)}


def _metrics(recipe: Recipe) -> dict[str, dict[str, float]]:
    """Kind of noise → metric → value, of the search and, where it was measured, of the report."""
    measured: dict[str, Mapping[str, Any]] = {}
    measured["search"] = {"loss": recipe.loss, **recipe.metrics}
    measured["held-out"] = {}
    if recipe.held_out is not None:
        report: Mapping[str, Any] = recipe.held_out
        measured["held-out"] = {"loss": report["loss"], **report["metrics"]}
    numbers = {}
    for noise, values in measured.items():
        numbers[noise] = {metric: value for metric, value in values.items() if isinstance(value, (int, float))}
    return numbers


def _task_of(objective: Objective, entries: Mapping[str, Any]) -> str:
    """The hub's name for the model's task."""
    if entries.get("pipeline_tag"):
        return str(entries["pipeline_tag"])
    if not objective.images_per_evaluation:
        return "other"
    if hasattr(objective.sampler, "prompts_of"):
        return "text-to-image"
    return "unconditional-image-generation"


def _results(task: str, recipe: Recipe) -> list[Any]:
    """The measured metrics, in the hub's form."""
    client = import_extra("huggingface_hub")
    experiment = recipe.study.split("/")[0]
    results = []
    for noise, metrics in _metrics(recipe).items():
        for metric, value in metrics.items():
            if metric.endswith(STANDARD_ERROR):
                continue
            result = client.EvalResult(
                task_type=task,
                dataset_type=experiment,
                dataset_name=f"{experiment}, {noise} noise",
                dataset_split=noise,
                metric_type=metric.split("@")[0],
                metric_name=metric,
                metric_value=value,
            )
            results.append(result)
    return results


def _results_table(study: StoredStudy, recipe: Recipe) -> str:
    """The metrics on the search's noise and on noise that no choice saw.

    There also the baseline's, the gain, and the 95 % intervals of all three, as far as the report has them.
    """
    measured = _metrics(recipe)
    report = None
    if recipe.held_out is not None:  # the report may be of another trial
        report = HeldOutReport.from_json(study.attributes.get("held_out"))
    rows = {} if report is None else {row.metric: row for row in report.rows}
    against = next((row.against for row in rows.values() if row.baseline is not None), None)
    has_intervals = any(row.interval is not None for row in rows.values())
    level = " [95 %]" if has_intervals else ""

    heads = ["metric", "searched", f"held-out noise{level}"]
    if against is not None:
        heads += [f"{against}, held-out noise{level}", f"gain{level}"]
    lines = []
    for metric in dict.fromkeys([*measured["search"], *measured["held-out"]]):
        row = rows.get(metric, MetricRow(metric, None, 0.0))
        cells = [
            _cell(measured["search"].get(metric)),
            _cell(measured["held-out"].get(metric), row.interval),
        ]
        if against is not None:
            cells.append(_cell(row.baseline, row.baseline_interval))
            cells.append("" if row.gain is None else with_interval(row.gain, row.gain_interval, form="+.3g"))
        lines.append([f"`{metric}`", *cells])
    remarks = ""
    if has_intervals and report is not None:
        images = f"{report.images:,}" if report.images else "so many"
        remarks += f"\n[95 %]: intervals for the noise of sampling {images} images; of a gain, on the same noise.\n"
    if report is not None and report.warning:
        remarks += f"\n{report.warning}\n"
    return f"## Results\n\n{_table(heads, lines)}{remarks}"


def _cell(value: float | None, interval: Interval | None = None) -> str:
    """A number of the table; empty if it was not measured. With its interval, it has the digits of other reports."""
    if value is None:
        return ""
    return f"{value:.6g}" if interval is None else with_interval(value, interval)


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
