"""The LoRA study: what a search finds among the checkpoints of an LCM-LoRA, in FID and in a reward that it never sees.

    python benchmarks/lora_study.py --folder runs/lora --seeds 0 1

``--folder`` holds what ``studies/lora/digits_lora.py`` trains (a LoRA for each seed); what is missing is trained
first. Searches are those of ``studies/lora/lora.yaml``; without a gradient, of one row of coefficients. FID is to
half B of the digits, which neither the pipeline nor a search saw, on other noise and other prompts than the search's.
The reward is the log-probability of the prompt's digit by a classifier of half B; the searched one is by one of half
A. The same command continues where it stopped.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from common import machine, write_json

import lcsc_opt
from lcsc_opt.base.records import HELD_OUT, Candidate, Coefficients
from lcsc_opt.base.settings import parse_yaml

STUDY = Path(__file__).parents[1] / "studies" / "lora"
COLUMNS = {"FID": "fid_held_out@digits_lora:Features", "reward": "held_out_reward", "searched reward": "reward"}
Model = tuple[Any, Coefficients]
"""An objective, and coefficients of its checkpoints."""
NEEDS_ROWS = ("LCSCGradient",)
"""Optimizers that search a row of coefficients for each module; without a gradient, one row is better."""


def main() -> None:
    """Train what is missing, search, measure, and write ``results/lora_study.json`` or ``lora_study_fid.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/lora"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the LoRA's trainings")
    parser.add_argument("--images", type=int, default=1000, help="of a report")
    parser.add_argument("--search-images", type=int, default=300, help="of an evaluation")
    parser.add_argument("--budget", type=int, default=9_000, help="images of a search")
    parser.add_argument("--steps", type=int, default=4, help="of the sampler")
    parser.add_argument("--reward-weight", type=float, default=10.0, help="in the loss; 0 is FID alone")
    parser.add_argument("--optimizers", nargs="+", default=["EMAGrid", "LCSCGradient", "LCSC"])
    parser.add_argument("--train", nargs="*", default=[], metavar="NAME=NUMBER", help="as lora_steps=480 every=15")
    arguments = parser.parse_args()
    sys.path.insert(0, str(STUDY))
    digits_lora: Any = importlib.import_module("digits_lora")
    folder = arguments.folder.absolute()
    changes = {name: int(number) for name, _, number in (text.partition("=") for text in arguments.train)}
    digits_lora.train(folder, seeds=arguments.seeds, **changes)
    rows: dict[str, dict[int, dict[str, float]]] = {}
    for seed in arguments.seeds:
        for name, values in measured(folder, seed, arguments).items():
            rows.setdefault(name, {})[seed] = values
    print(table(rows))
    settings = {name: value for name, value in vars(arguments).items() if name != "folder"}
    result = "lora_study"
    if arguments.reward_weight == 0:
        result = "lora_study_fid"
    print(write_json(result, {"settings": settings, "rows": rows}))


def measured(folder: Path, seed: int, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Model → its figures on held-out noise and prompts, of one LoRA."""
    studies: dict[str, Any] = {}
    for optimizer in arguments.optimizers:
        (studies[optimizer],) = lcsc_opt.run(study_file(folder, seed, optimizer, arguments))
    first = next(iter(studies.values()))
    last = np.eye(len(first.steps))[-1]
    models: dict[str, Model] = {"the last LoRA": (first.objective, last)}
    for optimizer, study in studies.items():
        name = "EMA*" if optimizer == "EMAGrid" else optimizer
        models[name] = (study.objective, study.coefficients)
    return {name: figures(*model, arguments.images) for name, model in models.items()}


def study_file(folder: Path, seed: int, optimizer: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The study file, for this LoRA, this optimizer and these numbers."""
    text = (STUDY / "lora.yaml").read_text(encoding="utf-8").replace("runs/lora", str(folder))
    content: dict[str, Any] = parse_yaml(text)
    content["name"] = f"lora-{seed}-{arguments.steps}"
    content["optimizers"] = [optimizer]
    if optimizer not in NEEDS_ROWS:
        content["name"] += "-one_row"
        content["space"] = "affine"
    content["budget"] = {"images": arguments.budget}
    content["storage"] = f"sqlite:///{folder / 'studies.db'}"
    content["held_out"] = {"images": arguments.images, "top": 3}
    settings = content["objective"]["settings"]
    settings["checkpoints"] = str(folder / f"lora-{seed}")
    settings["sampler"] = {"name": "lcm", "steps": arguments.steps}
    settings["images"] = arguments.search_images
    settings["loss"]["reward"] = -arguments.reward_weight
    if arguments.reward_weight == 0:
        del settings["loss"]["reward"]
        content["name"] += "-fid"
    return content


def figures(objective: Any, coefficients: Coefficients, images: int) -> dict[str, float]:
    """The values of :data:`COLUMNS`."""
    metrics = objective.evaluate(Candidate(coefficients, images=images, noise=HELD_OUT)).metrics
    return {name: metrics[metric] for name, metric in COLUMNS.items()}


def table(rows: Mapping[str, Mapping[int, Mapping[str, float]]]) -> str:
    """Markdown: means and standard deviations over the trainings, and FID relative to the last LoRA's."""
    lines = [f"{machine()}", "", "| | FID | ÷ the last LoRA's | reward | searched reward |", "|---|---|---|---|---|"]
    last = rows["the last LoRA"]
    for name, of_seed in rows.items():
        ratios = [values["FID"] / last[seed]["FID"] for seed, values in of_seed.items()]
        columns = [spread([values[column] for values in of_seed.values()]) for column in COLUMNS]
        lines.append(f"| {name} | {columns[0]} | {spread(ratios)} | {columns[1]} | {columns[2]} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Mean ± standard deviation."""
    text = f"{statistics.fmean(values):.3g}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.2g}"
    return text


if __name__ == "__main__":
    main()
