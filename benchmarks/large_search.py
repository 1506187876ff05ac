"""A search of a large model without an accelerator: its memory, and where the seconds of a trial go.

    OMP_NUM_THREADS=1 python benchmarks/large_search.py [--evaluations 7] [--checkpoints 8] [--images 16] [--calls 5]
        [--folder FOLDER] [--quick]

The model is the U-Net of Ho et al. 2020 for CIFAR-10 (35.7 M weights, diffusers' format), features are InceptionV3's in
torch-fidelity's file; the weights of both are random, so losses mean nothing. ``lcsc run`` searches with LCSC and then
with LCSCGradient, each in a process of its own, in a folder of ``--folder``, which is removed at the end. Measured are
the medians of the database's seconds, which are wall-clock: next to other work on the machine they are longer, all
parts alike.
"""

from __future__ import annotations

import functools
import os
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import yaml
from cifar import IMAGE_SHAPE, inception_weights
from common import RESULTS, machine, markdown, parse, watched_apart
from torch import nn

from lcsc_opt.base.imports import allow_mismatched_torchvision
from lcsc_opt.cli import run as lcsc
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import StoredStudy

OPTIMIZERS = ("LCSC", "LCSCGradient")
PARTS = ("merge", "sample", "features", "metric")
STEP = 1000  # training steps between two checkpoints
SPREAD = 0.02  # of a step between two checkpoints, as a share of a tensor's standard deviation
IMAGES_WITH_GRAPH = 8
REFERENCE_IMAGES = 128


def main() -> None:
    """Search, and print and write what was seen."""
    place = {"help": "where the folder is made; without it a temporary one", "default": None}
    small = {"checkpoints": 3, "images": 4, "calls": 2, "evaluations": 4}
    arguments = parse(__doc__, evaluations=7, checkpoints=8, images=16, calls=5, folder=place, small=small)
    model = network(quick=arguments.quick)
    weights = sum(parameter.numel() for parameter in model.parameters())
    memory: list[tuple[str, ...]] = [("search with", "own memory", "pages of files", "both")]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        write_files(model, folder, arguments.checkpoints)
        write_study(folder, arguments)
        for optimizer in OPTIMIZERS:
            peak = watched_apart(functools.partial(search, folder, optimizer))
            megabytes = (f"{peak[kind]:,.0f} MB" for kind in ("anonymous", "mapped", "total"))
            memory.append((optimizer, *megabytes))
        parts = parts_table(costs(folder))
    lines = [
        "# A search of a large model without an accelerator",
        "",
        machine(),
        "",
        f"{weights / 1e6:.1f} M weights, {arguments.checkpoints} checkpoints, {arguments.images} images a trial, "
        f"{arguments.calls} calls an image.",
        f"Load of the machine at the end: {os.getloadavg()[1]:.1f} (mean of 5 minutes).",
        "",
        *markdown(memory),
        "",
        *parts,
        "",
    ]
    text = "\n".join(lines)
    print(text)
    if not arguments.quick:
        (RESULTS / "large_search.md").write_text(text)


def network(*, quick: bool) -> nn.Module:
    """The U-Net of Ho et al. 2020 for CIFAR-10, as in diffusers' ``google/ddpm-cifar10-32``, with random weights."""
    allow_mismatched_torchvision()
    from diffusers import UNet2DModel

    widths = [32, 32, 32, 32] if quick else [128, 256, 256, 256]
    model: nn.Module = cast("Any", UNet2DModel)(
        sample_size=IMAGE_SHAPE[-1],
        block_out_channels=widths,
        layers_per_block=2,
        down_block_types=["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        attention_head_dim=None,
        norm_eps=1e-6,
    )
    return model.eval().requires_grad_(False)


def write_files(model: nn.Module, folder: Path, checkpoints: int) -> None:
    """A training folder of diffusers, the file of InceptionV3, and images to compare with."""
    from diffusers import DDPMPipeline, DDPMScheduler

    training = folder / "training"
    cast("Any", DDPMPipeline)(model, cast("Any", DDPMScheduler)()).save_pretrained(training)
    generator = torch.Generator().manual_seed(0)
    for number in range(1, checkpoints + 1):
        for tensor in model.parameters():
            if tensor.ndim > 1:
                tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=SPREAD * float(tensor.std()))
        cast("Any", model).save_pretrained(training / f"checkpoint-{STEP * number}" / "unet")
    torch.save(inception_weights(), folder / "inception.pth")
    coarse = torch.rand(REFERENCE_IMAGES, 3, 8, 8, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, IMAGE_SHAPE[1:], mode="bilinear")
    pixels = (255 * smooth).permute(0, 2, 3, 1).byte()
    np.savez(folder / "images.npz", arr_0=pixels.numpy())


def write_study(folder: Path, arguments: Any) -> None:
    """The study file, as a user would write it."""
    settings = {
        "checkpoints": "training",
        "model": "training",
        "sampler": {"name": "ddim", "steps": arguments.calls},
        "reference": "images.npz",
        "weights": {"inception": "inception.pth"},
        "images": arguments.images,
        "batch_size": IMAGES_WITH_GRAPH,
        "device": "cpu",
    }
    study = {
        "name": "large",
        "objective": {"file": "diffusers_unconditional.py", "settings": settings},
        "budget": {"evaluations": arguments.evaluations},
        "storage": "sqlite:///studies.db",
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(study))


def search(folder: Path, optimizer: str) -> None:
    """What ``lcsc run`` does, in this process."""
    os.chdir(folder)
    assert lcsc(["run", "study.yaml", f"optimizers=[{optimizer}]"]) == 0


def costs(folder: Path) -> dict[str, list[Mapping[str, float]]]:
    """Those of all trials, with and without a gradient."""
    storage = open_storage(f"sqlite:///{folder / 'studies.db'}", write=False)
    of_kinds: dict[str, list[Mapping[str, float]]] = {"plain": [], "with gradient": []}
    for optimizer in OPTIMIZERS:
        for trial in StoredStudy.open(storage, f"large/{optimizer}/0").trials():
            kind = "with gradient" if "gradient" in trial.user_attrs else "plain"
            of_kinds[kind].append(trial.user_attrs["cost"])
    return of_kinds


def parts_table(of_kinds: Mapping[str, list[Mapping[str, float]]]) -> list[str]:
    """Seconds and shares of the parts of a trial."""
    rows = [("trial", "part", "seconds", "share")]
    for kind, of_trials in of_kinds.items():
        medians = {part: statistics.median(cost[f"{part}_seconds"] for cost in of_trials) for part in PARTS}
        for part, seconds in medians.items():
            share = seconds / sum(medians.values())
            rows.append((f"{kind}, {len(of_trials)} trials", part, f"{seconds:.2f}", f"{share:.1%}"))
        total = statistics.median(cost["seconds"] for cost in of_trials)
        rows.append((kind, "all, with the rest", f"{total:.2f}", ""))
    return markdown(rows)


if __name__ == "__main__":
    main()
