"""What a search gains when nobody clips: four models of scikit-learn's images, searched by two losses.

    python benchmarks/clipping.py [--seeds 3] [--models flow] [--vary losses optimizers references]

* ``flow``: a small flow of digits in eight steps, with fifty checkpoints, trained as a newcomer does on the first 1,200
* ``consistency``: a one-step consistency model of digits, with a hundred checkpoints, trained as in ``real.py``
* ``ddpm``: the diffusion model of ``studies/digits_ddpm.yaml`` in ten steps of DPM-Solver++, with 200 checkpoints
* ``photographs``: the one-step consistency model of ``studies/photographs.yaml``, with 200 checkpoints

All but the first are trained on every other image, and crops of photographs have no pixel in common with those that are
left out. Each model is searched by the gradient with ``loss: fid``, ``loss: fdr`` and ``fdr`` without tones, a row of
coefficients for each layer; by other optimizers; or with some of the real images.

What is printed is measured apart from lcsc_opt's metrics, on 4,000 samples from noise that no search saw, with the
images that were neither trained on nor searched with: Fréchet distances in the features that were searched, in 30
principal components of the pixels, and in a second network (of digits, a classifier of those images; of photographs,
the bundled one, which has seen all), also of images before clipping to [−1, 1]; and precision and recall in the
features that were searched. EMA* is that of the first search. Each seed is a training of its own; what ``lcsc train``
trains is kept in ``results/models``.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from common import RESULTS, cell, machine, markdown, parse, trained
from PIL import Image
from real import Array, Real, UNet, consistency_loss, precision_and_recall, sample_consistency
from torch import Tensor, nn

import lcsc_opt
from lcsc_opt.metrics.bundled_images import Bundled, bundled_images
from lcsc_opt.metrics.extractors.bundled import feature_network
from lcsc_opt.sampling import DiffusersFolder, build_scheduler

CALLS = 8  # of the flow's network, for a sample
COMPONENTS = 30
PIXELS_ONLY = "{fdr: [network, pixels]}"
SAMPLES = 4000


class Way(NamedTuple):
    """How a model is searched; ``real`` is the number of images that it is compared with, by default all."""

    loss: str = "fdr"
    rows: str | None = None
    keep: str | None = None
    optimizer: str = "LCSCGradient"
    real: int | None = None

    def setting(self, network: str) -> str | dict[str, list[str]]:
        """The setting ``loss`` in the features of ``network``."""
        if self.loss == PIXELS_ONLY:
            return {"fdr": [network, "pixels"]}
        return f"{self.loss}@{network}"

    def __str__(self) -> str:
        parts = [self.optimizer, self.loss, self.rows or "one row"]
        if self.keep is not None:
            parts.append(f"keep: {self.keep}")
        if self.real is not None:
            parts.append(f"{self.real} real images")
        return ", ".join(parts)


WAYS = {
    "losses": [
        Way("fid", "layers"),
        Way("fdr", "layers"),
        Way(PIXELS_ONLY, "layers"),
    ],
    "optimizers": [Way(optimizer=optimizer) for optimizer in ("LCSC", "CMA", "LCSCQuadratic")],
    "references": [Way(rows=rows, real=real) for real in (600, 300, 150, 80, 40) for rows in (None, "layers")],
}
EVALUATIONS = {"LCSCGradient": 100}  # others: 300, which take about as long
DISTANCES = ("FID", "FID raw", "pixels", "pixels raw", "second network", "second network raw")
SHARES = ("precision", "recall")


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
class Trained:
    """One training: its checkpoints, and what samples from the network with their weights, without clipping."""

    checkpoints: Path | dict[int, dict[str, Tensor]]
    build: Callable[[], nn.Module]
    sample: Callable[[nn.Module, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Model:
    """What is trained and searched.

    Attributes:
        data: the images; the network that is searched with is theirs.
        trained_on, unseen: which of them.
        images: of an evaluation.
        train: images ``[N, C, H, W]``, the folder of the same images, and a seed → a training.
    """

    data: Bundled
    trained_on: slice
    unseen: slice
    images: int
    train: Callable[[Tensor, Path, int], Trained]


@dataclasses.dataclass(frozen=True)
class Loop:
    """A training by the loop of this file; called as :class:`Model`'s ``train``."""

    build: Callable[[], nn.Module]
    sample: Callable[[nn.Module, Tensor], Tensor]
    loss: Callable[[nn.Module, Tensor, torch.Generator, float], Tensor]
    steps: int
    every: int
    batch: int

    def __call__(self, images: Tensor, folder: Path, seed: int) -> Trained:  # noqa: ARG002
        """Train on ``[N, 1, 8, 8]`` in memory."""
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        net = self.build()
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)
        checkpoints = {}
        for step in range(1, self.steps + 1):
            batch = images[torch.randint(len(images), (self.batch,), generator=generator)]
            loss = self.loss(net, batch, generator, step / self.steps)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if step % self.every == 0:
                checkpoints[step] = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        return Trained(checkpoints, self.build, self.sample)


