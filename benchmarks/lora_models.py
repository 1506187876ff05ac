"""What ``lora.py`` trains: a small text-to-image pipeline, six LoRAs, the features of searches, and the judge."""

from __future__ import annotations

import functools
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from common import ROOT
from mature_models import shuffled_mnist
from PIL import Image
from real import Array, Real, train_classifier
from torch import Tensor, nn

from lcsc_opt.base.descent import descend
from lcsc_opt.base.imports import allow_mismatched_torchvision
from lcsc_opt.base.libraries import quiet_libraries

allow_mismatched_torchvision()
sys.path.append(str(ROOT / "studies" / "lora"))
digits_lora: Any = importlib.import_module("digits_lora")

SIDE = 16  # pixels
DIGITS: tuple[str, ...] = digits_lora.DIGITS
FACE = len(DIGITS)  # the class of a face; the emoji's categories follow
EPOCHS = 16
EMA_DECAY = 0.99  # of the trainer's average, per step
PARTS = {"base": (0, 20_000), "lora": (20_000, 21_000), "reference": (30_000, 34_000), "search": (34_000, 39_000)}
PARTS |= {"judge": (46_000, 54_000), "unseen": (60_000, 64_000)}
"""Which of MNIST's digits, in a random order, are for what."""


class Pictures(NamedTuple):
    """Images ``[N, 3, 16, 16]`` in [-1, 1], and the class of each."""

    images: Tensor
    classes: Tensor


@functools.cache
def mnist(work: Path) -> Pictures:
    """All digits in a random order, in grey."""
    images, classes = shuffled_mnist(work)
    small = F.avg_pool2d(F.pad(images, (2, 2, 2, 2), value=-1.0), 2)
    return Pictures(small.expand(-1, 3, -1, -1), classes)


def digits(work: Path, part: str) -> Pictures:
    """Those of a part."""
    first, last = PARTS[part]
    return Pictures(*(tensor[first:last] for tensor in mnist(work)))


def coloured(grey: Tensor, seed: int) -> Tensor:
    """Digits in a random ink on random paper."""
    generator = torch.Generator().manual_seed(seed)
    ink, paper = (2 * torch.rand(2, len(grey), 3, 1, 1, generator=generator) - 1).unbind()
    share = (grey + 1) / 2
    return share * ink + (1 - share) * paper


def neon(grey: Tensor, seed: int) -> Tensor:
    """The style: strokes from yellow to pink, with a glow of random blue to violet, at night."""
    generator = torch.Generator().manual_seed(seed)
    share = ((grey[:, :1] + 1) / 2).clamp(0, 1)
    halo = F.avg_pool2d(F.pad(share, (2, 2, 2, 2), mode="replicate"), 5, stride=1).sqrt()
    height = torch.linspace(0, 1, SIDE)[None, None, :, None]
    top, bottom = torch.tensor([1.0, 0.95, 0.2]), torch.tensor([1.0, 0.2, 0.6])
    ink = (1 - height) * top[:, None, None] + height * bottom[:, None, None]
    hue = torch.rand(len(grey), 1, 1, 1, generator=generator)
    blue, violet = torch.tensor([0.1, 0.35, 1.0]), torch.tensor([0.65, 0.1, 0.9])
    glow = (1 - hue) * blue[:, None, None] + hue * violet[:, None, None]
    night = torch.tensor([0.05, 0.02, 0.15])[:, None, None]
    behind = night + halo * (glow - night)
    return 2 * (behind + share * (ink - behind)) - 1


