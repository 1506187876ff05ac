"""The contract of an objective."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np

from lcsc_opt.base.records import HELD_OUT, Candidate, Coefficients, Evaluation
from lcsc_opt.coefficients.profiles import check_steps, default_origin
from lcsc_opt.coefficients.spaces import AffineSpace
from lcsc_opt.objective.contract import Objective, StagedObjective
from lcsc_opt.testing.requiring import require

SPREAD_TOLERANCE = 1e-6  # relative, for a loss whose images were sampled in two parts


def check_objective(
    build: Callable[[], Objective], *, images: int | None = None, step: float = 1e-4, tolerance: float = 1e-2
) -> None:
    """Evaluate a few candidates, and compare what an objective answers with what it promises.

    * ``steps`` are at least two, and increase.
    * ``describe()`` is JSON, and the same for every objective that is built with the same settings.
    * The same candidate has the same finite loss, bit for bit, also in an objective that was built again.
    * ``images`` and ``noise`` of a candidate are honoured, if an evaluation has images at all.
    * A gradient is the derivative of the loss in the K coefficients. Without one, the objective gives a reason.
    * If it has stages, the loss does not depend on how images are divided.

    Args:
        build: makes the objective; called twice.
        images: how many an evaluation samples; ``None`` takes the objective's own number.
        step: length of the step of the central difference, in coefficients.
        tolerance: of the derivative along a direction, relative to the larger of it and the gradient's length.

    Raises:
        AssertionError: one of these is not kept.
    """
    objective, other = build(), build()
    check_steps(objective.steps)
    described = objective.describe()
    require(json.loads(json.dumps(described)) == described, "describe(): is not the same after it was stored as JSON")
    require(described == other.describe(), "describe(): differs between two that were built with the same settings")
    origin = default_origin(objective.steps)
    candidate = Candidate(origin, images=images)
    first = _evaluated(objective, candidate)
    for again in (objective, other):
        require(
            _evaluated(again, candidate).loss == first.loss,
            f"evaluate: the same candidate has the loss {first.loss!r}, and another one the second time",
        )
    require(math.isfinite(objective(np.eye(len(origin))[-1])), "the last checkpoint alone has no finite loss")
    if objective.images_per_evaluation:
        _check_images(objective, candidate, first)
    _check_gradient(objective, candidate, first, step=step, tolerance=tolerance)
    if isinstance(objective, StagedObjective):
        _check_parts(objective, candidate, first)


def _evaluated(objective: Objective, candidate: Candidate) -> Evaluation:
    evaluation = objective.evaluate(candidate)
    require(isinstance(evaluation, Evaluation), f"evaluate: gave {type(evaluation).__name__}, expected an Evaluation")
    require(math.isfinite(evaluation.loss), f"evaluate: the loss is {evaluation.loss}, expected a finite number")
    return evaluation


def _check_images(objective: Objective, candidate: Candidate, first: Evaluation) -> None:
    wanted = objective.images_per_evaluation if candidate.images is None else candidate.images
    require(first.cost.images == wanted, f"cost.images: {first.cost.images} for an evaluation of {wanted} images")
    fewer = Candidate(candidate.coefficients, images=max(wanted // 2, 2))
    counted = _evaluated(objective, fewer).cost.images
    require(counted == fewer.images, f"candidate.images: {fewer.images} were asked for, and {counted} sampled")
    unseen = _evaluated(objective, Candidate(candidate.coefficients, images=candidate.images, noise=HELD_OUT))
    require(unseen.loss != first.loss, "candidate.noise: the loss on held-out noise is that of the search's")


def _check_gradient(
    objective: Objective, candidate: Candidate, first: Evaluation, *, step: float, tolerance: float
) -> None:
    if objective.why_no_gradient() is not None:
        return
    evaluation = objective.evaluate(candidate, gradient=True)
    gradient, count = evaluation.gradient, len(candidate.coefficients)
    if gradient is None or gradient.shape != (count,):
        raise AssertionError(f"evaluate(gradient=True): expected a gradient of {count} numbers, got {gradient!r}")
    require(
        math.isclose(evaluation.loss, first.loss, rel_tol=1e-6),
        f"evaluate(gradient=True): the loss is {evaluation.loss}, without a gradient {first.loss}",
    )
    for direction in _directions(candidate.coefficients, objective.steps):
        ahead, behind = (
            _evaluated(objective, Candidate(candidate.coefficients + sign * step * direction, images=candidate.images))
            for sign in (1, -1)
        )
        found, expected = float(gradient @ direction), (ahead.loss - behind.loss) / (2 * step)
        require(
            abs(found - expected) <= tolerance * max(abs(expected), float(np.linalg.norm(gradient))),
            f"evaluate(gradient=True): {found:.6g} along a direction in which the loss changes by {expected:.6g}",
        )


def _directions(origin: Coefficients, steps: tuple[int, ...]) -> list[Coefficients]:
    """Two directions of length one, whose coefficients sum to zero."""
    space, generator = AffineSpace(steps, origin), np.random.default_rng(0)
    moved = [space.to_coefficients(generator.standard_normal(space.dimension)) - origin for _ in range(2)]
    return [direction / np.linalg.norm(direction) for direction in moved]


def _check_parts(objective: StagedObjective, candidate: Candidate, first: Evaluation) -> None:
    prepared, last = objective.prepare(candidate), objective.images_of(candidate)
    middle = last // 2
    parts = [objective.sample(candidate, prepared, *images) for images in ((0, middle), (middle, last))]
    whole, _ = objective.score(candidate, parts)
    require(
        math.isclose(whole.loss, first.loss, rel_tol=SPREAD_TOLERANCE),
        f"score: {whole.loss} of images sampled in two parts, and {first.loss} of all at once",
    )
