"""Which of the shipped objectives fits some checkpoints, and which of its settings follow from their files."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

from pydantic import JsonValue
from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.lora import lora_flavour
from lcsc_opt.checkpoints.reading import read_init_arguments

SCORE = "score.py"
"""The objective for models that do not make images."""
IMAGES = 2000  # of an evaluation, in the study files that are written here

_NOISE_LEVEL = re.compile(r"time|temb|t_emb|noise|sigma", re.IGNORECASE)
_DIFFUSERS_NETWORK = re.compile(r"UNet\w+|\w+Transformer\w*")


@dataclasses.dataclass(frozen=True)
class Setting:
    """A setting of an objective.

    Attributes:
        name: its key below ``objective.settings``.
        meaning: the comment behind its value, or the question for it.
        value: ``None`` if only the user knows it.
        is_list: whether the value is a list; most are text.
    """

    name: str
    meaning: str
    value: JsonValue = None
    is_list: bool = False


@dataclasses.dataclass(frozen=True)
class Near:
    """What lies next to the checkpoints, or in the working directory; ``None`` where there is none, or several.

    Attributes:
        reference: a folder of images.
        image_shape: ``[C, H, W]`` of its first image.
        text: a text file.
        pipeline: a folder of a pipeline of diffusers.
    """

    reference: Path | None = None
    image_shape: list[int] | None = None
    text: Path | None = None
    pipeline: Path | None = None


@dataclasses.dataclass(frozen=True)
class Proposal:
    """An objective that fits the checkpoints.

    Attributes:
        file: its name in ``objectives/``.
        settings: those of the model and its sampler or score, in the order of the study file.
    """

    file: str
    settings: tuple[Setting, ...]


_SIZE = Setting("size", "items of an evaluation", 500)


def propose(
    folder: Path,
    last: Path,
    tensors: Mapping[str, Tensor],
    *,
    given: Collection[str],
    near: Near,
) -> Proposal:
    """Choose an objective: by the files near the checkpoints and what they are, else by the tensors.

    The first case that fits is taken: adapters of transformers, what the user gave, models of transformers, LoRAs of
    diffusers, networks of diffusers, EDM's snapshots; else a module that makes images or has a score.

    Args:
        folder: the folder of the checkpoints, a glob, or a packed trajectory.
        last: the last of the checkpoints.
        tensors: its tensors.
        given: the settings that the user gave; with ``reference`` the model makes images, with ``score`` it does not.
        near: what lies near the checkpoints.
    """
    base = folder if folder.is_dir() else folder.parent
    places = (last, last.parent, base, base.parent)
    if _first(places, _adapts_transformers) is not None:
        return _scored_by_function(None)
    transformers_model = _first(places, _is_of_transformers)
    if "score" in given or transformers_model is not None:
        return _scored_by_function(transformers_model)
    if lora_flavour(tensors) is not None:
        return _text_to_image("lora", pipeline=near.pipeline, prompts=near.text)
    network = _first((inside for place in places for inside in (place / "unet", place)), _is_of_diffusers)
    if network is not None and _diffusers_class(network) == "UNet2DConditionModel":
        return _text_to_image("unet", pipeline=network.parent, prompts=near.text)
    if network is not None:
        return _unconditional(network)
    if _is_edm_snapshot(last):
        return _edm()
    if "reference" not in given and _seems_to_make_no_images(tensors):
        return _scored_by_function(None)
    return _torch_module(near.image_shape)


def _scored_by_function(model: Path | None) -> Proposal:
    network = Setting("model", "module:function that makes your network")
    if model is not None:
        network = Setting("model", "its config.json; weights come from the checkpoints", str(model))
    score = Setting("score", "module:function, called as score(model, draw), or score(model); docs/score.md")
    return Proposal(SCORE, (network, score, _SIZE))


def _text_to_image(component: str, *, pipeline: Path | None, prompts: Path | None) -> Proposal:
    source = Setting("pipeline", "the folder of the pipeline that the LoRA is for, or its name at the hub")
    if pipeline is not None:
        source = Setting("pipeline", "where the rest of the pipeline is", str(pipeline))
    listed = Setting("prompts", "a text file, one prompt a line, at most as many as images")
    if prompts is not None and _lines(prompts) <= IMAGES:
        listed = Setting("prompts", "one prompt a line", str(prompts))
    return Proposal(
        "latent_diffusion.py",
        (
            Setting("component", "what they are", component),
            source,
            listed,
            Setting("sampler", "the pipeline's own scheduler; {name: lcm, steps: 4} uses another", {"steps": 20}),
        ),
    )


def _lines(path: Path) -> int:
    """How many lines of a text file are not empty."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return sum(1 for line in file if line.strip())
    except OSError:
        return 0  # the check of the settings says why it cannot be read


