"""What a search gains when nobody clips: two models of scikit-learn's digits, searched by two losses.

    python benchmarks/clipping.py [--seeds 3] [--models flow]

``flow`` is a small flow in eight steps, with fifty checkpoints, trained as a newcomer does on the first 1,200 digits.
``consistency`` is a one-step consistency model with a hundred checkpoints, trained as in ``real.py`` on every other
digit. Both are searched by the gradient with ``loss: fid`` and ``loss: fdr``, one row of coefficients and one for each
layer. What is printed is measured apart from lcsc_opt's metrics, on 4,000 samples from noise that no search saw, with
the digits that were neither trained on nor searched with: Fréchet distances in the features that were searched, in 30
principal components of the pixels, and in a classifier trained on those digits; the first two also of images as the
network gives them, before clipping to [−1, 1]; and the precision in the features that were searched. EMA* is that of
FID in all rows. Each seed is a training of its own.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import cell, machine, markdown, parse
from PIL import Image
from real import Array, Real, UNet, consistency_loss, precision_and_recall, sample_consistency
from sklearn.datasets import load_digits
from torch import Tensor, nn

import lcsc_opt
from lcsc_opt.metrics.extractors.bundled import feature_network

CALLS = 8  # of the flow's network, for a sample
COMPONENTS = 30
SAMPLES = 4000
WAYS: list[tuple[str, str | None, str | None]] = [  # loss, rows, keep
    ("fid@digits", None, None),
    ("fdr@digits", None, None),
    ("fid@digits", "layers", None),
    ("fdr@digits", "layers", None),
    ("fdr@digits", "layers", "precision"),
]
DISTANCES = ("FID", "FID raw", "pixels", "pixels raw", "second network")


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


def flow_loss(net: nn.Module, images: Tensor, generator: torch.Generator, progress: float) -> Tensor:  # noqa: ARG001
    """The squared error of the velocity at random times, for ``[B, 1, 8, 8]``."""
    x = images.flatten(1)
    z = torch.randn(x.shape, generator=generator)
    t = torch.rand(len(x), generator=generator)
    noisy = (1 - t[:, None]) * x + t[:, None] * z
    return F.mse_loss(net(noisy, t), z - x)


@dataclasses.dataclass(frozen=True)
class Model:
    """One of the two models, its training, and what a search samples of it."""

    build: Callable[[], nn.Module]
    sample: Callable[[nn.Module, Tensor], Tensor]
    loss: Callable[[nn.Module, Tensor, torch.Generator, float], Tensor]
    trained_on: slice
    unseen: slice
    steps: int
    every: int
    batch: int
    images: int  # of an evaluation


MODELS = {
    "flow": Model(Net, sample, flow_loss, slice(1200), slice(1200, None), 5000, 100, 128, 500),
    "consistency": Model(
        UNet, sample_consistency, consistency_loss, slice(0, None, 2), slice(1, None, 2), 4000, 40, 64, 200
    ),
}


def digits() -> tuple[Tensor, Tensor]:
    """``[1797, 1, 8, 8]`` in [−1, 1], and their classes."""
    data = load_digits()
    return torch.from_numpy(data.data).float().reshape(-1, 1, 8, 8) / 8 - 1, torch.from_numpy(data.target)


def train(model: Model, seed: int) -> dict[int, dict[str, Tensor]]:
    """Step → state dict, of one training."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images = digits()[0][model.trained_on]
    net = model.build()
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    checkpoints = {}
    for step in range(1, model.steps + 1):
        batch = images[torch.randint(len(images), (model.batch,), generator=generator)]
        loss = model.loss(net, batch, generator, step / model.steps)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % model.every == 0:
            checkpoints[step] = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    return checkpoints


