"""One negative checkpoint (Neon, arXiv 2510.03597): searches with and without a row trained on its own samples.

    python benchmarks/neon.py [--seeds 2] [--images 10000] [--selected 2000]

The model is that of ``refine.py``, of half A of the digits. EMA* is trained on 10,000 of its own samples, anew for each
seed. "EMA*, w" is EMA* without a search, with the best of some w on the search's noise. Results that are already in
``results/neon.csv`` are not measured again.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np
from common import measure_missing, parse
from fidelity import COLUMNS, REPORTED, MetricsOfHalves, answer_of, best_ema, objective_of
from refine import TRAINING

from lcsc_opt.base.records import HELD_OUT, Candidate, Coefficients
from lcsc_opt.search.self_training import append_self_trained, with_weight
from lcsc_opt.training.recipes.consistency import Ict
from lcsc_opt.trajectory import Trajectory

OPTIMIZERS = ("LCSC", "LCSCGradient")
LAYERS = "LCSCGradient, layers"
LINE = tuple(round(-1 + 0.25 * index, 2) for index in range(21))  # w from -1 to 4
SHOWN = ("w", "fid A", "fid B", "fid B2", "precision A", "recall A", "precision A2", "near A")


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
        out = folder / f"neon{seed}.trajectory"
        step, _ = append_self_trained(self._plain, recipe, out, start=lambda: self._ema, seed=seed)
        extended = Trajectory.open(out)
        self._extended = self._plain.on_weights(extended)
        self._place = self._extended.steps.index(step)
        layers = objective_of(rows="layers", **TRAINING)
        self._layers = layers, layers.on_weights(extended.in_rows("layers"))

    def measure(self, way: str, row: str, images: int, evaluator: MetricsOfHalves) -> tuple[float, ...]:
        """w, and all metrics of the images of one way, on held-out noise."""
        without, extended = self._layers if way == LAYERS else (self._plain, self._extended)
        objective = extended if row else without
        coefficients = self._line() if way == "EMA*" and row else self._ema
        if way != "EMA*":
            optimizer = way.partition(",")[0]
            coefficients = answer_of(objective, optimizer, self._seed, images, selected_on=self._selected)
        sampled = objective.images(np.asarray(coefficients), HELD_OUT, REPORTED)
        weight = -float(np.mean(coefficients[..., self._place])) if row else 0.0  # of layers, the mean
        return weight, *evaluator.of_images(sampled)

    def _line(self) -> Coefficients:
        candidates = [with_weight(self._ema, self._place, weight) for weight in LINE]
        return min(candidates, key=lambda asked: self._extended.evaluate(Candidate(asked)).loss)


def main() -> None:
    """Measure what is missing, and print the table."""
    arguments = parse(__doc__, seeds=2, images=10_000, selected=2_000)
    evaluator = MetricsOfHalves()
    keys = [
        (way, row, seed, 0 if way == "EMA*" else arguments.images)
        for seed in range(arguments.seeds)
        for way in ("EMA*", *OPTIMIZERS, LAYERS)
        for row in ("", "neon")
    ]
    with tempfile.TemporaryDirectory() as folder:
        ways = functools.cache(lambda seed: Ways(seed, Path(folder), arguments.selected))

        def measured(way: str, row: str, seed: int, images: int) -> tuple[float, ...]:
            return ways(seed).measure(way, row, images, evaluator)

        named = ("way", "row", "seed", "images")
        measure_missing("neon", keys, measured, named=named, metrics=("w", *COLUMNS), shown=SHOWN)


if __name__ == "__main__":
    main()
