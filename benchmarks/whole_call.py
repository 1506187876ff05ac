"""From a command to its result: what a user waits for, beside the search.

    python benchmarks/whole_call.py [--work FOLDER] [--calls demo unet score]

Three calls: ``studies/demo.yaml`` (500 images an evaluation, 40 evaluations, a report of 1,000); a study file that
``lcsc init diffusers`` writes for 16 checkpoints of a U-Net of 8×8 images, with 50 steps as it stands, 500 images for
an evaluation, 40 evaluations and a report of 1,000; and a score of a small network. Each is tried by
``lcsc run --dry-run`` and then run, without anything packed. *First* is the time until the first line, *silence* the
longest time without one in the dry run, *share* that of the searches in the whole call. Writes results/whole_call.md.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
import torch
from common import RESULTS, ROOT, machine, markdown, parse
from PIL import Image
from torch import nn

from lcsc_opt.base.imports import import_extra
from lcsc_opt.metrics.bundled_images import bundled_images

STEPS = range(100, 1700, 100)
MODULE = """
import torch

generator = torch.Generator().manual_seed(0)
inputs = torch.randn(4000, 32, generator=generator)
targets = (inputs[:, :8].sum(1) > 0).long()


def build():
    return torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))


def loss(model, draw):
    rows = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(draw.seed))[: draw.size]
    return torch.nn.functional.cross_entropy(model(inputs[rows]), targets[rows], reduction="none")
"""
ESTIMATE = re.compile(r"the whole run takes up to about ([0-9:.]+)( s)?")


class Timed(NamedTuple):
    """A command that has ended.

    Attributes:
        seconds: of all of it.
        first: until the first line.
        silence: the longest time without a line after that.
        text: what it said.
    """

    seconds: float
    first: float
    silence: float
    text: str


def timed(folder: Path, *command: str) -> Timed:
    """Run ``lcsc`` in a folder."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "lcsc_opt", *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    moments = [start]
    text = b""
    while piece := os.read(process.stderr.fileno(), 65536):
        moments.append(time.perf_counter())
        text += piece
    if process.wait() != 0:
        raise SystemExit(text.decode())
    gaps = np.diff([*moments, time.perf_counter()])
    return Timed(time.perf_counter() - start, gaps[0], max(gaps[1:]), text.decode())


@torch.no_grad()
def wander(network: nn.Module) -> None:
    """A step of a training run that leads nowhere."""
    for parameter in network.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.02)


def demo(_folder: Path) -> str:
    """The demo's study file."""
    return str(ROOT / "studies" / "demo.yaml")


def unet(folder: Path) -> str:
    """What ``lcsc init diffusers`` writes for a folder of a run."""
    diffusers: Any = import_extra("diffusers")

    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        add_attention=False,
    )
    for step in STEPS:
        wander(network)
        network.save_pretrained(folder / "run" / f"checkpoint-{step}" / "unet")
    diffusers.DDPMScheduler().save_pretrained(folder / "run" / "scheduler")
    (folder / "photographs").mkdir()
    for number, image in enumerate(bundled_images("digits")[0][:1500]):
        levels = ((image[0].numpy() + 1) * 127.5).round().astype(np.uint8)
        Image.fromarray(levels).save(folder / "photographs" / f"{number}.png")
    timed(folder, "init", "diffusers", "run", "reference=photographs", "loss=fdr@digits", "-o", "unet.yaml")
    return "unet.yaml"


def score(folder: Path) -> str:
    """A study file of a score."""
    (folder / "own.py").write_text(MODULE)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 2))
    for step in STEPS:
        wander(network)
        torch.save(network.state_dict(), folder / f"model{step}.pt")
    settings = {"checkpoints": "model*.pt", "model": "own:build", "score": "own:loss", "size": 2000}
    study = {
        "name": "score",
        "objective": {"file": "score.py", "settings": settings},
        "budget": {"evaluations": 100},
        "held_out": {"images": 2000},
    }
    (folder / "score.yaml").write_text(json.dumps(study))
    return "score.yaml"


CALLS: dict[str, tuple[Callable[[Path], str], tuple[str, ...]]] = {
    "demo": (demo, ()),
    "unet": (unet, ("budget.evaluations=40", "objective.settings.images=500", "held_out.images=1000")),
    "score": (score, ()),
}


def measured(name: str, work: Path) -> list[str]:
    """One row of the table."""
    prepare, changes = CALLS[name]
    folder = work / name
    folder.mkdir()
    file = prepare(folder)
    storage = "sqlite:///studies.db"
    dry = timed(folder, "run", file, "--dry-run", "--storage", storage, *changes)
    for packed in folder.glob("*.files"):
        packed.rename(work / f"{name}_{packed.name}")  # so that the run packs again
    run = timed(folder, "run", file, "--storage", storage, *changes)
    searched = 0.0
    for study in optuna.get_all_study_summaries(f"sqlite:///{folder / 'studies.db'}"):
        trials = optuna.load_study(study_name=study.study_name, storage=f"sqlite:///{folder / 'studies.db'}").trials
        times = [
            time for trial in trials for time in (trial.datetime_start, trial.datetime_complete) if time is not None
        ]
        if times:
            searched += (max(times) - min(times)).total_seconds()
    ratios = [estimated(said.text) / run.seconds for said in (dry, run)]
    return [
        name,
        f"{run.first:.1f}",
        f"{dry.seconds:.0f}",
        f"{dry.silence:.1f}",
        f"{run.seconds:.0f}",
        f"{searched / run.seconds:.0%}",
        *(f"{ratio:.2f}" for ratio in ratios),
    ]


def estimated(text: str) -> float:
    """The seconds that a command says."""
    digits, _ = ESTIMATE.findall(text)[0]
    seconds = 0.0
    for part in digits.rstrip(":").split(":"):
        seconds = 60 * seconds + float(part)
    return seconds


def main() -> None:
    """Measure, print, write."""
    arguments = parse(__doc__, work="", calls={"nargs": "*", "default": [*CALLS]})
    with tempfile.TemporaryDirectory(dir=arguments.work or None) as work:
        rows = [measured(name, Path(work)) for name in arguments.calls]
    header = ["call", "first line, s", "dry run, s", "silence in it, s", "whole call, s", "share of the searches"]
    header += ["estimate of the dry run ÷ whole", "of the run ÷ whole"]
    page = ["# A whole call", "", f"{machine()}.", "", *markdown([header, *rows])]
    print(*page, sep="\n")
    (RESULTS / "whole_call.md").write_text("\n".join(page) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
