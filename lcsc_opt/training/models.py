"""Models as folders of diffusers. A training writes one; a distillation or a tuning begins from one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from lcsc_opt.base.errors import TrainingError
from lcsc_opt.base.files import replacing, write_atomically
from lcsc_opt.base.imports import import_extra, quiet_libraries
from lcsc_opt.sampling.consistency import EDM_NOISE, SONG_NOISE, ConsistencyFunction
from lcsc_opt.sampling.diffusers_folder import TIMESTEP_SCALE, DiffusersFolder
from lcsc_opt.sampling.network import network_output
from lcsc_opt.training.recipes.base import Denoiser, Kind, column

_UNET = "unet"
_BETAS = ("epsilon", "v_prediction", "sample")  # what networks of a beta schedule predict


@dataclasses.dataclass(frozen=True)
class Model:
    """A trained model.

    Attributes:
        folder: the configurations of the network and its scheduler.
        network: with its weights.
        kind: how it was trained, according to its scheduler.
    """

    folder: DiffusersFolder
    network: nn.Module
    kind: Kind

    @classmethod
    def read(cls, path: Path, option: str) -> Model:
        """A model that a training or diffusers' ``save_pretrained`` wrote: its network and its scheduler.

        Args:
            path: a pipeline's folder, or a model's folder with ``scheduler/`` next to it.
            option: the command-line option that named it, for errors.

        Raises:
            ObjectiveError: it does not exist, or is no model.
            TrainingError: it has no weights, or does not say how it was trained.
        """
        folder = DiffusersFolder.read(path)
        network = folder.network()
        kind, path = _kind(folder.scheduler or {}), folder.path
        if kind is None:
            name = (folder.scheduler or {}).get("_class_name", "no scheduler_config.json")
            raise TrainingError(f"{option}: {path} does not say how its network was trained: {name}")
        component = next((inside for inside in (path / _UNET, path) if (inside / "config.json").is_file()), path)
        try:
            with quiet_libraries():
                loaded: nn.Module = cast("Any", type(network)).from_pretrained(
                    component, local_files_only=True, use_safetensors=True
                )
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise TrainingError(f"{option}: {path} holds no weights that can be loaded: {reason}") from error
        return cls(folder, loaded, kind)

    @property
    def noise_scale(self) -> float:
        """The factor of ln(sigma) in the network's noise input."""
        return (EDM_NOISE if self.kind == "edm" else SONG_NOISE) * self.folder.timestep_scale

    def denoiser(self) -> Denoiser:
        """D(x; sigma) of a diffusion model.

        Raises:
            TrainingError: it is no diffusion model.
        """
        config = self.folder.scheduler or {}
        network = self.network.eval().requires_grad_(requires_grad=False)
        if self.kind == "edm":
            sigma_data = float(config.get("sigma_data", 0.5))
            return ConsistencyFunction(network, sigma_data=sigma_data, sigma_min=0.0, noise_scale=self.noise_scale)
        if self.kind == "ddpm":
            return _BetaDenoiser(network, config)
        raise TrainingError(f"--teacher: {self.folder.path} is a {self.kind} model; expected a diffusion model")

    @staticmethod
    def write_config(folder: Path, network: nn.Module, scheduler: Mapping[str, Any], timestep_scale: float) -> None:
        """Write the configurations of a network and its scheduler that an objective needs, without weights.

        Raises:
            TrainingError: the disk refuses.
        """
        scale = {} if timestep_scale == 1 else {TIMESTEP_SCALE: timestep_scale}
        configs = {
            f"{_UNET}/config.json": json.loads(cast("Any", network).to_json_string()),
            "scheduler/scheduler_config.json": {**scheduler, **scale},
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
    """How a model was trained, as its scheduler says."""
    name, predicts = str(scheduler.get("_class_name", "")), str(scheduler.get("prediction_type", "epsilon"))
    if name == "CMStochasticIterativeScheduler":
        return "consistency"
    if name.startswith("FlowMatch") or predicts == "flow_prediction":
        return "flow"
    if name.startswith("EDM"):
        return "edm"
    return "ddpm" if predicts in _BETAS and name.endswith("Scheduler") else None


class _BetaDenoiser(nn.Module):
    """D(x; sigma) of a network that was trained on a schedule of betas.

    The network's input is x / sqrt(1 + sigma^2), the variance-preserving image at that noise level (Karras et al. 2022,
    Table 1, column VP). Its timestep is where sqrt((1 - alpha_bar) / alpha_bar) is sigma, interpolated linearly in
    ln(sigma).
    """

    levels: Tensor

    def __init__(self, network: nn.Module, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.network, self.predicts = network, str(config.get("prediction_type", "epsilon"))
        known = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
        schedule = import_extra("diffusers").DDPMScheduler(**{k: config[k] for k in known if k in config})
        kept = schedule.alphas_cumprod.double().numpy()
        self.register_buffer("levels", torch.from_numpy(np.sqrt((1 - kept) / kept)).float())  # [T], increasing

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """``[N, C, H, W]`` at noise levels ``[N]`` → ``[N, C, H, W]``."""
        kept = column((1 + sigma**2).rsqrt())  # sqrt(alpha_bar)
        logs, wanted = self.levels.log(), sigma.log()
        above = torch.searchsorted(logs, wanted.contiguous()).clamp(1, len(logs) - 1)
        share = (wanted - logs[above - 1]) / (logs[above] - logs[above - 1])
        output = network_output(self.network, kept * x, (above - 1 + share).clamp(0, len(logs) - 1))
        if self.predicts == "sample":
            return output
        if self.predicts == "v_prediction":
            return kept * (kept * x) - kept * column(sigma) * output
        return x - column(sigma) * output
