"""The Inception network of published FIDs (Heusel et al. 2017), as torch-fidelity ports it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcsc_opt.errors import MetricError
from lcsc_opt.metrics._network import weights_hash
from lcsc_opt.torchvision_import import prepare_torchvision

LAYER = "2048"  # torch-fidelity's name of the last pooling layer, and its number of features


class InceptionExtractor:
    """2,048 features of RGB or grey images of any size, equal to those of torch-fidelity.

    The network takes bytes, so images are rounded to 256 levels as if they had been written to a PNG. The
    rounding has no gradient: this extractor cannot be differentiated.

    Args:
        weights: a file with torch-fidelity's state dict, ``weights-inception-2015-12-05-6726825d.pth``;
            None takes the one in torch's hub folder, downloaded there when it is missing.
        device: where the network runs.

    Raises MetricError when torch-fidelity cannot be imported, or when the weights cannot be found, cannot be
    downloaded, would execute code on loading, or belong to another network.
    """

    def __init__(self, weights: Path | None = None, *, device: torch.device | str = "cpu") -> None:
        module = _torch_fidelity_inception()
        path = _hub_file(module.URL_INCEPTION_V3) if weights is None else weights
        state_dict = _load_weights(path)
        self._network = _build(module, state_dict, path).to(device)
        self._device = torch.device(device)
        self._name = f"inception-v3-{LAYER}-{weights_hash(state_dict)}"

    @property
    def name(self) -> str:
        """``inception-v3-2048-<hash of the weights>``."""
        return self._name

    @property
    def dimension(self) -> int:
        """The number of features, D."""
        return int(LAYER)

    def __call__(self, images: Tensor) -> Tensor:
        """Features ``[B, 2048]`` of ``[B, 1 or 3, H, W]`` in [−1, 1].

        Raises MetricError for another shape.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise MetricError(f"images: expected [B, 1 or 3, H, W] for Inception, got {list(images.shape)}")
        features: Tensor = self._network(to_bytes(images.to(self._device)).expand(-1, 3, -1, -1))[0]
        return features


def to_bytes(images: Tensor) -> Tensor:
    """[−1, 1] → 0 to 255 uint8, to the nearest level, clipped (as EDM does, Karras et al. 2022)."""
    return (images * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def _torch_fidelity_inception() -> Any:
    """torch-fidelity's module with the Inception network."""
    try:
        prepare_torchvision()
        from torch_fidelity import feature_extractor_inceptionv3
    except ImportError as error:
        raise MetricError(f"Inception features need torch-fidelity: {error}") from error
    return feature_extractor_inceptionv3


def _hub_file(url: str) -> Path:
    """Where torch keeps the published weights; downloaded when they are not there yet."""
    name = url.rpartition("/")[2]
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = Path(name).stem.rpartition("-")[2]  # the start of the file's SHA-256
        torch.hub.download_url_to_file(url, str(path), hash_prefix=prefix)
    except (OSError, RuntimeError) as error:  # RuntimeError: the hash of what came is another
        raise MetricError(
            f"Inception weights cannot be downloaded ({error}); fetch {url} and put it at {path}, or pass its path"
        ) from error
    return path


def _load_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in ``path``, read without executing anything that the file may hold."""
    try:
        state_dict = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError as error:
        raise MetricError(f"{path}: does not exist; pass a file with torch-fidelity's Inception weights") from error
    except Exception as error:  # torch.load raises whatever the broken content leads to
        raise MetricError(
            f"{path}: cannot be read as weights alone; pass torch-fidelity's Inception weights, not a whole model"
        ) from error
    if not isinstance(state_dict, dict) or not all(isinstance(value, Tensor) for value in state_dict.values()):
        raise MetricError(f"{path}: is no state dict; pass torch-fidelity's Inception weights")
    if not all(bool(torch.isfinite(value).all()) for value in state_dict.values()):
        raise MetricError(f"{path}: holds weights that are not finite; fetch the file again")
    return state_dict


def _build(module: Any, state_dict: dict[str, Tensor], path: Path) -> Any:
    # torch-fidelity loads with weights_only=False; it is given a copy that holds what the safe load accepted.
    copy = io.BytesIO()
    torch.save(state_dict, copy)
    copy.seek(0)
    try:
        with torch.random.fork_rng(devices=[]):  # its layers draw their first weights from the global generator
            return module.FeatureExtractorInceptionV3("inception-v3-compat", [LAYER], copy)
    except RuntimeError as error:
        raise MetricError(f"{path}: belongs to another network; pass torch-fidelity's Inception weights") from error
