"""``LCSCGradient`` on digits: its options around their defaults, and other ways to follow a gradient.

    python benchmarks/gradient_settings.py [--seeds 3]

A search has 20,000 or 60,000 images, including those of checks. Its recommendation after 2,000 images, 6,000 and so on
is measured on 10,000 held-out images, of a group that no setting was chosen on. Options are varied one at a time.
Variants that no option can express are searches of their own below: other coordinates, another answer, another loss,
another gradient of the same loss. A seed decides the noise: all searches of one seed begin with the same noise. The
most important rows have the most seeds. Every result is written to ``results/gradient_settings.csv`` at once: after an
interruption, the same command continues. Rows with 1,024 or 2,048 features are searched and measured in the features of
another network. ``--row NAME`` runs only the rows whose names begin so.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from common import RESULTS, machine, write_csv
from nevergrad.optimization.base import Optimizer

from lcsc_opt.base.records import Candidate, Coefficients, Noise
from lcsc_opt.base.study_file import ObjectiveSpec
from lcsc_opt.coefficients.profiles import default_origin
from lcsc_opt.coefficients.spaces import AffineSpace, principal_basis
from lcsc_opt.metrics import Moments, Reference, Scores
from lcsc_opt.metrics.feature_metrics import Features
from lcsc_opt.metrics.image_metrics import ImageMetrics
from lcsc_opt.objective.loading import load_objective
from lcsc_opt.objective.merge_sample_score import MergeSampleScore
from lcsc_opt.optimizers.gradient import LCSCGradient, _LCSCGradient
from lcsc_opt.optimizers.parametrization import coefficient_array
from lcsc_opt.optimizers.requests import attach_evaluation, candidate_of, request_of
from lcsc_opt.training.images import bundled_images, feature_network

FIRST_SEED = 10  # settings were chosen with smaller seeds
HELD_OUT, HELD_OUT_IMAGES = Noise("held-out", 1), 10_000  # settings were chosen on group 0
LIMITS = (2_000, 6_000, 20_000, 60_000)
PER_CHECK = 1_000
HEADER = ("row", "seed", *(f"fid_{limit}" for limit in LIMITS), "cross_check_fid", "seconds")
Array = npt.NDArray[np.float64]
Result = tuple[float, ...]
"""Held-out FID at each limit, that of the cross-check at the end, seconds; NaN where there is none."""


Alter = Callable[[Reference, Features], Array]


class AlteredMetrics(ImageMetrics):
    """FID as a loss, but with another gradient in the features: that of ``alter``, ``[N, D]`` → ``[N, D]``."""

    alter: Alter

    def gradients(self, keep_weight: float | None = None) -> dict[str, Array]:  # noqa: ARG002 - FID needs none
        """The altered gradient for the one extractor."""
        [(name, (_, features, _))] = self.state.items()
        assert features is not None  # with a gradient all features are kept
        return {name: self.alter(self._scores.references[name], features)}


class Altered(Scores):
    """FID as a score, with the gradient of ``alter``."""

    def __init__(self, reference: Reference, alter: Alter) -> None:
        super().__init__({"inception": reference})
        self._alter = alter

    def image_metrics(self, total: int, *, held_out: bool = False, gradient: bool = False) -> ImageMetrics:
        """As :class:`Scores` has them, but for the gradient."""
        metrics = AlteredMetrics(self, total, held_out=held_out, gradient=gradient)
        metrics.alter = self._alter
        return metrics


def jackknifed(reference: Reference, features: Features) -> Array:
    """The gradient of 2 F(N) - F(N/2), which has no bias in 1/N; F(N/2) is the mean over both halves."""
    halves = np.array_split(features, 2)
    of_halves = np.concatenate([reference.frechet.distance_and_gradient(half)[1] for half in halves])
    whole: Array = reference.frechet.distance_and_gradient(features)[1]
    return 2 * whole - of_halves / 2


class Accumulated:
    """FID of the features of this step and of earlier steps, whose weight is multiplied by ``forgetting`` in each step.

    Steps also count by their number of images. The gradient goes through the features of this step only.
    """

    def __init__(self, forgetting: float) -> None:
        self._forgetting = forgetting
        self._past: Moments | None = None

    def __call__(self, reference: Reference, features: Features) -> Array:
        """``dF/dx = 2 (mean - mean_1) / n + 2 (I - R (Rᵀ Σ R)^(-½) Rᵀ) (x - mean) / (n - 1)``, ``Σ_1 = R Rᵀ``."""
        fresh = Moments.of(features)
        whole = fresh if self._past is None else self._past.merge(fresh)
        factor = np.linalg.cholesky(reference.frechet.cov)
        values, vectors = np.linalg.eigh(factor.T @ whole.covariance @ factor)
        half = factor @ (vectors / np.sqrt(values) ** 0.5)
        spread = (features - whole.mean) @ (np.eye(len(factor)) - half @ half.T) / (whole.count - 1)
        shift = (whole.mean - reference.frechet.mean) / whole.count
        kept = self._forgetting
        count: Any = kept * whole.count  # a weight, not an integer
        self._past = Moments(count, whole.mean, kept * whole.scatter)
        return np.asarray(2 * (shift + spread), dtype=np.float64)


class Queue:
    """FID of this step's features and of the last ``length`` features before them, all with the same weight.

    The gradient goes through the features of this step only (the queue of FD-loss, arXiv 2604.28190). It is scaled as
    it would be without a queue. The scale makes no difference to Adam, but to the optimizer's own records.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self._past: Features | None = None

    def __call__(self, reference: Reference, features: Features) -> Array:
        """``[N, D]`` float64: the last N rows of the gradient in all features."""
        whole = features if self._past is None else np.concatenate([self._past, features])
        self._past = whole[-self._length :]
        gradient = reference.frechet.distance_and_gradient(whole)[1][-len(features) :]
        return np.asarray(gradient * (len(whole) / len(features)), dtype=np.float64)


