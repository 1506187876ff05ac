"""Files with the weights of published networks: found or downloaded, and read without executing anything."""

from __future__ import annotations

import zipfile
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lcsc_opt.base.errors import MetricError
from lcsc_opt.base.imports import prepare_torchvision
from lcsc_opt.base.progress import notice
from lcsc_opt.checkpoints.torchscript import is_torchscript, read_torchscript


def torch_fidelity_module(name: str) -> Any:
    """A module of torch-fidelity, which cannot always be imported as it is.

    Raises MetricError when it cannot be imported at all.
    """
    try:
        prepare_torchvision()
        return import_module(f"torch_fidelity.{name}")
    except ImportError as error:
        raise MetricError(f"this metric needs torch-fidelity: {error}") from error


def published_file(url: str, name: str, *, setting: str, hash_prefix: str | None = None) -> Path:
    """Where torch keeps weights that are downloaded; they are, when they are not there yet.

    Args:
        url: where they are published.
        name: of the file in the folder of torch's hub.
        setting: the extractor's name in the setting ``weights``, for the message.
        hash_prefix: the beginning of the file's SHA-256, where it is known.

    Raises MetricError, saying what to fetch and where to put it, when it cannot be downloaded.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if path.exists():
        return path
    notice(f"{setting}: downloading its weights from {url}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=hash_prefix)
    except (OSError, RuntimeError) as error:  # RuntimeError: the hash of what came is another
        raise MetricError(
            f"the weights of {setting} cannot be downloaded ({error}); fetch {url} and put it at {path}, "
            f"or give its path in the setting weights: {{{setting}: PATH}}"
        ) from error
    return path


def read_weights(path: Path, *, what: str) -> dict[str, Tensor]:
    """The state dict in a PyTorch file, a TorchScript archive or a ``.safetensors`` file.

    Args:
        path: the file.
        what: whose weights they are, for messages.

    Raises MetricError when it does not exist, would execute code, or holds anything but finite tensors.
    """
    if not path.is_file():
        raise MetricError(f"{path}: does not exist; give a file with the weights of {what}")
    state_dict = _read(path, what)
    if not isinstance(state_dict, dict) or not all(isinstance(value, Tensor) for value in state_dict.values()):
        raise MetricError(f"{path}: is no state dict; give the weights of {what}")
    if not all(bool(torch.isfinite(value).all()) for value in state_dict.values()):
        raise MetricError(f"{path}: holds weights that are not finite; fetch the file again")
    return state_dict


def belongs_to_another_network(path: Path, what: str) -> MetricError:
    """The error for a state dict that does not fit."""
    return MetricError(f"{path}: belongs to another network; give the weights of {what}")


def _read(path: Path, what: str) -> Any:
    try:
        if is_torchscript(path):
            return read_torchscript(path)
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, weights_only=True, map_location="cpu")
    except MetricError:
        raise
    except (OSError, zipfile.BadZipFile, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MetricError(f"{path}: cannot be read ({reason}); fetch the weights of {what} again") from error
    except Exception as error:  # torch.load raises whatever the broken content leads to
        raise MetricError(
            f"{path}: cannot be read as weights alone; give the weights of {what}, not a whole model"
        ) from error
