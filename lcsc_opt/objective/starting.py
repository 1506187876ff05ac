"""A first study file: the template of a kind of models, with what the files of a training run state as facts.

Whatever they do not state stays ``FILL IN``, with the question as its comment.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import JsonValue

from lcsc_opt.base.errors import ObjectiveError, StudySpecError, TrajectoryError
from lcsc_opt.base.settings import dump_yaml, parse_yaml
from lcsc_opt.base.study_file import FILL_IN
from lcsc_opt.base.study_spec import ModelKind, experiment_name
from lcsc_opt.checkpoints.finding import is_packed, span_of
from lcsc_opt.checkpoints.lora import ADAPTER_CONFIG, lora_flavour
from lcsc_opt.checkpoints.reading import read_checkpoint, read_init_arguments, searched_key
from lcsc_opt.objective.of_study import ENOUGH_CHECKPOINTS, MANY_CHECKPOINTS, SELECT
from lcsc_opt.sampling.diffusers_folder import DiffusersFolder
from lcsc_opt.sampling.noise import guidance_advice
from lcsc_opt.trajectory import Trajectory
from lcsc_opt.trajectory.sources import PackRequest

Facts = dict[str, "str | None"]
"""Key of a template → its value in YAML, perhaps with a comment; ``None`` for a line that does not apply."""

_TEMPLATES = Path(__file__).parent / "templates"
_LINE = re.compile(r"(?P<indent> *)(?P<example># )?(?P<key>\w+): (?P<value>.*?)(?: +(?P<comment># .*))?")
_SETTING = "    "  # what a line of objective.settings begins with
_COMMENT_COLUMN = 38


class _Run(NamedTuple):
    """The files of a training run.

    Attributes:
        steps: of the checkpoints.
        last: the last checkpoint; the first ones may be deleted while the training goes on.
        folders: that may hold configurations: those that the user named, then those of the last checkpoint.
    """

    steps: tuple[int, ...]
    last: Path
    folders: list[Path]


def draft(
    kind: ModelKind,
    checkpoints: Sequence[Path],
    given: Mapping[str, JsonValue],
    *,
    steps: Sequence[int] | None = None,
) -> tuple[str, str]:
    """Draft a study file for checkpoints. None of the user's code is run, and what lies next to them is not read.

    Args:
        kind: what the checkpoints are.
        checkpoints: their folder, a glob, the files of a glob that a shell has expanded, or a packed trajectory.
        given: settings that the user has named, such as ``reference``, ``model`` or ``score``.
        steps: the training step of each checkpoint; ``None`` reads them from names and contents.

    Returns:
        The text of the study file, and the checkpoints in a few words.

    Raises:
        StudySpecError: a given key cannot be that of a setting.
        TrajectoryError: there are no checkpoints, those of several models, or several state dicts in each.
        ObjectiveError: the folder holds another kind of models.
    """
    for name in given:
        if not name.isidentifier():
            raise StudySpecError(
                f"{name}: expected a setting of the objective, such as images=500; lcsc run takes {name} and all other "
                "keys of a study file"
            )
    key = None if given.get("key") is None else str(given["key"])
    run = _find_run(checkpoints, key, steps)
    model = given.get("model")
    if isinstance(model, str) and Path(model).is_dir():  # a score's may be a function
        run.folders.insert(0, Path(model))
    if kind == "diffusers" and _is_lora(run.last, key):
        raise ObjectiveError(f"{run.last}: a LoRA, and no whole model: lcsc init lora writes its study file")
    template, facts = _facts(kind, run)
    folder = checkpoints[0].resolve()
    if not folder.is_dir():  # a glob, or files
        folder = folder.parent
    name = experiment_name(folder.name.removesuffix(".trajectory")) or "study"
    patterns: JsonValue = [str(path) for path in checkpoints]
    if len(checkpoints) == 1:
        patterns = str(checkpoints[0])
    facts |= {"name": _as_yaml(name), "checkpoints": _as_yaml(patterns)}
    if kind != "score" and len(run.steps) > MANY_CHECKPOINTS:
        spaced = f"evenly spaced, of {len(run.steps)}: enough for a search along the gradient"
        facts[SELECT] = f"{{count: {ENOUGH_CHECKPOINTS}}}              # {spaced}"
    facts |= {setting: _as_yaml(value) for setting, value in given.items()}
    if steps is not None:
        facts["steps"] = _as_yaml([*steps])
    if "reward" in given and "keep" not in given and not isinstance(given.get("loss"), Mapping):
        facts["keep"] = "reward"  # else nothing would be searched by it
    text = (_TEMPLATES / f"{template}.yaml").read_text(encoding="utf-8")
    return _filled(text, facts), span_of(run.steps)


def kind_of(checkpoints: Sequence[Path], *, key: str | None, steps: Sequence[int] | None) -> ModelKind:
    """What checkpoints are of, by the last one: LoRAs, or a network whose configuration lies with it.

    Raises:
        StudySpecError: neither.
        TrajectoryError: there are no checkpoints, or those of several models.
    """
    run = _find_run(checkpoints, key, steps)
    if _is_lora(run.last, key):
        return "lora"
    for place in run.folders:
        with contextlib.suppress(ObjectiveError):
            if "_class_name" in DiffusersFolder.read(place).model:
                return "diffusers"
    raise StudySpecError(
        f"{checkpoints[0]}: neither LoRAs nor model folders of diffusers; say what they are, as lcsc init module "
        "FOLDER or lcsc images FOLDER --kind module"
    )


def _is_lora(last: Path, key: str | None) -> bool:
    """Whether a checkpoint, or a packed trajectory, has nothing but the factors of a LoRA."""
    if is_packed(last):
        names: Iterable[str] = Trajectory.open(last).names
    else:
        names = read_checkpoint(last, key=key or searched_key(last)).tensors
    return lora_flavour(names) is not None


def _find_run(checkpoints: Sequence[Path], key: str | None, steps: Sequence[int] | None) -> _Run:
    """Find the checkpoints; the last one is read, so that what cannot be read is refused now."""
    first = checkpoints[0]
    folder = next(place for place in (first, *first.parents) if place.is_dir())
    request = PackRequest(checkpoints, folder, key=key, steps=steps)
    packed = request.packed_path
    if packed is not None:
        return _Run(Trajectory.open(packed).steps, packed, [folder])
    sources = request.sources()
    last = [*sources.values()][-1]
    read_checkpoint(last, key=key or searched_key(last))
    return _Run(tuple(sources), last, [place for place in (folder, last, last.parent) if place.is_dir()])


def _facts(kind: ModelKind, run: _Run) -> tuple[str, Facts]:
    """The template's name for a kind of models, and what the files of a run state."""
    if kind == "diffusers":
        return _of_diffusers(run)
    if kind == "edm":
        return "edm", _of_edm(run.last)
    if kind == "lora":
        return "text_to_image", _of_lora(run)
    if kind == "score":
        return "score", _of_score(run)
    return "module", {}