def train_by_command(name: str, calls: int, _images: Tensor, folder: Path, seed: int) -> Trained:
    """A training by ``lcsc train``, as ``objectives/trained.py`` has its command, but on the images of a folder."""
    options = ("--data", str(folder), "--seed", str(seed))
    path = trained(name, *options, folder=RESULTS, output=f"{name}_clipping_{seed}")
    model = DiffusersFolder.read(path)
    assert model.scheduler is not None
    config = {**model.scheduler, "clip_denoised": False}
    return Trained(path, model.network, functools.partial(sample_by_scheduler, config=config, calls=calls))


def sample_by_scheduler(net: nn.Module, noise: Tensor, *, config: dict[str, Any], calls: int) -> Tensor:
    """``[B, C, H, W]`` images from as much noise, by a scheduler of diffusers."""
    scheduler = build_scheduler(None, config)
    scheduler.set_timesteps(calls)
    images: Tensor = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        output = net(scheduler.scale_model_input(images, timestep), timestep).sample
        images = scheduler.step(output, timestep, images).prev_sample
    return images


EVEN, ODD = slice(0, None, 2), slice(1, None, 2)
MODELS = {
    "flow": Model("digits", slice(1200), slice(1200, None), 500, Loop(Net, sample, flow_loss, 5000, 100, 128)),
    "consistency": Model("digits", EVEN, ODD, 200, Loop(UNet, sample_consistency, consistency_loss, 4000, 40, 64)),
    "ddpm": Model("digits", EVEN, ODD, 500, functools.partial(train_by_command, "digits_ddpm", 10)),
    "photographs": Model("photographs", EVEN, ODD, 500, functools.partial(train_by_command, "photographs", 1)),
}


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
        images, classes = bundled_images(model.data)
        self._shape = images.shape[1:]
        self._searched = feature_network(model.data)
        if model.data == "digits":
            self._second: nn.Module = second_network(images[model.unseen], classes[model.unseen])
        else:
            self._second = feature_network(model.data, second=True)
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

    def measure(self, training: Trained, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """All that is compared, of a merged model: the mean over three groups of noise."""
        net = training.build().eval()
        net.load_state_dict(weights)
        groups = [self._measure_group(training, net, seed) for seed in (101, 102, 103)]
        return {name: statistics.fmean(group[name] for group in groups) for name in groups[0]}

    def _measure_group(self, training: Trained, net: nn.Module, seed: int) -> dict[str, float]:
        noise = torch.randn(SAMPLES, *self._shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            images = torch.cat([training.sample(net, batch) for batch in torch.split(noise, 500)])
        clipped = self._features(images.clamp(-1, 1))
        raw = self._features(images)
        measured = {}
        for name, real in self._unseen.items():
            measured[name] = real.frechet(clipped[name])
            measured[f"{name} raw"] = real.frechet(raw[name])
        unseen = self._unseen["FID"].features
        measured["precision"], measured["recall"] = precision_and_recall(clipped["FID"], unseen)
        measured["outside"] = float((images.abs() > 1 + 1 / 255).float().mean())
        return measured


def write_reference(images: Tensor, folder: Path, *, count: int) -> None:
    """So many of the images that were trained on, evenly chosen, as PNG files."""
    if folder.exists():
        return
    folder.mkdir()
    chosen = np.linspace(0, len(images) - 1, count).round().astype(int)
    for index, pixels in enumerate(((images[chosen] + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()):
        Image.fromarray(pixels.squeeze()).save(folder / f"{index:04d}.png")


def compare(model: Model, ways: Sequence[Way], seeds: int) -> list[list[str]]:
    """The table: every way of searching against EMA*, over trainings."""
    judge = Judge(model)
    images = bundled_images(model.data)[0][model.trained_on]
    measured: list[list[dict[str, float]]] = [[] for _ in ways]
    ema: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        everything = Path(folder, str(len(images)))
        write_reference(images, everything, count=len(images))
        for seed in range(seeds):
            training = model.train(images, everything, seed)
            for way, of_way in zip(ways, measured, strict=True):
                reference = Path(folder, str(way.real or len(images)))
                write_reference(images, reference, count=way.real or len(images))
                result = lcsc_opt.search(
                    training.checkpoints,
                    build=training.build,
                    sample=training.sample,
                    reference=reference,
                    image_shape=tuple(images.shape[1:]),
                    optimizers=["EMAGrid", way.optimizer],
                    rows=way.rows,
                    loss=way.setting(model.data),
                    settings={} if way.keep is None else {"keep": way.keep},
                    images=model.images,
                    budget=EVALUATIONS.get(way.optimizer, 300),
                    held_out=3000,
                    storage=None,
                )
                grid, search = result.studies
                if way == ways[0]:
                    ema.append(judge.measure(training, grid.merge()))
                    print(f"seed {seed}, EMA*: {ema[-1]}", file=sys.stderr)
                of_way.append(judge.measure(training, search.merge()))
                print(f"seed {seed}, {way}: {of_way[-1]}", file=sys.stderr)
    table = [["", *DISTANCES, *SHARES, "worst", "outside, %"], row("EMA*", ema, None)]
    for way, of_way in zip(ways, measured, strict=True):
        table.append(row(f"{way}, ÷ EMA*", of_way, ema))
    return table


def row(name: str, models: list[dict[str, float]], ema: list[dict[str, float]] | None) -> list[str]:
    """A line of the table: distances, divided by EMA*'s if it is given; shares as they are.

    The worst is the highest of the mean ratios to EMA*; for precision and recall, of the inverse ratios.
    """
    cells = [name]
    ratios = []
    for metric in DISTANCES:
        values = [model[metric] for model in models]
        if ema is not None:
            values = [model[metric] / base[metric] for model, base in zip(models, ema, strict=True)]
            ratios.append(statistics.fmean(values))
        cells.append(cell(values))
    for share in SHARES:
        cells.append(cell([model[share] for model in models]))
        if ema is not None:
            inverse = [base[share] / model[share] for model, base in zip(models, ema, strict=True)]
            ratios.append(statistics.fmean(inverse))
    cells.append(f"{max(ratios):.2f}" if ratios else "")
    return [*cells, cell([100 * model["outside"] for model in models])]


def main() -> None:
    """Train, search each way, and print the tables."""
    models = {"nargs": "+", "choices": list(MODELS), "default": list(MODELS)}
    vary = {"nargs": "+", "choices": list(WAYS), "default": ["losses"]}
    arguments = parse(__doc__, seeds=3, models=models, vary=vary)
    print(machine())
    for name in arguments.models:
        ways = [way for varied in arguments.vary for way in WAYS[varied]]
        print(f"\n## {name}\n")
        print(*markdown(compare(MODELS[name], ways, arguments.seeds)), sep="\n", flush=True)


if __name__ == "__main__":
    main()