def _unconditional(network: Path) -> Proposal:
    sampler: JsonValue = {"name": "dpm-solver++", "steps": 10}
    return Proposal(
        "diffusers_unconditional.py",
        (
            Setting("model", "its config.json; weights come from the checkpoints", str(network)),
            Setting("sampler", "ddim, heun, consistency, ...: docs/formats.md", sampler),
        ),
    )


def _edm() -> Proposal:
    network = Setting("network", "the class of the network, as training.networks:EDMPrecond")
    return Proposal("edm.py", (network, Setting("sampler", "EDM's own", {"name": "heun", "steps": 18})))


def _torch_module(image_shape: list[int] | None) -> Proposal:
    shape = Setting("image_shape", "of the noise of one image, as [3, 32, 32]", is_list=True)
    if image_shape is not None:
        shape = Setting("image_shape", "of the noise of one image, as the real images", [*image_shape])
    called = "module:function that is called as sample(model, noise) and returns images in [-1, 1]"
    return Proposal(
        "torch_module.py",
        (
            Setting("model", "module:function that makes your network"),
            Setting("sampler", called),
            shape,
        ),
    )


def _first(places: Iterable[Path], fits: Callable[[Path], bool]) -> Path | None:
    return next((place for place in places if fits(place)), None)


def _adapts_transformers(folder: Path) -> bool:
    """Whether it holds an adapter of a model of transformers.

    peft writes the task; or, if none was named, the library of the model.
    """
    config = folder / "adapter_config.json"
    if _text_in_json(config, "task_type") is not None:
        return True
    library = _text_in_json(config, "auto_mapping", "parent_library")
    return library is not None and library.startswith("transformers.")


def _is_of_transformers(folder: Path) -> bool:
    return _text_in_json(folder / "config.json", "model_type") is not None


def _is_of_diffusers(folder: Path) -> bool:
    name = _diffusers_class(folder)
    return name is not None and _DIFFUSERS_NETWORK.fullmatch(name) is not None


def _diffusers_class(folder: Path) -> str | None:
    return _text_in_json(folder / "config.json", "_class_name")


def _is_edm_snapshot(file: Path) -> bool:
    if file.suffix != ".pkl":
        return False
    try:
        return bool(read_init_arguments(file))
    except TrajectoryError:
        return False


def _seems_to_make_no_images(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a network has no convolution to few channels, RGB or latents, and is told no noise level.

    Nothing can be concluded from tensors without a matrix: false.
    """
    matrices = [tensor for tensor in tensors.values() if tensor.ndim > 1]
    if not matrices:
        return False
    ends_in_few_channels = any(tensor.ndim > 2 and len(tensor) <= 4 for tensor in matrices)
    is_told_noise_level = any(_NOISE_LEVEL.search(name) for name in tensors)
    return not (ends_in_few_channels or is_told_noise_level)


def _text_in_json(file: Path, *keys: str) -> str | None:
    """The text at nested keys of a JSON file; ``None`` if there is no such file, key or text."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        for key in keys:
            value = value[key]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return value if isinstance(value, str) and value else None