def _of_diffusers(run: _Run) -> tuple[str, Facts]:
    """The template, and what the configurations of the network and of its scheduler say.

    A network that attends to a prompt needs the template of text-to-image pipelines.
    """
    facts: Facts
    models = []
    for place in run.folders:
        with contextlib.suppress(ObjectiveError):
            models.append(DiffusersFolder.read(place))
    models = [model for model in models if "_class_name" in model.model]
    if not models:
        return "diffusers", {"sampler": _SAMPLER, "labels": None, "decoder": None}
    model = min(models, key=lambda model: model.scheduler is None)  # the first with a scheduler, else the first
    if model.model.get("cross_attention_dim") or model.model.get("joint_attention_dim"):
        component = "transformer" if "Transformer" in str(model.model["_class_name"]) else "unet"
        facts = {"component": component}
        pipeline, _ = _config(run, "model_index.json")
        if pipeline is not None:
            facts["pipeline"] = _as_yaml(str(pipeline))
        return "text_to_image", facts
    facts = {"model": _as_yaml(str(model.path))}
    if model.scheduler is None:
        facts["sampler"] = _SAMPLER
    with contextlib.suppress(ObjectiveError):
        model.image_shape()
        facts["image_shape"] = None  # the configuration says it, so the study file need not
    facts["labels"] = _labels(model)
    if not _makes_latents(model.model.get("in_channels")):
        facts["decoder"] = None
    return "diffusers", facts


