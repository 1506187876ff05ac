"""Lightning: a network with batch normalization, its ``.ckpt`` files, and ``Trainer.validate``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import tiny
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Classifier(LightningModule):
    """Two convolutions with batch normalization."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()
        layers: list[nn.Module] = []
        for inputs in (1, width):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
        self.net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[N, 10]``."""
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: list[Tensor], _index: int) -> Tensor:
        """The loss of a batch."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], _index: int) -> None:
        """What the trainer logs."""
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam at a high rate."""
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def train() -> None:
    """A checkpoint every 10 steps."""
    saving = ModelCheckpoint("runs", every_n_train_steps=10, save_top_k=-1)
    loader = DataLoader(TensorDataset(*tiny.digits("train")), batch_size=30, shuffle=True)
    trainer = Trainer(max_steps=300, accelerator="cpu", logger=False, callbacks=[saving], enable_progress_bar=False)
    trainer.fit(Classifier(), loader)


def build() -> Classifier:
    """A network for the study."""
    return Classifier()


def loss(model: nn.Module, draw: Any) -> Iterator[Tensor]:
    """The cross-entropy of each image."""
    for images, labels in tiny.batches(draw.group, draw):
        yield F.cross_entropy(model(images), labels, reduction="none")


def evaluate(path: str) -> list[float]:
    """``Trainer.validate`` of ``load_from_checkpoint``."""
    model = Classifier.load_from_checkpoint(path)
    loader = DataLoader(TensorDataset(*tiny.digits("held-out")), batch_size=50)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    [metrics] = trainer.validate(model, loader, verbose=False)
    return [metrics["val_loss"]]


if __name__ == "__main__":
    tiny.main(train, evaluate)
