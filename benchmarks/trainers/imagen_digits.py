"""imagen-pytorch: its ``ImagenTrainer`` without texts, and its sampler, which runs under ``no_grad``."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import tiny
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import T5Config

with mock.patch.object(T5Config, "from_pretrained", return_value=T5Config(d_model=768)):  # which it would download
    from imagen_pytorch import Imagen, ImagenTrainer, Unet


class Digits(Dataset[Tensor]):
    """The digits that it is trained on."""

    def __init__(self) -> None:
        self.images, _ = tiny.digits("train")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def build() -> Imagen:
    """A cascade of one small U-Net, sampled in ten steps."""
    unet = Unet(
        dim=16, dim_mults=(1, 2), channels=1, num_resnet_blocks=1, layer_attns=False, attn_heads=2, attn_dim_head=8
    )
    return Imagen(unet, image_sizes=8, channels=1, timesteps=10, condition_on_text=False)


def trainer() -> ImagenTrainer:
    """The trainer, with its last checkpoint if there is one; it saves one every 30 steps."""
    return ImagenTrainer(
        build(), lr=1e-3, checkpoint_path="runs", checkpoint_every=30, max_checkpoints_keep=0, verbose=False
    )


def train() -> None:
    """600 steps."""
    tiny.write_images(tiny.IMAGES, tiny.digits("train")[0])
    Path("runs").mkdir()
    made = trainer()
    made.add_train_dataset(Digits(), batch_size=32, shuffle=True)
    for _ in range(600):
        made.train_step(unet_number=1)


def sample(model: nn.Module, noise: Tensor) -> Tensor:
    """The trainer's own sampler, which begins with this noise."""
    assert isinstance(model, Imagen)
    with mock.patch("torch.randn", return_value=noise):
        images: Tensor = model.sample(batch_size=len(noise), use_tqdm=False)
    return images * 2 - 1


def evaluate(path: str) -> list[float]:
    """The Fréchet distance of images that the trainer's EMA samples."""
    loaded = trainer()
    loaded.load(path)
    drawn = [loaded.sample(batch_size=tiny.SAMPLES, use_tqdm=False) for _ in range(tiny.EVALUATIONS)]
    return [tiny.distance(images) for images in drawn]


if __name__ == "__main__":
    tiny.main(train, evaluate)
