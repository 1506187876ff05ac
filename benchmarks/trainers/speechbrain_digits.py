"""speechbrain: its ``Brain`` and ``Checkpointer``, with folders such as ``CKPT+2026-01-01+10-00-00+00``."""

# ruff: noqa: E402 (what stands for torchaudio comes before speechbrain)
from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tiny
import torch

sys.modules["torchaudio"] = types.ModuleType("torchaudio")  # that of pip may need CUDA; nothing is heard here
import speechbrain
from speechbrain.nnet.CNN import Conv1d
from speechbrain.nnet.linear import Linear
from speechbrain.nnet.losses import nll_loss
from speechbrain.nnet.normalization import BatchNorm1d
from speechbrain.nnet.pooling import StatisticsPooling
from speechbrain.utils.checkpoints import Checkpointer
from speechbrain.utils.epoch_loop import EpochCounter
from speechbrain.utils.parameter_transfer import Pretrainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Recognizer(nn.Module):
    """Reads an image as eight frames of eight features, as an x-vector does."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first = Conv1d(width, 3, in_channels=8)
        self.normalized = BatchNorm1d(input_size=width)
        self.second = Conv1d(width, 3, in_channels=width)
        self.pooled = StatisticsPooling(return_std=False)
        self.last = Linear(10, input_size=width)

    def forward(self, images: Tensor) -> Tensor:
        """Logarithms of probabilities ``[N, 10]``."""
        frames = F.relu(self.normalized(self.first(images[:, 0])))
        return F.log_softmax(self.last(self.pooled(F.relu(self.second(frames)))[:, 0]), dim=-1)


class Training(speechbrain.Brain):
    """A checkpoint after each epoch."""

    loss: float

    def compute_forward(self, batch: list[Tensor], stage: speechbrain.Stage) -> Tensor:  # noqa: ARG002
        """Logarithms of probabilities."""
        predicted: Tensor = self.modules.model(batch[0])
        return predicted

    def compute_objectives(
        self,
        predictions: Tensor,
        batch: list[Tensor],
        stage: speechbrain.Stage,  # noqa: ARG002
    ) -> Tensor:
        """The loss of a batch."""
        loss: Tensor = nll_loss(predictions, batch[1])
        return loss

    def on_stage_end(self, stage: speechbrain.Stage, stage_loss: float, epoch: int | None = None) -> None:
        """Save, or keep what was measured."""
        self.loss = stage_loss
        if stage == speechbrain.Stage.TRAIN:
            self.checkpointer.save_checkpoint(meta={"epoch": epoch, "loss": stage_loss})


def build() -> Recognizer:
    """The network."""
    return Recognizer()


def loader(part: str, **options: Any) -> DataLoader[tuple[Tensor, ...]]:
    """The digits of a part."""
    return DataLoader(TensorDataset(*tiny.digits(part)), **options)


def training(model: Recognizer, **options: Any) -> Training:
    """The trainer of a network."""
    return Training(
        {"model": model},
        lambda parameters: torch.optim.Adam(parameters, lr=3e-3),
        run_opts={"device": "cpu", "noprogressbar": True},
        **options,
    )


def train(epochs: int = 20) -> None:
    """A checkpoint each epoch."""
    model = build()
    counter = EpochCounter(epochs)
    checkpointer = Checkpointer("runs", recoverables={"model": model, "counter": counter})
    training(model, checkpointer=checkpointer).fit(counter, loader("train", batch_size=30, shuffle=True))


def loss(model: nn.Module, draw: Any) -> Iterator[Tensor]:
    """The loss of each image."""
    for images, labels in tiny.batches(draw.group, draw):
        yield F.nll_loss(model(images), labels, reduction="none")


def evaluate(path: str) -> list[float]:
    """``Brain.evaluate`` of the last checkpoint in a folder, or of what ``Pretrainer`` loads from a file."""
    model = build()
    if Path(path).is_dir():
        Checkpointer(path, recoverables={"model": model}).recover_if_possible()
    else:
        pretrainer = Pretrainer(loadables={"model": model}, paths={"model": path}, collect_in=None)
        pretrainer.collect_files()
        pretrainer.load_collected()
    trained = training(model)
    trained.evaluate(loader("held-out", batch_size=27))
    return [trained.loss]


if __name__ == "__main__":
    tiny.main(train, evaluate)
