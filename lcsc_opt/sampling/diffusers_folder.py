"""A model's architecture and its scheduler's settings, from files that diffusers wrote; weights come from elsewhere.

Only JSON is read. The class that the JSON names must be one of diffusers' own.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, cast

from torch import nn

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.imports import import_extra

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
        """Read a pipeline's folder, a model's folder (also one inside a pipeline), or a ``config.json``.

        For a trajectory of ``lcsc train``, it is the folder of its model next to it.

        Raises:
            ObjectiveError: no such file, or not a model's configuration.
        """
        path = path.with_suffix(".model") if path.suffix == ".trajectory" else path
        places = [path, *(path / name / "config.json" for name in COMPONENTS), path / "config.json"]
        config = next((place for place in places if place.is_file()), None)
        if config is None:
            raise ObjectiveError(
                f"model: {path} holds no config.json, and none in {', '.join(COMPONENTS)}; expected a folder that "
                "diffusers' save_pretrained wrote, of a model or of a pipeline"
            )
        for folder in (config.parent, config.parent.parent):
            place = folder / "scheduler" / "scheduler_config.json"
            if place.is_file():
                scheduler = _read_json(place)
                return cls(path, _read_json(config), scheduler, float(scheduler.pop(TIMESTEP_SCALE, 1.0)))
        return cls(path, _read_json(config), None)

    def network(self) -> nn.Module:
        """The network, with random weights.

        Raises:
            ObjectiveError: the configuration names no model of this diffusers, or one that it cannot make.
        """
        diffusers = import_extra("diffusers")
        name = str(self.model.get("_class_name", ""))
        kind: Any = getattr(diffusers, name, None) if name.isidentifier() else None
        if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)):
            version = diffusers.__version__
            raise ObjectiveError(f"model: {self.path}: expected a model that diffusers {version} has, got {name!r}")
        try:
            network: nn.Module = cast("Any", kind).from_config(self.model)
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            raise ObjectiveError(f"model: {self.path}: {name}: {' '.join(str(error).split())}") from error
        return network

    def image_shape(self) -> tuple[int, int, int]:
        """``[C, H, W]`` of the images that the model was trained on.

        Raises:
            ObjectiveError: the configuration does not say.
        """
        channels, size = self.model.get("in_channels"), self.model.get("sample_size")
        height, width = size if isinstance(size, (list, tuple)) and len(size) == 2 else (size, size)
        if not all(isinstance(length, int) for length in (channels, height, width)):
            raise ObjectiveError(f"image_shape: {self.path} does not say it; give it, as in [3, 32, 32]")
        return channels, height, width  # type: ignore[return-value]  # checked above

    @property
    def classes(self) -> int | None:
        """How many classes the model has embeddings for; ``None`` when it is unconditional."""
        classes = self.model.get("num_class_embeds") or self.model.get("num_embeds_ada_norm")
        return int(classes) if classes else None


def _read_json(path: Path) -> Config:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ObjectiveError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ObjectiveError(f"{path}: expected a mapping of settings")
    return content