def _labels(model: DiffusersFolder) -> str | None:
    """The setting ``labels``: all classes in turn; ``None`` if the model has none.

    Whether the last one stands for no class, as in guidance, is mostly known to the user alone.
    """
    classes = model.classes
    if classes is None:
        return None
    return f"balanced  # classes 0 to {classes - 1}; {guidance_advice(classes, model.null_label)}"


_SAMPLER = (
    f"{FILL_IN}  # no scheduler_config.json; e.g. {{name: ddim, steps: 50, scheduler: {{beta_schedule: linear, "
    "prediction_type: epsilon}}"
)


def _makes_latents(channels: object) -> bool:
    """Whether a network has more channels than images have, so that the study file needs a decoder."""
    return isinstance(channels, int) and channels > 3


def _of_edm(last: Path) -> Facts:
    """What the last checkpoint says of its network, if it is a snapshot of EDM: how its class was called."""
    try:
        interface = read_init_arguments(last)
    except TrajectoryError:  # no snapshot
        return {"labels": None, "decoder": None}
    arguments = interface["init_kwargs"]
    facts: Facts = {"arguments_from": None}
    facts["network"] = f"{FILL_IN}  # e.g. training.networks:{interface['class_name']}: your copy of this class"
    if not arguments.get("label_dim"):
        facts["labels"] = None
    if not _makes_latents(arguments.get("img_channels")):
        facts["decoder"] = None
    return facts


def _of_lora(run: _Run) -> Facts:
    """The pipeline that PEFT's ``adapter_config.json`` names."""
    folder, adapter = _config(run, ADAPTER_CONFIG)
    mapping = json.dumps(adapter.get("auto_mapping"))  # PEFT writes the module of the adapted class without a task_type
    if adapter.get("task_type") or '"transformers.' in mapping:
        raise ObjectiveError(f"{folder}: an adapter of a language model: lcsc init score writes its study file")
    base = adapter.get("base_model_name_or_path")
    if base:
        return {"pipeline": _as_yaml(base)}
    return {}


def _of_score(run: _Run) -> Facts:
    """The folder of a model of transformers; the base model of an adapter."""
    _, adapter = _config(run, ADAPTER_CONFIG)
    base = adapter.get("base_model_name_or_path")
    if base:
        return {"model": f"{FILL_IN}  # e.g. my_module:build, which returns {base} with this adapter"}
    folder, config = _config(run, "config.json")
    if config.get("model_type"):
        return {"model": _as_yaml(str(folder))}
    return {}


def _config(run: _Run, name: str) -> tuple[Path | None, dict[str, Any]]:
    """The first folder of a run with a configuration of this name, and that; without one ``None``, and nothing."""
    for folder in run.folders:
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict):
            return folder, content
    return None, {}


def _filled(template: str, facts: Facts) -> str:
    """A template with these values in place of its own; settings that it lacks are added to those of the objective.

    A fact that is ``None`` drops its line. Lines that are comments are examples, which a value replaces.
    """
    further = dict(facts)
    lines = []
    for line in template.splitlines():
        match = _LINE.fullmatch(line)
        if match is None or match["key"] not in facts or not _is_to_be_filled(match):
            lines.append(line)
            continue
        value = further.pop(match["key"], None)
        if value is None:  # or another example of what stands above
            continue
        filled = f"{match['indent']}{match['key']}: {value}"
        if match["comment"] and not match["example"] and "  # " not in value:
            filled = f"{filled:<{_COMMENT_COLUMN - 2}}  {match['comment']}"
        lines.append(filled)
    end = 1 + max(index for index, line in enumerate(lines) if line.startswith(_SETTING))
    lines[end:end] = [f"{_SETTING}{key}: {value}" for key, value in further.items() if value is not None]
    return "".join(f"{line}\n" for line in lines)


def _is_to_be_filled(line: re.Match[str]) -> bool:
    """Whether a line has a setting of the objective, or a question; ``held_out`` is a setting of ``score.py``, too."""
    return line["indent"] == _SETTING or line["value"] == FILL_IN


def _as_yaml(value: JsonValue) -> str:
    """A value as one line of YAML, which is read back unchanged: as JSON, which is YAML, where text has line breaks."""
    text = dump_yaml(value, flow=True, width=sys.maxsize).splitlines()[0]
    with contextlib.suppress(ValueError):
        if parse_yaml(text) == value:
            return text
    return json.dumps(value)
