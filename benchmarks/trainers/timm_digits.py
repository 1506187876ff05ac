"""timm: its model, its EMA and its ``CheckpointSaver`` in a short loop, as ``train.py`` has them."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import tiny
import torch
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F

MODEL = "test_resnet"


def build() -> nn.Module:
    """A small network of timm."""
    model: nn.Module = timm.create_model(MODEL, num_classes=10, in_chans=1)
    return model


def enlarged(images: Tensor) -> Tensor:
    """``[N, 1, 8, 8]`` → ``[N, 1, 64, 64]``."""
    return F.interpolate(images, scale_factor=8)


def train(epochs: int = 20) -> None:
    """A checkpoint each epoch, with the raw weights and the EMA."""
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    ema = ModelEmaV3(model, decay=0.9)
    Path("runs").mkdir(exist_ok=True)
    arguments = argparse.Namespace(model=MODEL, lr=2e-3)
    saver = CheckpointSaver(
        model, optimizer, args=arguments, model_ema=ema, checkpoint_dir="runs", recovery_dir="runs", max_history=epochs
    )
    images, labels = tiny.digits("train")
    for epoch in range(epochs):
        model.train()
        for indices in torch.randperm(len(images)).split(60):
            optimizer.zero_grad()
            F.cross_entropy(model(enlarged(images[indices])), labels[indices]).backward()
            optimizer.step()
            ema.update(model)
        saver.save_checkpoint(epoch, metric=accuracy(ema.module, "search"))


@torch.no_grad()
def accuracy(model: nn.Module, part: str) -> float:
    """In percent, as timm's ``validate`` has it."""
    model.eval()
    hits = [model(enlarged(images)).argmax(1) == labels for images, labels in tiny.batches(part)]
    return 100 * torch.cat(hits).double().mean().item()


def loss(model: nn.Module, draw: Any) -> Iterator[Tensor]:
    """The cross-entropy of each image."""
    for images, labels in tiny.batches(draw.group, draw):
        yield F.cross_entropy(model(enlarged(images)), labels, reduction="none")


@torch.no_grad()
def evaluate(path: str) -> list[float]:
    """The loss that ``validate.py`` logs, of the EMA that ``create_model`` loads."""
    model: nn.Module = timm.create_model(MODEL, num_classes=10, in_chans=1, checkpoint_path=path).eval()
    images, labels = tiny.digits("held-out")
    return [nn.CrossEntropyLoss()(model(enlarged(images)), labels).item()]


if __name__ == "__main__":
    tiny.main(train, evaluate)
