"""ultralytics' YOLOv8n-cls, from its configuration, without weights from elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from ultralytics import YOLO
from ultralytics.cfg import get_cfg
from ultralytics.data.dataset import ClassificationDataset
from ultralytics.nn.tasks import ClassificationModel

LAST = "runs/weights/epoch11.pt"
OPTIONS: dict[str, Any] = {"data": "data", "imgsz": 32, "device": "cpu", "workers": 0, "plots": False, "verbose": False}


PARTS = {"train": "train", "search": "search", "selection": "selection", "val": "held-out"}
"""Folder → part of the digits."""


def train() -> None:
    """A checkpoint each epoch."""
    for folder, part in PARTS.items():
        images, labels = tiny.digits(part)
        for label in range(10):
            enlarged = F.interpolate(images[labels == label], scale_factor=4)  # from 8 pixels, which are too few for it
            tiny.write_images(Path("data") / folder / str(label), enlarged)
    YOLO("yolov8n-cls.yaml").train(
        epochs=12, batch=32, save_period=1, amp=False, project=str(Path.cwd()), name="runs", exist_ok=True, **OPTIONS
    )


def build() -> nn.Module:
    """The network."""
    network: nn.Module = ClassificationModel("yolov8n-cls.yaml", nc=10, verbose=False)
    return network


@functools.cache
def pictures(part: str) -> tuple[Tensor, Tensor]:
    """The images of a part, as ``val`` prepares them, and their labels."""
    folder = next(folder for folder, name in PARTS.items() if name == part)
    data = ClassificationDataset(f"data/{folder}", get_cfg(overrides=OPTIONS))
    items = [data[number] for number in range(len(data))]
    return torch.stack([item["img"] for item in items]), torch.tensor([item["cls"] for item in items])


def accuracy(model: nn.Module, draw: Any) -> Iterator[Tensor]:
    """Whether each image is recognized."""
    images, labels = pictures(draw.group)
    for indices in torch.arange(len(images)).split(100):
        probabilities, _ = model(images[indices])
        yield probabilities.argmax(1) == labels[indices]


def evaluate(path: str) -> list[float]:
    """``val``'s share of digits that are recognized; of a state dict, in the network of the last checkpoint."""
    stored = torch.load(path, weights_only=False)
    trained = YOLO(path if "train_args" in stored else LAST)
    if "train_args" not in stored:
        trained.model.load_state_dict(stored)
    return [trained.val(**OPTIONS).top1]


if __name__ == "__main__":
    tiny.main(train, evaluate)
