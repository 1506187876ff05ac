"""scvi-tools: ``SCVI`` with digits for cells and their pixels for genes, the folders of its ``SaveCheckpoint``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import scvi
import tiny
import torch
from anndata import AnnData
from scvi.model import SCVI
from scvi.train import SaveCheckpoint
from torch import nn

EPOCHS = 16


def cells(part: str) -> AnnData:
    """The digits of a part, as counts ``[N, 64]``."""
    images, _ = tiny.digits(part)
    data = AnnData((16 * images.flatten(1)).round().numpy().astype(np.float32))
    SCVI.setup_anndata(data)
    return data


def learner(data: AnnData) -> SCVI:
    """Its usual model, small."""
    return SCVI(data, n_hidden=32, n_latent=5)


def train() -> None:
    """A checkpoint each epoch."""
    scvi.settings.seed = 0
    saving = SaveCheckpoint(dirpath="runs", monitor="elbo_validation", save_top_k=-1)
    learner(cells("train")).train(
        max_epochs=EPOCHS,
        accelerator="cpu",
        check_val_every_n_epoch=1,
        enable_checkpointing=True,
        callbacks=[saving],
        enable_progress_bar=False,
    )


def build() -> nn.Module:
    """The module of the model."""
    module: nn.Module = learner(cells("train")).module
    return module


def elbo(module: nn.Module, draw: Any) -> float:
    """``get_elbo`` of the merged module, higher is better."""
    data = cells(draw.group)
    model = learner(data)
    model.module = module
    model.is_trained_ = True
    with torch.random.fork_rng():
        torch.manual_seed(draw.seed % 2**31)
        return float(model.get_elbo(data))


def evaluate(path: str) -> list[float]:
    """``get_elbo`` of what ``load`` reads, with other random numbers each time; of ``runs``, the last checkpoint."""
    folder = Path(path).parent
    if path == "runs":
        folder = max(Path(path).iterdir(), key=lambda place: int(place.name.split("=")[1].split("-")[0]))
    data = cells("held-out")
    model = SCVI.load(str(folder), data, accelerator="cpu")
    return [float(model.get_elbo(data)) for _ in range(tiny.EVALUATIONS)]


if __name__ == "__main__":
    tiny.main(train, evaluate)
