"""Coefficients, in one row or a row for each layer, against all weights with equal images, on metrics that none sees.

    python benchmarks/refine.py [--seeds 3] [--images 20000] [--selected 10000] [--only WORD]

Halves of the digits and metrics are those of ``fidelity.py``; the model comes from a shorter training. Coefficients are
searched by ``LCSCGradient``, with its checks inside the budget; ``kinds``, ``blocks`` and ``layers`` have a row of
coefficients each. All weights are fine-tuned as by ``lcsc refine`` from
EMA*, and the answer is their average. When one comes after the other, each has half of the images. Both pass an image
through the network equally often, so equal images are equal model calls. Each way runs with and without ``keep:
precision``. A model that was found with one step of sampling is measured in two steps, too. Results that are already in
``results/refine.csv`` are not measured again.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import machine, read_csv, write_csv
from fidelity import HEADER, REPORTED, MetricsOfHalves, answer_of, best_ema, cell, objective_of
from safetensors.torch import load_file

from lcsc_opt.base.records import HELD_OUT, Coefficients
from lcsc_opt.objective.gradient import ONE, OneModel
from lcsc_opt.objective.merge_sample_score import MergeSampleScore
from lcsc_opt.search.refining import RefineSettings, refine
from lcsc_opt.trajectory import Trajectory

TRAINING: dict[str, Any] = {"training_steps": 2000, "checkpoint_every": 20}
SHOWN_METRICS = HEADER[3:]
COLUMNS = ("way", "seed", "images", "selected", *SHOWN_METRICS, *(f"{metric}, 2 steps" for metric in SHOWN_METRICS))
SHOWN = (
    *("fid A", "fid B", "fid A2", "fid B2", "precision A", "precision A2", "recall A", "near A"),
    *("fid A, 2 steps", "fid B, 2 steps", "fid B2, 2 steps", "precision A, 2 steps"),
)
EMA = "EMA*"
ENDS = {"": None, ", keep": "precision"}
ROWS = ("kinds", "blocks", "layers")

Known = dict[tuple[str, int, int, int], tuple[float, ...]]


@dataclasses.dataclass(frozen=True)
class Found:
    """A model: checkpoints merged with these coefficients; by default those of the training."""

    coefficients: Coefficients
    source: OneModel | Trajectory | None = None
    rows: str | None = None

    def evaluated(self, evaluator: MetricsOfHalves) -> tuple[float, ...]:
        """All metrics of its samples on held-out noise, in one step and in two."""
        values: tuple[float, ...] = ()
        for nfe in (1, 2):
            objective = objective_of(**TRAINING, nfe=nfe, rows=self.rows)
            sampled = objective if self.source is None else objective.on_weights(self.source)
            values += evaluator.of_images(sampled.images(np.asarray(self.coefficients), HELD_OUT, REPORTED))
        return values


class Ways:
    """Each way from half A's checkpoints to a model.

    Args:
        folder: for the files of refinements.
        images: how many each way may sample.
        selected: how many other images the answer of a search is chosen on.
        seed: of the noise.
    """

    def __init__(self, folder: Path, images: int, selected: int, seed: int) -> None:
        self._folder, self._images, self._selected, self._seed = folder, images, selected, seed
        self._objective = objective_of(**TRAINING)

    def by_name(self) -> dict[str, Callable[[], Found]]:
        """Name → way, for all ways. EMA* does not depend on chance."""
        ways = {f"{name}{end}": way for end, keep in ENDS.items() for name, way in self._of(keep).items()}
        return ways if self._seed else {EMA: lambda: Found(best_ema(self._objective)), **ways}

    def _of(self, keep: str | None) -> dict[str, Callable[[], Found]]:
        objective = self._objective if keep is None else objective_of(**TRAINING, keep=keep)
        layered = objective_of(**TRAINING, keep=keep, rows="layers")
        whole, half = self._images, self._images // 2

        def ema() -> Coefficients:
            return best_ema(self._objective)

        def in_rows(rows: str) -> Found:
            return Found(self._searched(objective_of(**TRAINING, keep=keep, rows=rows), whole), rows=rows)

        return {
            "coefficients": lambda: Found(self._searched(objective, whole)),
            "all weights": lambda: self._refined(objective, ema(), whole),
            "coefficients, then all weights": lambda: self._refined(objective, self._searched(objective, half), half),
            "all weights, then coefficients": lambda: self._refined(objective, ema(), half, then_search=half),
            **{rows: functools.partial(in_rows, rows) for rows in ROWS},
            "layers, then all weights": lambda: self._refined(layered, self._searched(layered, half), half),
        }

    def _searched(self, objective: MergeSampleScore, images: int) -> Coefficients:
        return answer_of(objective, "LCSCGradient", self._seed, images, selected_on=self._selected)

    def _refined(self, objective: MergeSampleScore, start: Coefficients, images: int, *, then_search: int = 0) -> Found:
        settings = RefineSettings(images=images, seed=self._seed)
        out = Path(tempfile.mkdtemp(dir=self._folder)) / "refined.trajectory"
        answer, *_ = refine(objective, settings, out, start=lambda: start, held_out_images=1000)
        if not then_search:
            return Found(ONE, OneModel(load_file(answer), frozenset()))
        left = Trajectory.open(out)
        return Found(self._searched(objective.on_weights(left), then_search), left)


def main() -> None:
    """Measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--selected", type=int, default=10_000)
    parser.add_argument("--only", default="", help="only ways whose name contains this")
    arguments = parser.parse_args()
    print(machine())
    evaluator, known = MetricsOfHalves(), read()
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as folder:
            ways = Ways(Path(folder), arguments.images, arguments.selected, seed).by_name()
            for name, find in ways.items():
                key = (name, seed, arguments.images, arguments.selected)
                if key not in known and arguments.only in name:
                    known[key] = find().evaluated(evaluator)
                    rows = [(*key, *(round(value, 4) for value in values)) for key, values in known.items()]
                    write_csv("refine", COLUMNS, rows)
                    print(name, seed, *(f"{value:.3g}" for value in known[key][:3]), flush=True)
    print(table(known))


def read() -> Known:
    """The results that exist already."""
    return {(name, *map(int, row[:3])): tuple(map(float, row[3:])) for name, *row in read_csv("refine")}  # type: ignore[misc]


def table(known: Known) -> str:
    """A table of means over seeds, with their standard deviations."""
    places = [COLUMNS.index(name) - 4 for name in SHOWN]
    lines = [f"| way | images | seeds | {' | '.join(SHOWN)} |", "|---|---|---|" + "---|" * len(SHOWN)]
    for name, images in dict.fromkeys((name, images) for name, _, images, _ in known):
        found = [values for key, values in known.items() if (key[0], key[2]) == (name, images)]
        cells = [cell([values[place] for values in found]) for place in places]
        lines.append(f"| {name} | {images:,} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
