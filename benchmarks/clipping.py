"""What a search gains when nobody clips: a flow of scikit-learn's digits, trained as users do, searched by two losses.

    python benchmarks/clipping.py [--seeds 3]

Fifty checkpoints of a small network are searched with ``loss: fid`` and ``loss: fdr``, one row of coefficients and one
for each layer, 20,000 images by the gradient. What is printed is measured apart from lcsc_opt's metrics: the Fréchet
distance of 4,000 samples to the 597 digits that nobody trained on or searched with, in 30 principal components of the
pixels, as the network gives them and clipped to [−1, 1]; and the share of values outside. EMA* is that of FID in all
rows. Each seed is a training of its own.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import cell, machine, markdown, parse
from sklearn.datasets import load_digits
from torch import Tensor, nn

import lcsc_opt
from lcsc_opt.metrics import FrechetReference

TRAINED_ON = 1200
STEPS = 5000
EVERY = 100
CALLS = 8  # of the network, for a sample
WAYS = [("fid@digits", None), ("fdr@digits", None), ("fid@digits", "layers"), ("fdr@digits", "layers")]


class Net(nn.Module):
    """The velocity at a point of 64 pixels and a time."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(64 + 16, width), nn.SiLU()]
        for _ in range(2):
            layers += [nn.Linear(width, width), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 64))
        self.frequencies: Tensor
        self.register_buffer("frequencies", 2.0 ** torch.arange(8) * torch.pi)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """``[B, 64]`` pixels and ``[B]`` times → ``[B, 64]``."""
        angles = t[:, None] * self.frequencies
        velocity: Tensor = self.layers(torch.cat([x, angles.sin(), angles.cos()], dim=1))
        return velocity


def sample(net: nn.Module, noise: Tensor) -> Tensor:
    """``[B, 1, 8, 8]`` images from as much noise, not clipped."""
    x = noise.flatten(1)
    for call in range(CALLS):
        t = torch.full((len(x),), 1 - call / CALLS)
        x = x - net(x, t) / CALLS
    return x.reshape(noise.shape)


def digits() -> Tensor:
    """``[1797, 64]`` in [−1, 1]."""
    return torch.from_numpy(load_digits().data).float() / 8 - 1


def train(seed: int) -> dict[int, dict[str, Tensor]]:
    """Step → state dict, of one training."""
    torch.manual_seed(seed)
    images = digits()[:TRAINED_ON]
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    checkpoints = {}
    for step in range(1, STEPS + 1):
        x = images[torch.randint(len(images), (128,))]
        z = torch.randn_like(x)
        t = torch.rand(len(x))
        noisy = (1 - t[:, None]) * x + t[:, None] * z
        loss = (net(noisy, t) - (z - x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % EVERY == 0:
            checkpoints[step] = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    return checkpoints


class Judge:
    """Distances to the digits that nobody saw."""

    def __init__(self) -> None:
        images = digits().double().numpy()
        self._mean = images[:TRAINED_ON].mean(axis=0)
        _, _, directions = np.linalg.svd(images[:TRAINED_ON] - self._mean, full_matrices=False)
        self._basis = directions[:30].T
        unseen = self._components(images[TRAINED_ON:])
        self._unseen = FrechetReference(unseen.mean(axis=0), np.cov(unseen.T))

    def _components(self, pixels: Any) -> Any:
        return (pixels - self._mean) @ self._basis

    def measure(self, weights: dict[str, Tensor]) -> tuple[float, float, float]:
        """The distance as the network gives images, that of clipped ones, and the share of values outside."""
        net = Net()
        net.load_state_dict(weights)
        rows = []
        for seed in (101, 102, 103):
            noise = torch.randn(4000, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
            with torch.no_grad():
                pixels = sample(net, noise).flatten(1).double().numpy()
            raw = self._unseen.distance_from_features(self._components(pixels))
            clipped = self._unseen.distance_from_features(self._components(pixels.clip(-1, 1)))
            rows.append((raw, clipped, float((np.abs(pixels) > 1 + 1 / 255).mean())))
        raw, clipped, outside = (statistics.fmean(column) for column in zip(*rows, strict=True))
        return raw, clipped, outside


def write_reference(folder: Path) -> None:
    """The images that were trained on, as PNG files."""
    from PIL import Image

    for index, pixels in enumerate(digits()[:TRAINED_ON].reshape(-1, 8, 8)):
        Image.fromarray(((pixels + 1) * 127.5).round().byte().numpy()).save(folder / f"{index:04d}.png")


def main() -> None:
    """Train, search each way, and print the table."""
    arguments = parse(__doc__, seeds=3)
    print(machine())
    judge = Judge()
    measured: dict[tuple[str, str | None], list[tuple[float, float, float]]] = {way: [] for way in WAYS}
    ema: list[tuple[float, float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        write_reference(Path(folder))
        for seed in range(arguments.seeds):
            checkpoints = train(seed)
            for loss, rows in WAYS:
                result = lcsc_opt.search(
                    checkpoints,
                    build=Net,
                    sample=sample,
                    reference=folder,
                    image_shape=(1, 8, 8),
                    rows=rows,
                    loss=loss,
                    images=500,
                    budget=100,
                    held_out=3000,
                    storage=None,
                )
                grid, search = result.studies
                if (loss, rows) == WAYS[0]:
                    ema.append(judge.measure(grid.merge()))
                measured[loss, rows].append(judge.measure(search.merge()))
    table = [["loss", "rows", "unclipped ÷ EMA*", "clipped ÷ EMA*", "outside, points more than EMA*"]]
    for (loss, rows), values in measured.items():
        raw = [found[0] / base[0] for found, base in zip(values, ema, strict=True)]
        clipped = [found[1] / base[1] for found, base in zip(values, ema, strict=True)]
        outside = [100 * (found[2] - base[2]) for found, base in zip(values, ema, strict=True)]
        table.append([loss, rows or "one", cell(raw), cell(clipped), cell(outside)])
    print(*markdown(table), sep="\n")


if __name__ == "__main__":
    main()
