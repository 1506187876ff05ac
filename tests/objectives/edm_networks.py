"""A network with the interface of EDM's, and snapshots of it as NVlabs' training pickles them."""

from __future__ import annotations

import pickle
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SOURCE = "raise RuntimeError('a snapshot ran its code')"


def _reconstruct_persistent_obj(meta: dict[str, Any]) -> Any:
    exec(meta["module_src"], {})


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


class TinyPrecond(nn.Module):
    """D(x; sigma) with the preconditioning of Karras et al. 2022, Table 1, around one convolution."""

    def __init__(
        self, img_resolution: int, img_channels: int, label_dim: int = 0, use_fp16: bool = False, width: int = 4
    ) -> None:
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.use_fp16, self.sigma_data = use_fp16, 0.5
        self.register_buffer("filter", torch.ones(2))
        self.layers = nn.Sequential(
            nn.Conv2d(img_channels + 1, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, img_channels, 1)
        )
        self.classes = nn.Linear(label_dim, img_channels) if label_dim else None
        self._stored: dict[str, Any] = {"img_resolution": img_resolution, "img_channels": img_channels}
        self._stored |= {"label_dim": label_dim, "width": width}

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        s = sigma.reshape(-1, 1, 1, 1)
        norm = (s**2 + self.sigma_data**2).sqrt()
        c_noise = (s.log() / 4).expand(len(x), 1, *x.shape[2:])
        output = self.layers(torch.cat([x / norm, c_noise], 1))
        if self.classes is not None and class_labels is not None:
            output = output + self.classes(class_labels)[:, :, None, None]
        return self.sigma_data**2 / norm**2 * x + s * self.sigma_data / norm * output

    def __reduce__(self) -> Any:
        state = {**super().__reduce__()[2], "_init_args": (), "_init_kwargs": self._stored}  # type: ignore[dict-item]
        meta = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": type(self).__name__, "state": state}
        return _reconstruct_persistent_obj, (meta,), None


class BoundedPrecond(TinyPrecond):
    """One that knows the noise levels 0.01 to 50."""

    sigma_min, sigma_max = 0.01, 50.0


def no_network(**_: Any) -> int:
    return 3


def tiny(seed: int, **options: Any) -> TinyPrecond:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TinyPrecond(8, 1, **options).eval().requires_grad_(requires_grad=False)


def write_snapshot(path: Path, network: TinyPrecond) -> None:
    """``network-snapshot-*.pkl``; unpickling it the usual way fails, since that runs its source."""
    module = types.ModuleType("torch_utils.persistence")
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj  # type: ignore[attr-defined]
    modules = {"torch_utils": types.ModuleType("torch_utils"), "torch_utils.persistence": module}
    sys.modules.update(modules)
    try:
        path.write_bytes(pickle.dumps({"ema": network, "dataset_kwargs": {"path": "data.zip"}}))
    finally:
        for name in modules:
            del sys.modules[name]
