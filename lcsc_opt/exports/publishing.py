"""An exported model at the Hugging Face hub, with a model card that says what was merged and how it scored."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from lcsc_opt.base.errors import StudySpecError, StudyStoreError
from lcsc_opt.base.imports import import_extra
from lcsc_opt.base.records import STANDARD_ERROR
from lcsc_opt.checkpoints.hub import repository_of
from lcsc_opt.database.report import HeldOutReport
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.exports.lists import LISTS
from lcsc_opt.exports.recipe import Recipe, packed_trajectory
from lcsc_opt.exports.writing import CONFIG, Destination
from lcsc_opt.objective.contract import Objective

_CARD = "README.md"
_LICENCE, _BASE = ("license", "license_name", "license_link"), ("base_model", "base_model_relation")
_KEPT = (*_LICENCE, *_BASE, "library_name", "pipeline_tag", "datasets", "language")  # of the checkpoints' own card
_INTRODUCTION = """# {title}

The weights are a linear combination of {count} checkpoints of one training run. Its coefficients were searched by
lcsc_opt {recipe.lcsc_opt} (LCSC, [Liu et al. 2024](https://arxiv.org/abs/2404.02241)): trial {recipe.trial} of
`{recipe.study}`. `lcsc show` prints the recipe that is inside the weights, and with the checkpoints `lcsc apply` makes
the same bits again.
"""


def check_repository(name: str, to: Destination | None) -> None:
    """Refuse before anything is merged what could not be uploaded; ``to`` is ``None`` for a recipe alone.

    Raises:
        StudySpecError: the name is none of the hub's, nobody is logged in, or no model is written.
    """
    client = import_extra("huggingface_hub")
    if to is None or to.form in LISTS:
        raise StudySpecError("--push-to-hub uploads a model with its card: give --output the name of a model")
    try:
        import_extra("huggingface_hub.utils").validate_repo_id(name)
    except ValueError as error:
        raise StudySpecError(f"--push-to-hub: expected OWNER/NAME, got {name!r}") from error
    if client.get_token() is None:
        raise StudySpecError("--push-to-hub: nobody is logged in to the hub: hf auth login, or set HF_TOKEN")


def push_to_hub(name: str, to: Destination, study: StoredStudy, objective: Objective, recipe: Recipe) -> str:
    """Upload what was written to ``to``, and its card, as one commit to the repository ``name``, made where it is not.

    A new repository is public, unless its owner's are private by default.

    Returns:
        The address of the repository.

    Raises:
        StudyStoreError: the hub refuses or is out of reach; what was written stays.
    """
    client = import_extra("huggingface_hub")
    files = [path for path in sorted(to.path.rglob("*")) if path.is_file()] if to.path.is_dir() else [to.path]
    root = to.path if to.path.is_dir() else to.path.parent
    try:
        api = client.HfApi()
        made = api.create_repo(name, exist_ok=True)
        card = _model_card(made.repo_id, to, study, objective, recipe)
        contents = {_CARD: str(card).encode(), **{path.relative_to(root).as_posix(): path for path in files}}
        operations = [client.CommitOperationAdd(path_in_repo=file, path_or_fileobj=it) for file, it in contents.items()]
        api.create_commit(made.repo_id, operations, commit_message=f"{recipe.title}, merged by lcsc_opt")
    except Exception as error:  # the client raises what its transport does
        reason = " ".join(str(error).split())[:200]
        raise StudyStoreError(
            f"{to.path} is written, but {name} at the hub was not ({type(error).__name__}: {reason}); "
            f"later: hf upload {name} {to.path}, or the same command with --overwrite"
        ) from error
    return str(made)


def _model_card(name: str, to: Destination, study: StoredStudy, objective: Objective, recipe: Recipe) -> Any:
    """The card: what was merged, with which coefficients, and what was measured, in Markdown and as ``model-index``.

    Licence and base model are those of the checkpoints' own card, where they have one: in their folder, in the one
    above, or in their repository at the hub, which is then the base model.
    """
    client = import_extra("huggingface_hub")
    known = _card_of_checkpoints(Path(next(filter(None, packed_trajectory(objective).sources), "")))
    if to.form == "diffusers":
        is_diffusers = "_class_name" in json.loads((to.path / CONFIG).read_text("utf-8"))
        known["library_name"] = "diffusers" if is_diffusers else "transformers"
    known["tags"] = ["lcsc", "merge"] if to.form != "lora" else ["lcsc", "merge", "lora", "diffusers"]
    data = client.ModelCardData(model_name=name, eval_results=list(_results(objective, recipe, known)), **known)
    text = _INTRODUCTION.format(title=name.split("/")[-1], count=len(recipe.steps), recipe=recipe)
    parts = (f"---\n{data.to_yaml()}\n---\n", text, _results_table(study, recipe), _coefficients_table(recipe))
    return client.ModelCard("\n".join(parts))


def _card_of_checkpoints(source: Path) -> dict[str, Any]:
    client = import_extra("huggingface_hub")
    missing = import_extra("huggingface_hub.errors").EntryNotFoundError  # the client imports its modules when named
    repository = repository_of(source)
    folders = (source, *source.parents[:2])  # of a file, or of a folder that a trainer wrote next to others
    cards = [folder / _CARD for folder in folders if source.name and (folder / _CARD).is_file()]
    for place in [repository] if repository else cards:
        try:
            found = client.ModelCard.load(place, ignore_metadata_errors=True).data.to_dict()
        except (missing, ValueError, yaml.YAMLError):  # none, or none that can be read
            continue
        kept = {key: found[key] for key in _KEPT if found.get(key)}
        if kept or repository:
            return kept | ({"base_model": repository, "base_model_relation": "merge"} if repository else {})
    return {}


def _metrics(recipe: Recipe) -> dict[str, Mapping[str, float]]:
    """Kind of noise → metric → value, of the search and, where it was measured, of the report."""
    report: dict[str, Any] = recipe.held_out or {"loss": None, "metrics": {}}
    both = {"search": (recipe.loss, recipe.metrics), "held-out": (report["loss"], report["metrics"])}
    named = {noise: {"loss": loss, **metrics} for noise, (loss, metrics) in both.items()}
    return {noise: {k: v for k, v in of.items() if isinstance(v, (int, float))} for noise, of in named.items()}


def _results(objective: Objective, recipe: Recipe, known: Mapping[str, Any]) -> Iterator[Any]:
    of_images = "text-to-image" if hasattr(objective.sampler, "prompts_of") else "unconditional-image-generation"
    task = known.get("pipeline_tag") or (of_images if objective.images_per_evaluation else "other")
    experiment = recipe.study.split("/")[0]
    for split, metrics in _metrics(recipe).items():
        for metric, value in metrics.items():
            if not metric.endswith(STANDARD_ERROR):
                yield import_extra("huggingface_hub").EvalResult(
                    task_type=task,
                    dataset_type=experiment,
                    dataset_name=f"{experiment}, {split} noise",
                    dataset_split=split,
                    metric_type=metric.split("@")[0],
                    metric_name=metric,
                    metric_value=value,
                )


def _results_table(study: StoredStudy, recipe: Recipe) -> str:
    """The metrics on the search's noise and on noise that no choice saw, there also the baseline's."""
    measured = _metrics(recipe)
    report = None if recipe.held_out is None else HeldOutReport.from_json(study.attributes.get("held_out"))
    baselines = {row.metric: row for row in (report.rows if report else ()) if row.baseline is not None}
    against = next((row.against for row in baselines.values()), None)
    lines = []
    for metric in dict.fromkeys([*measured["search"], *measured["held-out"]]):
        row = baselines.get(metric)
        values = (*(of.get(metric) for of in measured.values()), *([row and row.baseline] if against else []))
        lines.append((f"`{metric}`", *("" if value is None else f"{value:.6g}" for value in values)))
    heads = ("metric", "searched", "held-out noise", *([f"{against}, held-out noise"] if against else []))
    warning = f"\n{report.warning}\n" if report and report.warning else ""
    return f"## Results\n\n{_table(heads, lines)}{warning}"


def _coefficients_table(recipe: Recipe) -> str:
    heads = ("step", *([f"`{row}`" for row in recipe.rows] if recipe.rows else ["coefficient"]), "SHA-256")
    columns = zip(recipe.steps, recipe.in_rows()[1].T.tolist(), recipe.checkpoint_sha256, strict=True)
    lines = [(str(step), *map(repr, values), f"`{sha256[:12]}`") for step, values, sha256 in columns]
    return f"## Coefficients\n\n{_table(heads, lines)}"


def _table(heads: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    ruled = [heads, ("---", *["---:"] * (len(heads) - 1)), *lines]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in ruled)
