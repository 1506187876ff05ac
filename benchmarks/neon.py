"""One negative checkpoint (Neon, arXiv 2510.03597): searches with and without a row trained on its own samples.

    python benchmarks/neon.py [--seeds 2] [--images 10000] [--selected 2000]

The model is that of ``refine.py``, of half A of the digits. EMA* is trained on 10,000 of its own samples, anew for each
seed. "EMA*, w" is EMA* without a search, with the best of some w on the search's noise. Results that are already in
``results/neon.csv`` are not measured again.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
from common import machine, read_csv, write_csv
from fidelity import HEADER, REPORTED, MetricsOfHalves, answer_of, best_ema, objective_of
from refine import TRAINING
from torch import Tensor

from lcsc_opt.base.records import HELD_OUT, Candidate, Coefficients
from lcsc_opt.objective.merge_sample_score import MergeSampleScore
from lcsc_opt.search.self_training import append_self_trained, with_weight
from lcsc_opt.training.recipes.consistency import Ict
from lcsc_opt.trajectory import Trajectory

OPTIMIZERS = ("LCSC", "LCSCGradient")
LINE = tuple(round(-1 + 0.25 * index, 2) for index in range(21))  # w from -1 to 4
COLUMNS = ("way", "row", "seed", "images", "w", *HEADER[3:])
SHOWN = ("fid A", "fid B", "fid B2", "precision A", "recall A", "precision A2", "near A")

Known = dict[tuple[str, str, int, int], tuple[float, ...]]


class Ways:
    """EMA* and searches on the checkpoints, without and with the new row.

    Args:
        seed: of self-training and of the searches.
        folder: for the trajectory.
        selected: images that a search's answer is chosen on.
    """

    def __init__(self, seed: int, folder: Path, selected: int) -> None:
        self._seed, self._selected = seed, selected
        self._plain = objective_of(**TRAINING)
        self._ema = best_ema(self._plain)
        recipe = Ict(first_discretization=160, learning_rate=1e-4)  # the curriculum's end; a tenth of the rate
        out = folder / "neon.trajectory"
        step, _ = append_self_trained(self._plain, recipe, out, start=lambda: self._ema, seed=seed)
        self._extended = self._plain.on_weights(Trajectory.open(out))
        self._place = self._extended.steps.index(step)

    def measure(self, way: str, row: str, images: int, evaluator: MetricsOfHalves) -> tuple[float, ...]:
        """w, and all metrics of the images of one way, on held-out noise."""
        objective = self._extended if row else self._plain
        coefficients = self._line() if way == "EMA*" and row else self._ema
        if way != "EMA*":
            coefficients = answer_of(objective, way, self._seed, images, selected_on=self._selected)
        return self._weight(coefficients, row), *evaluator.of_images(_sampled(objective, coefficients))

    def _line(self) -> Coefficients:
        candidates = [with_weight(self._ema, self._place, weight) for weight in LINE]
        return min(candidates, key=lambda asked: self._extended.evaluate(Candidate(asked)).loss)

    def _weight(self, coefficients: Coefficients, row: str) -> float:
        return -float(coefficients[self._place]) if row else 0.0


def _sampled(objective: MergeSampleScore, coefficients: Coefficients) -> Tensor:
    return objective.images(np.asarray(coefficients), HELD_OUT, REPORTED)


def main() -> None:
    """Measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--selected", type=int, default=2_000)
    arguments = parser.parse_args()
    print(machine())
    evaluator, known = MetricsOfHalves(), read()
    for seed in range(arguments.seeds):
        asked = [("EMA*", row, seed, 0) for row in ("", "neon")]
        asked += [(name, row, seed, arguments.images) for name in OPTIMIZERS for row in ("", "neon")]
        if all(key in known for key in asked):
            continue
        with tempfile.TemporaryDirectory() as folder:
            ways = Ways(seed, Path(folder), arguments.selected)
            for key in asked:
                if key not in known:
                    known[key] = ways.measure(key[0], key[1], key[3], evaluator)
                    write_csv("neon", COLUMNS, [(*one, *(round(v, 4) for v in known[one])) for one in known])
                    print(*key, *(f"{value:.3g}" for value in known[key][:5]), flush=True)
    print(table(known))


def read() -> Known:
    """The results that exist already."""
    return {
        (way, row, int(seed), int(images)): tuple(map(float, rest))
        for way, row, seed, images, *rest in read_csv("neon")
    }


def table(known: Known) -> str:
    """A table of means over seeds, with their standard deviations."""
    places = [COLUMNS.index(name) - 4 for name in ("w", *SHOWN)]
    lines = [f"| way | images | seeds | w | {' | '.join(SHOWN)} |", "|---|---|---|---|" + "---|" * len(SHOWN)]
    for way, row, images in dict.fromkeys((way, row, images) for way, row, _, images in known):
        found = [values for key, values in known.items() if (key[0], key[1], key[3]) == (way, row, images)]
        cells = [_cell([values[place] for values in found]) for place in places]
        name = f"{way}, with the row" if row else way
        lines.append(f"| {name} | {images:,} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3g}{spread}"


if __name__ == "__main__":
    main()