class Last(_LCSCGradient):
    """Recommends its last iterate."""

    def _internal_provide_recommendation(self) -> Array:
        self._path.average = self._path.free
        return np.asarray(super()._internal_provide_recommendation())


class Along(_LCSCGradient):
    """Adam along other directions than cosines: columns ``[K - 1, K - 1]`` in the affine space's free vector."""

    def __init__(self, *arguments: Any, directions: Array, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._path._directions = directions


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to search. Everything else is as in ``LCSCGradient``.

    Attributes:
        name: identifies the row.
        options: of the optimizer.
        search: plain objective → the running optimizer's class.
        scores: (plain objective, network that is searched in) → the scores that gradients come from.
        features: how many features that network has.
        window: candidates that are asked before the first of them is told, 1.5 for each worker.
        images: how many a search may sample.
        seeds: how many at most.
    """

    name: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    search: Callable[[MergeSampleScore], Callable[..., Optimizer]] = lambda _: _LCSCGradient
    scores: Callable[[MergeSampleScore, Reference], Scores] = lambda _, reference: Scores({"inception": reference})
    features: int = 64
    window: int = 1
    images: int = LIMITS[2]
    seeds: int = 3


def along_principal(objective: MergeSampleScore) -> Callable[..., Optimizer]:
    """Adam along all of the trajectory's own principal directions."""
    space = AffineSpace(objective.steps, default_origin(objective.steps))
    gram = objective.gram()
    assert gram is not None
    basis = principal_basis(gram, space.dimension)
    return functools.partial(Along, directions=np.stack([space.to_free(space.origin + b) for b in basis.T], axis=1))


def with_kid(objective: MergeSampleScore, reference: Reference) -> Scores:
    """FID + w KID. With w, both gradients have the same length at the start of the search, at 1,000 images."""
    start = Candidate(default_origin(objective.steps), images=PER_CHECK, noise=Noise("weights"))
    parts = [rescored(objective, Scores({"inception": reference}, loss=name)) for name in ("fid", "kid")]
    fid, kid = (np.linalg.norm(np.asarray(part.evaluate(start, gradient=True).gradient)) for part in parts)
    return Scores({"inception": reference}, loss={"fid": 1.0, "kid": float(fid / kid)})


def rescored(objective: MergeSampleScore, scores: Scores) -> MergeSampleScore:
    """The same model and sampler with other scores."""
    return MergeSampleScore(objective.trajectory, objective.sampler, scores, images=PER_CHECK)


def accumulated(forgetting: float) -> Callable[[MergeSampleScore, Reference], Scores]:
    """Scores with :class:`Accumulated`, which is empty at first."""
    return lambda _, reference: Altered(reference, Accumulated(forgetting))


def queued(length: int) -> Callable[[MergeSampleScore, Reference], Scores]:
    """Scores with :class:`Queue`, which is empty at first."""
    return lambda _, reference: Altered(reference, Queue(length))


ROWS = (
    Row("default"),
    *(Row(f"images {value}", {"images": value}) for value in (50, 200, 400)),
    Row("FID + w KID", scores=with_kid, seeds=2),
    Row("KID alone", scores=lambda _, reference: Scores({"inception": reference}, loss="kid"), seeds=2),
    Row("images 200, jackknifed", {"images": 200}, scores=lambda _, reference: Altered(reference, jackknifed), seeds=2),
    *(Row(f"accumulated {value}", scores=accumulated(value), seeds=2) for value in (0.5, 0.9)),
    Row("single coefficients", search=lambda plain: functools.partial(Along, directions=np.eye(len(plain.steps) - 1))),
    Row("principal directions", search=along_principal),
    Row("last iterate", search=lambda _: Last, seeds=2),
    *(Row(f"growth {value}", {"growth": value}) for value in (0.0, 0.05)),
    *(Row(f"step_size {value}", {"step_size": value}) for value in (0.05, 0.2, 0.5)),
    *(Row(f"checks {value}", {"checks": value}) for value in (0.1, 0.4)),
    *(Row(f"{workers} workers", window=3 * workers // 2, seeds=2) for workers in (2, 8)),
    *(Row(f"1,024 features, images {n}", {"images": n}, features=1024, seeds=1) for n in (50, 100, 200, 400)),
    *(Row(f"2,048 features, images {n}", {"images": n}, features=2048, seeds=2) for n in (100, 200, 400)),
    *(
        Row(f"2,048 features, images {n}, queue {q:,}", {"images": n}, features=2048, scores=queued(q), seeds=2)
        for n, q in ((100, 500), (100, 2000), (400, 2000))
    ),
    *(Row(f"to the end, growth {value}", {"growth": value}, images=LIMITS[3], seeds=2) for value in (0.02, 0.0, 0.05)),
    Row("to the end, accumulated 0.5, growth 0", {"growth": 0.0}, scores=accumulated(0.5), images=LIMITS[3], seeds=2),
)
NAMES = [row.name for row in ROWS]


def main() -> None:
    """Run what is missing, print every search, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--row", action="append", help="only rows whose names begin so")
    arguments = parser.parse_args()
    chosen = [row for row in ROWS if row.name.startswith(tuple(arguments.row or [""]))]
    plain = load_objective(ObjectiveSpec(file="digits.py", settings={"images": PER_CHECK}))
    assert isinstance(plain, MergeSampleScore)
    known = read()
    print(machine())
    print(f"start: {measure(plain, default_origin(plain.steps))}")
    for seed in range(FIRST_SEED, FIRST_SEED + arguments.seeds):
        for row in chosen:
            if (row.name, seed) not in known and seed < FIRST_SEED + row.seeds:
                known[row.name, seed] = run(plain, row, seed)
                write(known)
                print(f"seed {seed}  {row.name:28s}", *(f"{value:8.3f}" for value in known[row.name, seed]), flush=True)
    print_table(known)
    print(write(known))


def read() -> dict[tuple[str, int], Result]:
    """The results that exist already. A row that was renamed is measured again."""
    path = RESULTS / "gradient_settings.csv"
    if not path.exists():
        return {}
    with path.open() as file:
        rows = list(csv.reader(line for line in file if not line.startswith("#")))[1:]
    return {
        (name, int(seed)): tuple(float(value or "nan") for value in values)
        for name, seed, *values in rows
        if name in NAMES
    }


def write(known: Mapping[tuple[str, int], Result]) -> Path:
    """Write all results, in the order of the rows."""
    keys = sorted(known, key=lambda key: (NAMES.index(key[0]), key[1]))
    rows = [(*key, *("" if value != value else value for value in known[key])) for key in keys]
    return write_csv("gradient_settings", HEADER, rows)


def run(plain: MergeSampleScore, row: Row, seed: int) -> Result:
    """Make one search, and measure its recommendation at each limit."""
    start = time.perf_counter()
    reference = reference_of_digits(row.features)
    measured = plain if row.features == Row.features else rescored(plain, Scores({"inception": reference}))
    array = coefficient_array(AffineSpace(plain.steps, default_origin(plain.steps)), seed=seed)
    optimizer = row.search(plain)(array, config=LCSCGradient(**row.options))
    optimizer.plan_budget(evaluations=None, images=row.images, images_per_evaluation=PER_CHECK)
    limits = [limit for limit in LIMITS if limit <= row.images]
    found = list(answers(optimizer, rescored(plain, row.scores(plain, reference)), limits, row.window))
    fids, seconds = zip(*(measure(measured, coefficients) for coefficients in found), strict=True)
    missing = [math.nan] * (len(LIMITS) - len(limits))
    return (*(round(fid, 4) for fid in fids), *missing, round(seconds[-1], 4), round(time.perf_counter() - start, 1))


def answers(optimizer: Optimizer, objective: MergeSampleScore, limits: Sequence[int], window: int) -> Iterator[Array]:
    """The recommendation at each limit: before the candidate that would exceed it."""
    left, waiting, spent = deque(limits), deque[Any](), 0
    while True:
        while len(waiting) < window:
            waiting.append(optimizer.ask())
        candidate = waiting.popleft()
        spent += candidate_of(candidate).images or PER_CHECK
        while spent > left[0]:
            yield optimizer.recommend().value
            left.popleft()
            if not left:
                return
        evaluation = objective.evaluate(candidate_of(candidate), gradient=request_of(candidate).gradient)
        attach_evaluation(candidate, evaluation)
        optimizer.tell(candidate, evaluation.loss)


@functools.cache
def reference_of_digits(dimension: int) -> Reference:
    """The network that digits are searched in (64 features), or another one, with the features of the real images."""
    extractor = feature_network("digits", dimension=dimension)
    return Reference.of_images(extractor, bundled_images("digits")[0])


def measure(objective: MergeSampleScore, coefficients: Coefficients) -> tuple[float, float]:
    """Held-out FID, and that of the cross-check, which is NaN if the objective has none."""
    evaluation = objective.evaluate(Candidate(coefficients, images=HELD_OUT_IMAGES, noise=HELD_OUT))
    return evaluation.metrics["fid"], evaluation.metrics.get("fid@cross_check", math.nan)


def print_table(known: Mapping[tuple[str, int], Result]) -> None:
    """Print the means over seeds, and the sample standard deviation of the last FID, as in docs/gradient.md."""
    print("\n| | seeds |", " | ".join(f"{limit:,} images" for limit in LIMITS), "| cross-check |")
    print("|---|---|" + "---|" * (len(LIMITS) + 1))
    for name in NAMES:
        found = [result[:-1] for key, result in known.items() if key[0] == name]
        cells = [f"{statistics.fmean(values):.2f}" for values in zip(*found, strict=True)]
        if len(found) > 1:
            last = max(place for place in range(len(LIMITS)) if found[0][place] == found[0][place])
            cells[last] += f" ± {statistics.stdev(result[last] for result in found):.2f}"
        if found:
            print(f"| {name} | {len(found)} |", " | ".join(cells).replace("nan", ""), "|")


if __name__ == "__main__":
    main()