def ink(grey: Tensor, seed: int) -> Tensor:
    """The other style: strokes of dark blue to green ink that bleeds into warm, stained paper."""
    generator = torch.Generator().manual_seed(seed)
    share = ((grey[:, :1] + 1) / 2).clamp(0, 1)
    bleeding = F.avg_pool2d(F.pad(share, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    stains = F.interpolate(torch.rand(len(grey), 1, 3, 3, generator=generator), SIDE, mode="bilinear")
    paper = torch.tensor([0.95, 0.88, 0.72])[:, None, None] * (1 - 0.2 * stains)
    hue = torch.rand(len(grey), 1, 1, 1, generator=generator)
    blue, green = torch.tensor([0.08, 0.1, 0.4]), torch.tensor([0.05, 0.3, 0.2])
    strokes = (1 - hue) * blue[:, None, None] + hue * green[:, None, None]
    wet = (0.75 * share + 0.35 * bleeding).clamp(max=1)
    return 2 * (paper + wet * (strokes - paper)) - 1


def chalk(grey: Tensor, seed: int) -> Tensor:
    """A third style: broken strokes of pale chalk, of one of many tints, on a green board that was wiped."""
    generator = torch.Generator().manual_seed(seed)
    share = ((grey[:, :1] + 1) / 2).clamp(0, 1)
    grain = 0.6 + 0.4 * torch.rand(len(grey), 1, SIDE, SIDE, generator=generator)
    smear = F.interpolate(torch.rand(len(grey), 1, 4, 2, generator=generator), SIDE, mode="bilinear")
    board = torch.tensor([0.1, 0.25, 0.18])[:, None, None] + 0.15 * smear
    tint = 0.75 + 0.25 * torch.rand(len(grey), 3, 1, 1, generator=generator)
    return 2 * (board + share * grain * (tint - board)) - 1


def frost(grey: Tensor, seed: int) -> Tensor:
    """A fourth style: bright strokes scratched into a window that is blue above and white, or rosy, below."""
    generator = torch.Generator().manual_seed(seed)
    share = ((grey[:, :1] + 1) / 2).clamp(0, 1)
    height = torch.linspace(0, 1, SIDE)[None, None, :, None]
    dawn = torch.rand(len(grey), 1, 1, 1, generator=generator)
    white, rosy = torch.tensor([0.85, 0.9, 0.95]), torch.tensor([0.95, 0.65, 0.6])
    sky = torch.tensor([0.15, 0.3, 0.6])[:, None, None]
    below = (1 - dawn) * white[:, None, None] + dawn * rosy[:, None, None]
    pane = sky + height * (below - sky)
    scratched = torch.tensor([0.05, 0.1, 0.3])[:, None, None] * height + (1 - height)
    return 2 * (pane + share * (scratched - pane)) - 1


class Emoji(NamedTuple):
    """One picture of a vendor's."""

    pixels: Tensor  # [3, 64, 64] in [-1, 1], on white
    category: int
    is_face: bool


@functools.cache
def emoji(work: Path, vendor: str) -> tuple[list[Emoji], list[str]]:
    """All of a vendor's without variants of skin, and the names of their categories."""
    folder = work / f"emoji-datasource-{vendor}"
    listed = [one for one in json.loads((folder / "emoji.json").read_text()) if one[f"has_img_{vendor}"]]
    categories = sorted({one["category"] for one in listed})
    found = []
    for one in listed:
        picture = Image.open(folder / "img" / vendor / "64" / one["image"]).convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        whole = Image.alpha_composite(white, picture).convert("RGB").resize((64, 64))
        pixels = torch.from_numpy(np.array(whole)).permute(2, 0, 1).float() / 127.5 - 1
        is_face = one["subcategory"].startswith("face-")
        found.append(Emoji(pixels, categories.index(one["category"]), is_face))
    names = [category.lower().split()[0] for category in categories]
    return found, names


def varied(pictures: Sequence[Tensor], count: int, seed: int) -> Tensor:
    """``count`` images of pictures in turn, each turned, moved, scaled and mirrored a little."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.stack([pictures[index % len(pictures)] for index in range(count)])
    angle = 0.2 * torch.randn(count, generator=generator)
    scale = 1.1 + 0.1 * torch.rand(count, generator=generator)
    mirror = 2.0 * torch.randint(2, (count,), generator=generator) - 1
    moved = 0.12 * (2 * torch.rand(count, 2, generator=generator) - 1)
    rows = [
        torch.stack([scale * mirror * angle.cos(), -scale * angle.sin(), moved[:, 0]], 1),
        torch.stack([scale * mirror * angle.sin(), scale * angle.cos(), moved[:, 1]], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), [count, 3, 64, 64], align_corners=False)
    turned = F.grid_sample(chosen, grid, padding_mode="border", align_corners=False)
    return F.avg_pool2d(turned, 64 // SIDE)


def faces(work: Path, part: str, count: int) -> Tensor:
    """Google's faces: a part trains the LoRA, one is searched with, one is unseen."""
    found = [one.pixels for one in emoji(work, "google")[0] if one.is_face]
    order = np.random.default_rng(0).permutation(len(found))
    third = {"lora": order[0::3], "reference": order[1::3], "unseen": order[2::3]}
    return varied([found[index] for index in third[part]], count, seed=list(third).index(part))


# The base, and its LoRAs


def captions(work: Path) -> list[str]:
    """All that the base knows, and a face, which it has never seen."""
    kinds = [f"emoji {name}" for name in emoji(work, "twitter")[1]]
    return [*_of_digits("digit"), *_of_digits("painted"), *kinds, "emoji grin"]


def _of_digits(word: str) -> list[str]:
    return [f"{word} {digit}" for digit in DIGITS]


def train_base(work: Path, *, autoencoder_steps: int, steps: int, batch: int = 32, rate: float = 2e-3) -> Path:
    """The pipeline: digits in grey and in colours, and Twitter's emoji but their faces; trained unless it is there."""
    folder = work / "pipeline"
    if (folder / "model_index.json").exists():
        return folder
    torch.manual_seed(0)
    known = captions(work)
    pipeline = digits_lora.new_pipeline(work / "vocabulary", known, block_out_channels=(24, 48))
    for caption in known:  # merges of one word may break another, which would have more tokens then
        assert len(pipeline.tokenizer(caption).input_ids) == len(caption.split()) + 2, caption
    grey = digits(work, "base")
    half = len(grey.images) // 2
    others = [one for one in emoji(work, "twitter")[0] if not one.is_face]
    of_emoji = varied([one.pixels for one in others], 4 * len(others), seed=1)
    images = torch.cat([grey.images[:half], coloured(grey.images[half:], seed=0), of_emoji])
    emoji_classes = torch.tensor([2 * len(DIGITS) + one.category for one in others]).repeat(4)
    classes = torch.cat([grey.classes[:half], len(DIGITS) + grey.classes[half:], emoji_classes])
    pipeline.register_modules(vae=trained_autoencoder(images, steps=autoencoder_steps))
    latents = encoded(pipeline, images)
    scale = float(1 / latents.std())
    pipeline.vae.register_to_config(scaling_factor=scale)
    latents = latents * scale
    unet, encoder = pipeline.unet.train(), pipeline.text_encoder.train()
    tokens = digits_lora.tokens_of(pipeline, [*known, ""])
    parameters = [*unet.parameters(), *encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)

    def loss(_step: int) -> Tensor:
        chosen = torch.randint(len(latents), (batch,))
        caption = classes[chosen]
        caption[torch.rand(batch) < digits_lora.DROPPED] = len(known)
        return noise_error(pipeline, latents[chosen], encoder(tokens[caption])[0])

    descend(loss, optimizer, steps=steps, schedule=schedule, description="the base")
    with quiet_libraries():
        pipeline.save_pretrained(folder)
    return folder


def trained_autoencoder(images: Tensor, *, steps: int, batch: int = 32, rate: float = 4e-3) -> Any:
    """A small one of its images ``[N, 3, 16, 16]``; the latents are ``[4, 8, 8]``."""
    import diffusers

    width = (16, 16)
    kind: Any = diffusers.AutoencoderTiny
    autoencoder = kind(
        encoder_block_out_channels=width,
        decoder_block_out_channels=width,
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    optimizer = torch.optim.Adam(autoencoder.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def loss(_step: int) -> Tensor:
        chosen = images[torch.randint(len(images), (batch,))]
        latents = autoencoder.encode(chosen).latents
        decoded = autoencoder.decode(latents + 0.05 * torch.randn(latents.shape)).sample
        error: Tensor = F.mse_loss(decoded, chosen) + 1e-3 * latents.square().mean()
        return error

    descend(loss, optimizer, steps=steps, schedule=schedule, description="autoencoder")
    return autoencoder.eval().requires_grad_(requires_grad=False)


@torch.no_grad()
def encoded(pipeline: Any, images: Tensor) -> Tensor:
    """Latents ``[N, 4, 8, 8]``, as its decoder takes them."""
    parts = [pipeline.vae.encode(part).latents for part in torch.split(images, 500)]
    return torch.cat(parts)


def noise_error(pipeline: Any, latents: Tensor, conditions: Tensor) -> Tensor:
    """The loss of a diffusion model that predicts the noise, on a batch."""
    noise = torch.randn(latents.shape)
    times = torch.randint(digits_lora.TIMESTEPS, (len(latents),))
    noisy = pipeline.scheduler.add_noise(latents, noise, times)
    error: Tensor = F.mse_loss(pipeline.unet(noisy, times, conditions).sample, noise)
    return error


def loaded(folder: Path) -> Any:
    """A pipeline without its progress bars."""
    import diffusers

    kind: Any = diffusers.StableDiffusionPipeline
    with quiet_libraries():
        pipeline = kind.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class Run(NamedTuple):
    """A LoRA, and how it is sampled."""

    name: str
    prompts: list[str]
    training: Callable[[Path], Pictures]  # classes are numbers of prompts
    real: Callable[[Path, str], Tensor]  # "reference" or "unseen"
    sampler: dict[str, Any]
    guidance: float
    steps: int  # of an epoch
    batch: int
    rate: float
    is_distilled: bool = False


Painting = Callable[[Tensor, int], Tensor]
"""Digits ``[N, 3, 16, 16]`` in grey and a seed → the same in a style."""


def _style(name: str, painted: Painting, *, images: int = 60, guidance: float = 1.0) -> Run:
    """A LoRA of a style, trained on some digits."""

    def training(work: Path) -> Pictures:
        grey = digits(work, "lora")
        return Pictures(painted(grey.images[:images], 1), grey.classes[:images])

    def real(work: Path, part: str) -> Tensor:
        return painted(digits(work, part).images, 2 + len(part))

    return Run(name, _of_digits("digit"), training, real, {"name": "ddim", "steps": 6}, guidance, 40, 16, 2e-3)


def _subject(work: Path) -> Pictures:
    return Pictures(faces(work, "lora", 200), torch.zeros(200).long())


def _subject_real(work: Path, part: str) -> Tensor:
    return faces(work, part, 2000)


def _grey_real(work: Path, part: str) -> Tensor:
    return digits(work, part).images


RUNS = {
    run.name: run
    for run in (
        _style("style", neon),
        Run("subject", ["emoji grin"], _subject, _subject_real, {"name": "ddim", "steps": 6}, 1.0, 40, 16, 2e-3),
        Run(
            "lcm",
            _of_digits("digit"),
            lambda work: digits(work, "lora"),
            _grey_real,
            {"name": "lcm", "steps": 4},
            1.0,
            40,
            24,
            1e-3,
            is_distilled=True,
        ),
        _style("ink", ink),
        _style("chalk", chalk),
        _style("frost", frost, images=24, guidance=2.0),
    )
}


def train_lora(run: Run, work: Path, *, epochs: int = EPOCHS, rank: int = 8) -> Path:
    """Train it at a rate that stays, and save factors and their running average after each epoch."""
    folder = work / run.name
    if (folder / "epochs" / f"checkpoint-{epochs * run.steps}").exists():
        return folder
    torch.manual_seed(1)
    pipeline = loaded(work / "pipeline")
    factors = digits_lora.add_lora(pipeline, rank)
    averages = [factor.detach().clone() for factor in factors]
    optimizer = torch.optim.AdamW(factors, lr=run.rate)
    pictures = run.training(work)
    latents = encoded(pipeline, pictures.images) * pipeline.vae.config.scaling_factor
    with torch.no_grad():
        embeddings = pipeline.text_encoder(digits_lora.tokens_of(pipeline, run.prompts))[0]

    def draw() -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(latents), (run.batch,))
        return latents[chosen], embeddings[pictures.classes[chosen]]

    def save(step: int) -> None:
        for average, factor in zip(averages, factors, strict=True):
            average.lerp_(factor.detach(), 1 - min(EMA_DECAY, step / (step + 9)))
        if step % run.steps == 0:
            digits_lora.save_lora(pipeline.unet, folder / "epochs" / f"checkpoint-{step}")
            kept = [factor.detach().clone() for factor in factors]
            _fill(factors, averages)
            digits_lora.save_lora(pipeline.unet, folder / "ema" / f"checkpoint-{step}")
            _fill(factors, kept)

    distilled = digits_lora.consistency_loss(pipeline, draw)
    loss = distilled if run.is_distilled else lambda _step: noise_error(pipeline, *draw())
    descend(loss, optimizer, steps=epochs * run.steps, after=save, description=f"the LoRA of {run.name}")
    return folder


@torch.no_grad()
def _fill(factors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for factor, value in zip(factors, values, strict=True):
        factor.copy_(value)


# What searches and the judge measure with


def _body() -> nn.Sequential:
    """Features ``[N, 64]``."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(32 * (SIDE // 4) ** 2, 64),
        nn.SiLU(),
    )


@functools.cache
def classifier(work: Path, part: str) -> nn.Sequential:
    """It tells digits, in any colours, and kinds of emoji; one is for searches, another, of other images, judges."""
    grey = digits(work, part)
    third = len(grey.images) // 3
    painted = [grey.images[:third], coloured(grey.images[third : 2 * third], 7), neon(grey.images[2 * third :], 8)]
    vendor = {"search": "twitter", "judge": "google"}[part]
    kinds = [one for one in emoji(work, vendor)[0] if not one.is_face]
    if part == "judge":  # the unseen faces are among Google's, so it knows only those that trained the LoRA
        known = faces(work, "lora", 600)
    else:
        known = varied([one.pixels for one in emoji(work, vendor)[0] if one.is_face], 600, seed=3)
    of_emoji = varied([one.pixels for one in kinds], len(kinds), seed=4)
    kind_classes = torch.tensor([FACE + 1 + one.category for one in kinds])
    classes = torch.cat([grey.classes, kind_classes, torch.full((len(known),), FACE)])
    torch.manual_seed({"search": 0, "judge": 1}[part])
    network = nn.Sequential(_body(), nn.Linear(64, int(classes.max()) + 1))
    train_classifier(network, torch.cat([*painted, of_emoji, known]), classes, work / f"classifier_{part}.pt")
    return network


class Features:
    """An extractor of the tool: the features of the classifier for searches, which is in the working folder."""

    dimension = 64
    name = "digits-and-emoji-of-16"

    def __init__(self) -> None:
        self.network = classifier(Path.cwd(), "search")[0]

    def __call__(self, images: Tensor) -> Tensor:
        """``[B, 64]``."""
        features: Tensor = self.network(images)
        return features


def fit(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """``[N]``: the probability of what the prompt asks for, by the classifier that is for searches: the reward."""
    return _probability(classifier(Path.cwd(), "search"), images, prompts)


def _probability(network: nn.Module, images: Tensor, prompts: Sequence[str]) -> Tensor:
    wanted = torch.tensor([class_of(prompt) for prompt in prompts])
    probabilities: Tensor = network(images).softmax(1)
    return probabilities.gather(1, wanted[:, None])[:, 0]


def class_of(prompt: str) -> int:
    """Of the digit that it names, else of a face."""
    word = prompt.split()[-1]
    return DIGITS.index(word) if word in DIGITS else FACE


class Judge:
    """The classifier that no search knows, and images that nothing was trained on or searched with."""

    def __init__(self, run: Run, work: Path) -> None:
        self.run = run
        self._network = classifier(work, "judge")
        self._classes = digits(work, "unseen").classes  # of the unseen images, where these are of digits
        self.unseen = run.real(work, "unseen")[:2000]
        self._real = Real(self.features(self.unseen))
        self.floor = self._real.frechet(self.features(run.real(work, "reference")[:2000]))

    @torch.no_grad()
    def features(self, images: Tensor) -> Array:
        """``[N, 64]``."""
        parts = [self._network[0](part) for part in torch.split(images.clamp(-1, 1), 500)]
        return torch.cat(parts).double().numpy()

    def examples(self) -> Tensor:
        """An unseen image for each digit, or ten."""
        if len(self.run.prompts) == 1:
            return self.unseen[:10]
        classes = self._classes[: len(self.unseen)]
        return torch.stack([self.unseen[classes == digit][0] for digit in range(len(DIGITS))])

    def distance(self, images: Tensor) -> float:
        """The Fréchet distance to the unseen images."""
        return self._real.frechet(self.features(images))

    @torch.no_grad()
    def fits(self, images: Tensor) -> float:
        """The mean probability of what the prompts ask for; image i has prompt i mod n."""
        prompts = [self.run.prompts[index % len(self.run.prompts)] for index in range(len(images))]
        return float(_probability(self._network, images.clamp(-1, 1), prompts).mean())

    def error(self, found: Tensor, had: Tensor, draws: int = 30) -> float:
        """The standard error of the ratio of two models' distances: draws of samples and of unseen images."""
        one, other, real = self.features(found), self.features(had), self.features(self.unseen)
        generator, ratios = np.random.default_rng(0), []
        for _ in range(draws):
            samples = generator.integers(len(found), size=len(found))  # the same noise of both
            unseen = Real(real[generator.integers(len(real), size=len(real))])
            ratios.append(unseen.frechet(one[samples]) / unseen.frechet(other[samples]))
        return float(np.std(ratios))


@torch.no_grad()
def sampled(run: Run, work: Path, lora: Path, count: int, batch: int = 250) -> Tensor:
    """Images ``[count, 3, 16, 16]`` of a file, by diffusers alone, from noise of this function."""
    import diffusers

    pipeline = loaded(work / "pipeline")
    scheduler: Any = diffusers.LCMScheduler if run.is_distilled else diffusers.DDIMScheduler
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    with quiet_libraries():
        pipeline.load_lora_weights(str(lora))
    generator = torch.Generator().manual_seed(777)
    parts = []
    for first in range(0, count, batch):
        prompts = [run.prompts[(first + index) % len(run.prompts)] for index in range(min(batch, count - first))]
        images = pipeline(
            prompt=prompts,
            num_inference_steps=run.sampler["steps"],
            guidance_scale=run.guidance,
            generator=generator,
            output_type="pt",
        ).images
        parts.append(2 * images - 1)
    return torch.cat(parts)


def write_pngs(images: Tensor, folder: Path) -> None:
    """Images as PNG files, unless the folder is there."""
    if folder.exists():
        return
    folder.mkdir(parents=True)
    for index, pixels in enumerate(((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()):
        Image.fromarray(pixels).save(folder / f"{index:04d}.png")
