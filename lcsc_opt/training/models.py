"""Models as folders of diffusers. A training writes one; a distillation or a tuning begins from one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import nn

from lcsc_opt.base.errors import TrainingError, text_of
from lcsc_opt.base.files import replacing, write_atomically
from lcsc_opt.base.libraries import quiet_libraries
from lcsc_opt.sampling.consistency import EDM_NOISE, SONG_NOISE, ConsistencyFunction
from lcsc_opt.sampling.diffusers_folder import TIMESTEP_SCALE, DiffusersFolder, find_model_config
from lcsc_opt.training.recipes.base import Denoiser, Kind

_UNET = "unet"
_BETA_PREDICTIONS = ("epsilon", "v_prediction", "sample")  # what networks of a beta schedule predict


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A model that a training or diffusers wrote, with its weights.

    Attributes:
        folder: the configurations of the network and its scheduler.
        network: with its weights.
        kind: how it was trained, according to its scheduler.
    """

    folder: DiffusersFolder
    network: nn.Module
    kind: Kind

    @classmethod
    def read(cls, path: Path, option: str) -> TrainedModel:
        """A model that a training or diffusers' ``save_pretrained`` wrote: its network and its scheduler.

        Args:
            path: a pipeline's folder, or a model's folder with ``scheduler/`` next to it.
            option: the command-line option that named it, for errors.

        Raises:
            ObjectiveError: it does not exist, or is no model.
            TrainingError: it has no weights, or does not say how it was trained.
        """
        folder = DiffusersFolder.read(path)
        network_class: Any = type(folder.network())
        scheduler = folder.scheduler or {}
        kind = _kind(scheduler)
        if kind is None:
            name = scheduler.get("_class_name", "no scheduler_config.json")
            raise TrainingError(f"{option}: {folder.path} does not say how its network was trained: {name}")
        component = find_model_config(folder.path).parent
        try:
            with quiet_libraries():
                network = network_class.from_pretrained(component, local_files_only=True, use_safetensors=True)
        except (OSError, ValueError, RuntimeError) as error:
            reason = text_of(error)[:200]
            raise TrainingError(f"{option}: {folder.path} holds no weights that can be loaded: {reason}") from error
        return cls(folder, network, kind)

    @property
    def noise_scale(self) -> float:
        """The factor of ln(sigma) in the network's noise input; without meaning for networks that are told a time."""
        scale = EDM_NOISE if self.kind == "edm" else SONG_NOISE
        return scale * self.folder.timestep_scale

    def denoiser(self) -> Denoiser:
        """D(x; sigma) of an EDM model.

        Raises:
            TrainingError: it is another model.
        """
        if self.kind != "edm":
            raise TrainingError(f"--teacher: {self.folder.path} is a {self.kind} model; expected an EDM model")
        network = self.network.eval().requires_grad_(requires_grad=False)
        sigma_data = float((self.folder.scheduler or {}).get("sigma_data", 0.5))  # diffusers' default
        # a consistency function with its boundary at 0 is the denoiser
        return ConsistencyFunction(network, sigma_data=sigma_data, sigma_min=0.0, noise_scale=self.noise_scale)

    @staticmethod
    def write_config(folder: Path, network: nn.Module, scheduler: Mapping[str, Any], timestep_scale: float) -> None:
        """Write the configurations of a network and its scheduler that an objective needs, without weights.

        ``timestep_scale`` is that of :class:`DiffusersFolder`, which diffusers does not know.

        Raises:
            TrainingError: the disk refuses.
        """
        scheduler = dict(scheduler)
        if timestep_scale != 1:
            scheduler[TIMESTEP_SCALE] = timestep_scale
        configs = {
            f"{_UNET}/config.json": json.loads(cast("Any", network).to_json_string()),
            "scheduler/scheduler_config.json": scheduler,
        }
        for name, config in configs.items():
            write_atomically(folder / name, (json.dumps(config, indent=2) + "\n").encode(), error=TrainingError)

    @staticmethod
    def write_weights(folder: Path, network: nn.Module) -> None:
        """Write the network into a folder that :meth:`write_config` began.

        Raises:
            TrainingError: the disk refuses.
        """
        try:
            with replacing(folder / _UNET) as pending:
                cast("Any", network).save_pretrained(pending, safe_serialization=True)
        except OSError as error:
            raise TrainingError(f"{folder}: cannot be written ({error.strerror or error})") from error


def _kind(scheduler: Mapping[str, Any]) -> Kind | None:
    """How a model was trained, by the configuration of its scheduler; ``None`` if that does not tell."""
    name = str(scheduler.get("_class_name", ""))
    predicts = str(scheduler.get("prediction_type", "epsilon"))
    if name == "CMStochasticIterativeScheduler":
        return "consistency"
    if name.startswith("FlowMatch") or predicts == "flow_prediction":
        return "flow"
    if name.startswith("EDM"):
        return "edm"
    if name.endswith("Scheduler") and predicts in _BETA_PREDICTIONS:
        return "ddpm"
    return None
