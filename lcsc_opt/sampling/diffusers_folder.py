"""A model's architecture and its scheduler's settings, from files that diffusers wrote; weights come from elsewhere.

Only JSON is read. The class that the JSON names must be one of diffusers' own.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, cast

from torch import nn

from lcsc_opt.base.errors import ObjectiveError, text_of
from lcsc_opt.base.imports import import_extra
from lcsc_opt.base.machine import collector_resting
from lcsc_opt.base.settings import excerpt
from lcsc_opt.checkpoints.names import is_numbered_folder

COMPONENTS = ("unet", "unet_ema", "transformer", "transformer_ema")
TIMESTEP_SCALE = "timestep_scale"
Config = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class DiffusersFolder:
    """What a folder says about a model.

    Attributes:
        path: where it was read.
        model: the network's ``config.json``.
        scheduler: the pipeline's ``scheduler_config.json``, if there is one.
        timestep_scale: the network is told the scheduler's timesteps times this number. It is not 1 if the network
            was tuned from another kind of model, with other timesteps. A key of the scheduler's configuration.
    """

    path: Path
    model: Config
    scheduler: Config | None
    timestep_scale: float = 1.0

    @classmethod
    def read(cls, path: Path) -> DiffusersFolder:
        """Read what :func:`find_model_config` finds at a path.

        Raises:
            ObjectiveError: no such file, or not a model's configuration.
        """
        path = _beside_trajectory(path)
        config = find_model_config(path)
        model = _read_json(config)
        folders = [config.parent, config.parent.parent]
        if is_numbered_folder(config.parent.parent.name):  # runs/checkpoint-100/unet, and runs/scheduler
            folders.append(config.parent.parent.parent)
        for folder in folders:
            scheduler_config = folder / "scheduler" / "scheduler_config.json"
            if scheduler_config.is_file():
                scheduler = _read_json(scheduler_config)
                timestep_scale = float(scheduler.pop(TIMESTEP_SCALE, 1.0))  # `lcsc train` wrote it
                return cls(path, model, scheduler, timestep_scale)
        return cls(path, model, None)

    def network(self) -> nn.Module:
        """The network, with random weights.

        Raises:
            MissingPackageError: diffusers cannot be imported.
            ObjectiveError: the configuration names no model of this diffusers, or one that it cannot make.
        """
        diffusers = import_extra("diffusers")
        class_name = str(self.model.get("_class_name", ""))
        model_class = find_diffusers_class(class_name, "ModelMixin")
        if model_class is None:
            raise ObjectiveError(
                f"model: {self.path}: expected a model for images that diffusers {diffusers.__version__} has, "
                f"got {class_name!r}"
            )
        try:
            network: nn.Module = model_class.from_config(self.model)
        except Exception as error:  # models raise all kinds of errors for wrong settings
            raise ObjectiveError(f"model: {self.path}: {class_name}: {text_of(error)}") from error
        return network

    def image_shape(self) -> tuple[int, int, int]:
        """``[C, H, W]`` of the images that the model was trained on.

        Raises:
            ObjectiveError: the configuration does not say.
        """
        size = self.model.get("sample_size")
        if not isinstance(size, (list, tuple)):
            size = (size, size)
        image_shape = (self.model.get("in_channels"), *size)
        if len(image_shape) != 3 or not all(isinstance(length, int) for length in image_shape):
            raise ObjectiveError(f"image_shape: {self.path} does not say it; give it, as in [3, 32, 32]")
        return cast("tuple[int, int, int]", image_shape)

    @property
    def classes(self) -> int | None:
        """How many classes the model has embeddings for; ``None`` when it is unconditional.

        Raises:
            ObjectiveError: it is no whole number.
        """
        classes = self.model.get("num_class_embeds") or self.null_label
        if not classes:
            return None
        if not isinstance(classes, int):
            keys = "num_class_embeds or num_embeds_ada_norm"
            raise ObjectiveError(f"model: {self.path}: {keys}: expected a whole number, got {excerpt(classes)}")
        return classes

    @property
    def null_label(self) -> int | None:
        """The label that stands for no class, of a model that has one beside its classes, as DiT; else ``None``."""
        if self.model.get("num_class_embeds") or self.model.get("norm_type") not in (None, "ada_norm_zero"):
            return None  # of other norms, num_embeds_ada_norm is the number of timesteps
        return self.model.get("num_embeds_ada_norm")  # the classes before it are as many


def find_diffusers_class(name: str, base: str) -> Any:
    """The class of this name in diffusers, if it is derived from its class ``base`` and made of a configuration.

    Otherwise ``None``: a configuration must not choose what else of diffusers is called.

    Raises:
        MissingPackageError: diffusers cannot be imported.
    """
    diffusers = import_extra("diffusers")
    with collector_resting():  # diffusers imports lazily: only now what has these names
        candidate = getattr(diffusers, name, None)
        bases = (getattr(diffusers, base), diffusers.ConfigMixin)
    # a bare ModelMixin, and models of several models, are made in other ways
    if isinstance(candidate, type) and all(issubclass(candidate, needed) for needed in bases):
        return candidate
    return None


def find_model_config(path: Path) -> Path:
    """The ``config.json`` of a pipeline's folder, or of a model's (also one inside a pipeline); or a path to it itself.

    For a trajectory of ``lcsc train``, it is in the folder of its model next to it.

    Raises:
        ObjectiveError: there is none.
    """
    path = _beside_trajectory(path)
    if path.is_file():
        return path
    for folder in (*(path / component for component in COMPONENTS), path):
        if (folder / "config.json").is_file():
            return folder / "config.json"
    raise ObjectiveError(
        f"model: {path} holds no config.json, nor do its subfolders {', '.join(COMPONENTS)}; expected the folder of a "
        "model or of a pipeline that diffusers' save_pretrained wrote"
    )


def _beside_trajectory(path: Path) -> Path:
    """For a trajectory of ``lcsc train``, the folder of its model next to it; other paths as they are."""
    if path.suffix == ".trajectory":
        return path.with_suffix(".model")
    return path


def _read_json(path: Path) -> Config:
    """The mapping in a file of JSON. Raises ObjectiveError if it cannot be read, or is something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ObjectiveError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ObjectiveError(f"{path}: expected a mapping of settings")
    return content
