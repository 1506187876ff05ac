"""Which weights to search, where a trainer saves raw ones and running averages: two models of 8×8 digits.

    python benchmarks/raw_or_average.py [--quick] [--seeds 3] [--steps 20000] [--budget 100]

* ``flow``: the flow of ``clipping.py``, in eight steps
* ``ddpm``: the same network, trained to predict the noise, in ten steps of DDIM

Both are trained on the first 1,200 digits with Adam at a constant learning rate. Fifty checkpoints of the raw weights
are saved, and beside each the trainer's averages of them, of decay .999 and .9999, both with the usual warm-up: at step
n the decay is at most (1 + n) / (10 + n), so no average still holds the first weights. Each of the three trajectories
is searched by the gradient of ``loss: fdr``, with a row of coefficients for each layer.

What is printed is measured apart from lcsc_opt's metrics, as in ``clipping.py``: on 4,000 samples from noise that no
search saw, with the digits that were neither trained on nor searched with. ``FID`` is in the features that were
searched; the second network is a classifier of those digits, also of images before clipping to [−1, 1] and with twice
the steps. Each seed is a training run of its own. Without ``--quick``, the tables are written to
``results/raw_or_average.md``.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from clipping import Judge, Model, Net, Trained, flow_loss, sample, write_reference
from common import RESULTS, cell, machine, markdown, parse
from torch import Tensor, nn

import lcsc_opt
from lcsc_opt.metrics.bundled_images import bundled_images

CHECKPOINTS = 50
DECAYS = (0.999, 0.9999)
STEPS_OF_DDIM = 10
METRICS = ("FID", "second network", "second network raw", "pixels", "precision", "recall")
TWICE = "second network, twice the steps"
Weights = dict[str, Tensor]
Measured = dict[str, float]


def signal_and_noise(t: Tensor) -> tuple[Tensor, Tensor]:
    """The cosine schedule: how much of the image and of the noise there is at times in [0, 1]."""
    angle = t * 0.99 * torch.pi / 2  # a little of the image is left at time 1
    return angle.cos(), angle.sin()


def ddpm_loss(net: nn.Module, images: Tensor, generator: torch.Generator, progress: float) -> Tensor:  # noqa: ARG001
    """The squared error of the noise at random times, for ``[B, 1, 8, 8]``."""
    x = images.flatten(1)
    z = torch.randn(x.shape, generator=generator)
    t = torch.rand(len(x), generator=generator)
    signal, noise = signal_and_noise(t[:, None])
    return F.mse_loss(net(signal * x + noise * z, t), z)


def sample_ddim(net: nn.Module, noise: Tensor, steps: int = STEPS_OF_DDIM) -> Tensor:
    """``[B, 1, 8, 8]`` images from as much noise, not clipped, by DDIM (Song et al. 2021) without added noise."""
    x = noise.flatten(1)
    times = torch.linspace(1, 0, steps + 1)
    for now, later in itertools.pairwise(times):
        predicted_noise = net(x, now.expand(len(x)))
        signal, amount = signal_and_noise(now)
        image = (x - amount * predicted_noise) / signal
        signal, amount = signal_and_noise(later)
        x = signal * image + amount * predicted_noise
    return x.reshape(noise.shape)


def sample_flow(net: nn.Module, noise: Tensor, steps: int) -> Tensor:
    """As ``sample`` of ``clipping.py``, in another number of steps."""
    x = noise.flatten(1)
    for step in range(steps):
        x = x - net(x, torch.full((len(x),), 1 - step / steps)) / steps
    return x.reshape(noise.shape)


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a model is trained and sampled; ``in_twice`` samples with twice the steps."""

    loss: Callable[[nn.Module, Tensor, torch.Generator, float], Tensor]
    sample: Callable[[nn.Module, Tensor], Tensor]
    in_twice: Callable[[nn.Module, Tensor], Tensor]


KINDS = {
    "flow": Kind(flow_loss, sample, functools.partial(sample_flow, steps=16)),
    "ddpm": Kind(ddpm_loss, sample_ddim, functools.partial(sample_ddim, steps=2 * STEPS_OF_DDIM)),
}


