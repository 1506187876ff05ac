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

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import measure_missing, parse
from fidelity import COLUMNS, REPORTED, MetricsOfHalves, answer_of, best_ema, objective_of
from safetensors.torch import load_file

from lcsc_opt.base.records import HELD_OUT, Coefficients
from lcsc_opt.objective.merge_sample_score import MergeSampleScore
from lcsc_opt.objective.one_model import ONE, OneModel
from lcsc_opt.search.refining import RefineSettings, refine
from lcsc_opt.trajectory import Trajectory

TRAINING: dict[str, Any] = {"training_steps": 2000, "checkpoint_every": 20}
SHOWN = (
    *("fid A", "fid B", "fid A2", "fid B2", "precision A", "precision A2", "recall A", "near A"),
    *("fid A, 2 steps", "fid B, 2 steps", "fid B2, 2 steps", "precision A, 2 steps"),
)
EMA = "EMA*"
ENDS = {"": None, ", keep": "precision"}
ROWS = ("kinds", "blocks", "layers")


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

    def _searched(
        self, objective: MergeSampleScore, images: int, *, bounded_by: MergeSampleScore | None = None
    ) -> Coefficients:
        return answer_of(
            objective, "LCSCGradient", self._seed, images, selected_on=self._selected, bounded_by=bounded_by
        )

    def _refined(self, objective: MergeSampleScore, start: Coefficients, images: int, *, then_search: int = 0) -> Found:
        settings = RefineSettings(images=images, seed=self._seed)
        out = Path(tempfile.mkdtemp(dir=self._folder)) / "refined.trajectory"
        answer, *_ = refine(objective, settings, out, start=lambda: start, held_out_images=1000)
        if not then_search:
            return Found(ONE, OneModel(load_file(answer), frozenset()))
        left = Trajectory.open(out)
        return Found(self._searched(objective.on_weights(left), then_search, bounded_by=objective), left)


def main() -> None:
    """Measure what is missing, and print the table."""
    arguments = parse(
        __doc__,
        seeds=3,
        images=20_000,
        selected=10_000,
        only={"default": "", "help": "only ways whose name contains this"},
    )
    evaluator = MetricsOfHalves()
    with tempfile.TemporaryDirectory() as folder:
        ways = functools.cache(lambda seed: Ways(Path(folder), arguments.images, arguments.selected, seed).by_name())
        keys = [
            (name, seed, arguments.images, arguments.selected)
            for seed in range(arguments.seeds)
            for name in ways(seed)
            if arguments.only in name
        ]
        measure_missing(
            "refine",
            keys,
            lambda name, seed, *_: ways(seed)[name]().evaluated(evaluator),
            named=("way", "seed", "images", "selected"),
            metrics=(*COLUMNS, *(f"{metric}, 2 steps" for metric in COLUMNS)),
            shown=SHOWN,
        )


if __name__ == "__main__":
    main()
