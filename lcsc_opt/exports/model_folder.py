"""A merged model as the folder that ``from_pretrained`` of diffusers loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.checkpoints.weights import difference, shapes_of, write_safetensors
from lcsc_opt.exports.recipe import FILE
from lcsc_opt.objective.contract import Objective

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
CLASS = "_class_name"


def config_of(objective: Objective) -> str | None:
    """The configuration of the objective's network as diffusers writes it; ``None`` for a network of another kind."""
    for name in ("network", "denoiser"):  # the second, of a whole pipeline
        network: Any = getattr(objective.sampler, name, None)
        if hasattr(network, "to_json_string"):
            return str(network.to_json_string())
    return None


def read_config(path: Path) -> str:
    """``config.json`` of a model that diffusers saved; ``path`` is the file or its folder.

    Raises:
        ObjectiveError: it is not there, or is another kind of file.
    """
    file = path / CONFIG if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ObjectiveError(f"--config: {file} is no configuration that can be read: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get(CLASS), str):
        raise ObjectiveError(f"--config: {file} names no class of diffusers as {CLASS}; name a model's folder")
    return text


def check_fits(config: str, weights: Mapping[str, Tensor]) -> None:
    """Check that weights fit the model of a configuration: diffusers would fill gaps with random numbers.

    Raises:
        ObjectiveError: there is no such model, or a tensor does not fit it; the message names the first one.
    """
    differs = difference(shapes_of(weights), _shapes(json.loads(config)))
    if differs is not None:
        raise ObjectiveError(
            f"the merged model does not fit the configuration's: it {differs}; pass --config FOLDER of the right one, "
            "or --as safetensors"
        )


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name → shape of the model's tensors, without making any."""
    import diffusers

    name = str(config[CLASS])
    model = getattr(diffusers, name, None) if name.isidentifier() else None
    if not isinstance(model, type) or not issubclass(model, diffusers.ModelMixin):
        raise ObjectiveError(f"the configuration names {name!r}, which is no model of this version of diffusers")
    with torch.device("meta"):
        try:
            made = cast("Any", model).from_config(dict(config))
        except Exception as error:  # whatever a model raises of wrong settings
            raise ObjectiveError(f"the configuration does not make a {name}: {error}") from error
    return shapes_of(made.state_dict())


def write_folder(
    folder: Path, weights: dict[str, Tensor], config: str, metadata: dict[str, str], *, recipe: str
) -> None:
    """Write ``config.json``, the weights and the recipe into a new folder.

    Raises:
        OSError: the disk refuses.
    """
    folder.mkdir()
    (folder / CONFIG).write_text(config, encoding="utf-8")
    (folder / FILE).write_text(recipe, encoding="utf-8")
    write_safetensors(weights, folder / WEIGHTS, metadata)