def train(kind: Kind, images: Tensor, seed: int, steps: int) -> dict[str, dict[int, Weights]]:
    """Train on ``[N, 1, 8, 8]``: ``raw`` or the decay of an average → step → weights."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net = Net()
    averages = {decay: copy.deepcopy(net) for decay in DECAYS}
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    saved: dict[str, dict[int, Weights]] = {"raw": {}, **{str(decay): {} for decay in DECAYS}}
    for step in range(1, steps + 1):
        batch = images[torch.randint(len(images), (128,), generator=generator)]
        loss = kind.loss(net, batch, generator, step / steps)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            for decay, average in averages.items():
                torch._foreach_lerp_(
                    list(average.parameters()), list(net.parameters()), 1 - min(decay, (1 + step) / (10 + step))
                )
        if step % (steps // CHECKPOINTS) == 0:
            for name, model in zip(saved, (net, *averages.values()), strict=True):
                saved[name][step] = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    return saved


def search(kind: Kind, checkpoints: dict[int, Weights], reference: Path, budget: int) -> tuple[Weights, Weights]:
    """EMA* and the found combination of these checkpoints."""
    result = lcsc_opt.search(
        checkpoints,
        build=Net,
        sample=kind.sample,
        reference=reference,
        image_shape=(1, 8, 8),
        optimizers=["EMAGrid", "LCSCGradient"],
        rows="layers",
        loss="fdr@digits",
        images=500,
        budget=budget,
        held_out=3000,
        storage=None,
    )
    grid, found = result.studies
    return grid.merge(), found.merge()


def measure_one(
    kind: Kind, images: Tensor, judge: Judge, reference: Path, seed: int, *, steps: int, budget: int
) -> dict[str, Measured]:
    """One training run: model → what was measured of it."""
    trained = train(kind, images, seed, steps)
    models = {}
    for name, checkpoints in trained.items():
        title = "last raw weights" if name == "raw" else f"trainer's EMA, {name}"
        models[title] = list(checkpoints.values())[-1]
    for name, checkpoints in trained.items():
        searched = "raw weights" if name == "raw" else f"averages of {name}"
        models[f"EMA* of {searched}"], models[f"found in {searched}"] = search(kind, checkpoints, reference, budget)
    measured = {}
    for title, weights in models.items():
        of_model = judge.measure(Trained({}, Net, kind.sample), weights)
        in_twice = judge.measure(Trained({}, Net, kind.in_twice), weights)
        measured[title] = {**of_model, TWICE: in_twice["second network"]}
        print(f"seed {seed}, {title}: {measured[title]}", file=sys.stderr, flush=True)
    return measured


def table(runs: list[dict[str, Measured]]) -> list[str]:
    """A line for each model, over training runs."""
    columns = (*METRICS, TWICE)
    rows = [[title, *(cell([run[title][column] for run in runs]) for column in columns)] for title in runs[0]]
    return markdown([["", *columns], *rows])


def raw_against(runs: list[dict[str, Measured]]) -> list[str]:
    """How what was found in raw weights compares with what was found in averages: ratios, over training runs."""
    lines = []
    for decay in DECAYS:
        ratios = []
        for metric in ("FID", "second network", TWICE):
            ratio = statistics.fmean(
                run["found in raw weights"][metric] / run[f"found in averages of {decay}"][metric] for run in runs
            )
            ratios.append(f"{metric} {ratio:.2f}")
        lines.append(f"Found in raw weights ÷ found in averages of {decay}: {', '.join(ratios)}.")
    return lines


def main() -> None:
    """Train, search, and write the tables."""
    small = {"seeds": 1, "steps": 1000, "budget": 10}
    arguments = parse(__doc__, small=small, seeds=3, steps=20_000, budget=100)
    trained_on = slice(1200)
    judged = Model("digits", trained_on, slice(1200, None), 500, lambda *_: Trained({}, Net, sample))
    judge = Judge(judged)
    images = bundled_images("digits")[0][trained_on]
    lines = [
        machine(),
        "",
        f"`benchmarks/raw_or_average.py`, {arguments.seeds} training runs of each model in {arguments.steps:,} steps.",
        "FID is in the features that were searched; all is against digits that no training and no search saw.",
    ]
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder, "digits")
        write_reference(images, reference, count=len(images))
        for name, kind in KINDS.items():
            runs = [
                measure_one(kind, images, judge, reference, seed, steps=arguments.steps, budget=arguments.budget)
                for seed in range(arguments.seeds)
            ]
            lines += ["", f"## {name}", "", *table(runs), "", *raw_against(runs)]
    print(*lines, sep="\n")
    if not arguments.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "raw_or_average.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
