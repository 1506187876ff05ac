"""Coefficients against all weights at equal images, and one after the other, on judges that none of them sees.

    python benchmarks/refine.py [--seeds 1] [--images 20000] [--selected 10000] [--only WORD]

Halves of the digits and judges are those of ``fidelity.py``; the model is one of a shorter training. Coefficients are
searched by ``LCSCGradient``, with its checks inside of the budget; all weights follow ``lcsc refine`` from EMA*, and
answer with their average. Where one comes after the other, each has half of the images. What is there already in
``results/refine.csv`` is not measured again.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import RESULTS, machine, write_csv
from fidelity import HEADER, REPORTED, Judges, answer_of, best_ema, objective_of
from safetensors.torch import load_file
from torch import Tensor

from lcsc_opt.base.records import HELD_OUT, Coefficients
from lcsc_opt.objective.merge_sample_score import MergeSampleScore
from lcsc_opt.objective.one_model import ONE, OneModel
from lcsc_opt.search.refining import RefineSettings, refine
from lcsc_opt.trajectory import Trajectory

TRAINING = {"training_steps": 2000, "checkpoint_every": 20}
COLUMNS = ("way", "seed", "images", "selected", *HEADER[3:])
SHOWN = ("fid A", "fid B", "fid B2", "precision A", "recall A", "precision A2", "near A", "cmmd B")

Known = dict[tuple[str, int, int, int], tuple[float, ...]]


class Ways:
    """Each way from half A's checkpoints to a model; gives its images on held-out noise.

    Args:
        images: that each way may sample.
        selected: on how many others the answer of a search is chosen.
        seed: of the noise.
    """

    def __init__(self, images: int, selected: int, seed: int) -> None:
        self._images, self._selected, self._seed = images, selected, seed
        self._objective = objective_of(**TRAINING)

    def by_name(self) -> dict[str, Callable[[], Tensor]]:
        """All of them."""
        whole, half = self._images, self._images // 2
        return {
            "EMA*": lambda: self._sampled(self._objective, best_ema(self._objective)),
            "coefficients": lambda: self._sampled(self._objective, self._searched(self._objective, whole)),
            "all weights": lambda: self._refined(best_ema(self._objective), whole),
            "coefficients, then all weights": lambda: self._refined(self._searched(self._objective, half), half),
            "all weights, then coefficients": lambda: self._refined(best_ema(self._objective), half, then_search=half),
        }

    def _searched(self, objective: MergeSampleScore, images: int) -> Coefficients:
        return answer_of(objective, "LCSCGradient", self._seed, images, selected_on=self._selected)

    def _refined(self, start: Coefficients, images: int, *, then_search: int = 0) -> Tensor:
        settings = RefineSettings.of(images=images, seed=self._seed)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "refined.trajectory"
            found = refine(self._objective, settings, out, start=lambda: start, held_out_images=1000)
            if not then_search:
                model = OneModel(load_file(found.answer), frozenset())
                return self._sampled(self._objective.on_weights(model), ONE)
            left = self._objective.on_weights(Trajectory.open(out))
            return self._sampled(left, self._searched(left, then_search))

    def _sampled(self, objective: MergeSampleScore, coefficients: Coefficients) -> Tensor:
        return objective.images(np.asarray(coefficients), HELD_OUT, REPORTED)


def main() -> None:
    """Measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--selected", type=int, default=10_000)
    parser.add_argument("--only", help="only this way")
    arguments = parser.parse_args()
    print(machine())
    judges, known = Judges(), read()
    for seed in range(arguments.seeds):
        for name, sample in Ways(arguments.images, arguments.selected, seed).by_name().items():
            key = (name, seed, arguments.images, arguments.selected)
            if key in known or arguments.only not in (None, name):
                continue
            known[key] = judges.of_images(sample())
            write_csv("refine", COLUMNS, [(*key, *(round(value, 4) for value in known[key])) for key in known])
    print(table(known))


def read() -> Known:
    """What is there already."""
    path = RESULTS / "refine.csv"
    if not path.exists():
        return {}
    with path.open() as file:
        rows = list(csv.reader(line for line in file if not line.startswith("#")))[1:]
    return {(name, *map(int, row[:3])): tuple(map(float, row[3:])) for name, *row in rows}  # type: ignore[misc]


def table(known: Known) -> str:
    """Means over seeds."""
    places = [COLUMNS.index(name) - 4 for name in SHOWN]
    lines = [f"| way | images | seeds | {' | '.join(SHOWN)} |", "|---|---|---|" + "---|" * len(SHOWN)]
    for name, images in dict.fromkeys((name, images) for name, _, images, _ in known):
        found = [values for key, values in known.items() if (key[0], key[2]) == (name, images)]
        cells = [f"{statistics.fmean(values[place] for values in found):.3g}" for place in places]
        lines.append(f"| {name} | {images:,} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