def second_network(images: Tensor, classes: Tensor) -> nn.Sequential:
    """A classifier of these digits without its last layer: ``[N, 1, 8, 8]`` → ``[N, 64]``."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 64), nn.SiLU())
    network = nn.Sequential(body, nn.Linear(64, 10))
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for _ in range(60):
        for batch in torch.split(torch.randperm(len(images)), 64):
            loss = F.cross_entropy(network(images[batch]), classes[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return body.requires_grad_(False)


class Judge:
    """Compares samples with the digits that nobody saw."""

    def __init__(self, model: Model) -> None:
        images, classes = digits()
        self._model = model
        self._searched = feature_network("digits")
        self._second = second_network(images[model.unseen], classes[model.unseen])
        trained_on = images[model.trained_on].flatten(1).double().numpy()
        self._mean = trained_on.mean(axis=0)
        _, _, directions = np.linalg.svd(trained_on - self._mean, full_matrices=False)
        self._components = directions[:COMPONENTS].T
        self._unseen = {name: Real(features) for name, features in self._features(images[model.unseen]).items()}

    @torch.no_grad()
    def _features(self, images: Tensor) -> dict[str, Array]:
        pixels = images.flatten(1).double().numpy()
        return {
            "FID": self._searched(images).double().numpy(),
            "pixels": (pixels - self._mean) @ self._components,
            "second network": self._second(images).double().numpy(),
        }

    def measure(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """All that is compared, of a merged model: the mean over three groups of noise."""
        net = self._model.build()
        net.load_state_dict(weights)
        groups = [self._measure_group(net, seed) for seed in (101, 102, 103)]
        return {name: statistics.fmean(group[name] for group in groups) for name in groups[0]}

    def _measure_group(self, net: nn.Module, seed: int) -> dict[str, float]:
        noise = torch.randn(SAMPLES, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            images = self._model.sample(net, noise)
        clipped = self._features(images.clamp(-1, 1))
        raw = self._features(images)
        measured = {}
        for name, real in self._unseen.items():
            measured[name] = real.frechet(clipped[name])
            measured[f"{name} raw"] = real.frechet(raw[name])
        measured["precision"], _ = precision_and_recall(clipped["FID"], self._unseen["FID"].features)
        measured["outside"] = float((images.abs() > 1 + 1 / 255).float().mean())
        return measured


def write_reference(model: Model, folder: Path) -> None:
    """The images that were trained on, as grey PNG files."""
    for index, pixels in enumerate(digits()[0][model.trained_on, 0]):
        Image.fromarray(((pixels + 1) * 127.5).round().byte().numpy()).save(folder / f"{index:04d}.png")


def compare(model: Model, seeds: int) -> list[list[str]]:
    """The table: every way of searching against EMA*, over trainings."""
    judge = Judge(model)
    measured: list[list[dict[str, float]]] = [[] for _ in WAYS]
    ema: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        write_reference(model, Path(folder))
        for seed in range(seeds):
            checkpoints = train(model, seed)
            for way, of_way in zip(WAYS, measured, strict=True):
                loss, rows, keep = way
                result = lcsc_opt.search(
                    checkpoints,
                    build=model.build,
                    sample=model.sample,
                    reference=folder,
                    image_shape=(1, 8, 8),
                    rows=rows,
                    loss=loss,
                    keep=keep,
                    images=model.images,
                    budget=100,
                    held_out=3000,
                    storage=None,
                )
                grid, search = result.studies
                if way == WAYS[0]:
                    ema.append(judge.measure(grid.merge()))
                of_way.append(judge.measure(search.merge()))
    table = [["", *DISTANCES, "precision", "outside, %"], row("EMA*", ema, None)]
    for (loss, rows, keep), of_way in zip(WAYS, measured, strict=True):
        name = f"{loss}, {rows or 'one row'}" + (f", keep: {keep}" if keep else "")
        table.append(row(f"{name}, ÷ EMA*", of_way, ema))
    return table


def row(name: str, models: list[dict[str, float]], ema: list[dict[str, float]] | None) -> list[str]:
    """A line of the table: distances, divided by EMA*'s if it is given; precision and values outside as they are."""
    cells = [name]
    for metric in DISTANCES:
        values: Iterable[float] = [model[metric] for model in models]
        if ema is not None:
            values = [model[metric] / base[metric] for model, base in zip(models, ema, strict=True)]
        cells.append(cell(list(values)))
    cells.append(cell([model["precision"] for model in models]))
    return [*cells, cell([100 * model["outside"] for model in models])]


def main() -> None:
    """Train, search each way, and print the tables."""
    models = {"nargs": "+", "choices": list(MODELS), "default": list(MODELS)}
    arguments = parse(__doc__, seeds=3, models=models)
    print(machine())
    for name in arguments.models:
        print(f"\n## {name}\n")
        print(*markdown(compare(MODELS[name], arguments.seeds)), sep="\n", flush=True)


if __name__ == "__main__":
    main()
