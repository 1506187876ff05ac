"""rectified-flow-pytorch: its ``Trainer``, files such as ``checkpoint.25.pt``, and its sampler under ``no_grad``."""

from __future__ import annotations

import functools
from pathlib import Path

import tiny
import torch
from rectified_flow_pytorch import RectifiedFlow, Trainer, Unet
from torch import Tensor, nn
from torch.utils.data import Dataset

SHAPE = (1, 8, 8)


class Digits(Dataset[Tensor]):
    """The digits that it is trained on."""

    def __init__(self) -> None:
        self.images, _ = tiny.digits("train")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def build() -> RectifiedFlow:
    """A small U-Net."""
    return RectifiedFlow(Unet(dim=16, dim_mults=(1, 2), channels=1, attn_dim_head=8, attn_heads=2), data_shape=SHAPE)


def trainer(folder: str = "runs") -> Trainer:
    """The trainer."""
    return Trainer(
        build(),
        dataset=Digits(),
        num_train_steps=500,
        learning_rate=1e-3,
        batch_size=32,
        checkpoints_folder=folder,
        results_folder="samples",
        checkpoint_every=25,
        save_results_every=10_000,
        ema_kwargs={"beta": 0.99, "update_every": 1, "update_after_step": 10},
    )


def train() -> None:
    """A checkpoint every 25 steps."""
    tiny.write_images(tiny.IMAGES, tiny.digits("train")[0])
    trainer()()


def sample(model: nn.Module, noise: Tensor) -> Tensor:
    """The trainer's own sampler, which begins with this noise."""
    assert isinstance(model, RectifiedFlow)
    return model.sample(len(noise), steps=8, noise=noise, data_shape=SHAPE) * 2 - 1


@torch.no_grad()
def evaluate(path: str) -> list[float]:
    """The Fréchet distance of images that the trainer's EMA samples."""
    file = Path(path)
    loaded = trainer(str(file.parent))
    loaded.load(file.name)
    draw = functools.partial(loaded.ema_model.sample, batch_size=tiny.SAMPLES, steps=8, data_shape=SHAPE)
    return [tiny.distance(draw()) for _ in range(tiny.EVALUATIONS)]


if __name__ == "__main__":
    tiny.main(train, evaluate)
