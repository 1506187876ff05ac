"""``LCSCQuadratic``: follows a quadratic model of the loss that it learns from losses alone; it needs no gradient.

Two things make it cheap (``docs/architecture.md``). First, the checkpoints of a training run lie like a random
walk (Antognini and Sohl-Dickstein 2018): along waves over the trajectory, a loss is close to a quadratic whose
curvatures differ by a factor of ten or so. Along single coefficients, they differ by a factor of 100,000. Second, the
model is first learned from evaluations of few images on one noise, whose differences are exact. It is then corrected
with plain evaluations, on which optimizers are compared.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from typing import Annotated, Any

import nevergrad as ng
import numpy as np
import numpy.typing as npt
from nevergrad.optimization.base import ConfiguredOptimizer, Optimizer
from pydantic import Field

from lcsc_opt.base.records import Candidate, Coefficients, Noise
from lcsc_opt.base.settings import Count, Positive
from lcsc_opt.optimizers.gradient import cosine_directions
from lcsc_opt.optimizers.parametrization import (
    ask_with,
    candidate_of,
    failed,
    start_of,
)

_Vector = npt.NDArray[np.float64]

NOISE_GROUP = "quadratic"
_DEFAULT_DIRECTIONS = 80
_PAIRS = 8  # waves that are probed on both sides, for the size of a curvature: a probe has the length 1
_FEWEST_LOSSES = 9  # whose changes stand in for that size where no wave was probed on both sides
_FIRST_SHARE = 5  # the first stage gets a fifth of the budget at most, its checks not counted
_FEWEST_IMAGES = 2  # for a covariance
_FEWEST_PROBES = 3  # of a first stage with one wave; several workers ask further ones before these are told
_POINTS = 5  # losses that the model is learned from, for each wave
_CHECKS = 0.2  # largest share of the first stage's images that is spent on checks
_SHORTEST_STEP = 1e-3  # in probes; instead of a shorter step, a random point is asked, from which the model learns
# Radius of the trust region, in probes.
_FIRST_RADIUS = 2.0
_SMALLEST_RADIUS = 0.2
_LARGEST_RADIUS = 6.0
_SLOPE_SPREAD = 30.0  # of the slope before anything was measured, in units of the scale: as good as unknown
_CURVATURE_SPREAD = 0.5  # of each entry of the curvature around the prior's, in units of the scale
_MISFIT = 0.05  # how far a loss departs from a quadratic, as a share of scale * distance²


@dataclasses.dataclass(frozen=True, eq=False)
class _Quadratic:
    """loss(centre + x) = loss(centre) + slope · x + x · curvature · x / 2.

    Attributes:
        slope: ``[r]``.
        curvature: ``[r, r]``, symmetric.
    """

    slope: _Vector
    curvature: _Vector

    def around(self, offset: _Vector) -> _Quadratic:
        """The same function with its centre moved by ``offset`` ``[r]``."""
        return _Quadratic(self.slope + self.curvature @ offset, self.curvature)

    def change(self, offset: _Vector) -> float:
        """The change of the loss from the centre to ``offset`` ``[r]``."""
        return float(self.slope @ offset + offset @ self.curvature @ offset / 2)


def _fitted(
    prior: _Quadratic,
    offsets: _Vector,
    changes: _Vector,
    *,
    scale: float,
    reach: float,
) -> _Quadratic:
    """The quadratic that explains the measured changes and differs least from ``prior`` (Powell 2004).

    It is the mean of a Gaussian process, which need not meet the losses exactly: far from the centre none is quadratic.

    Args:
        prior: the model before, around the same centre.
        offsets: ``[N, r]`` where losses were measured, from the centre.
        changes: ``[N]`` their losses, less the centre's.
        scale: the size of a curvature.
        reach: distances below a hundredth of it count as that, so that losses at nearly one point do not contradict
            each other.
    """
    if not len(offsets):
        return prior
    residuals = changes - offsets @ prior.slope - np.sum((offsets @ prior.curvature) * offsets, axis=1) / 2
    products = offsets @ offsets.T
    misfit = _MISFIT * scale * np.maximum(np.diag(products), (reach / 100) ** 2)
    slope_variance = (_SLOPE_SPREAD * scale) ** 2
    covariance = slope_variance * products + (_CURVATURE_SPREAD * scale * products) ** 2 / 2
    weights = np.linalg.solve(covariance + np.diag(misfit**2), residuals)
    slope = prior.slope + slope_variance * (weights @ offsets)
    curvature = prior.curvature + (_CURVATURE_SPREAD * scale) ** 2 * (offsets.T * weights) @ offsets
    return _Quadratic(slope, (curvature + curvature.T) / 2)


def _step_within(model: _Quadratic, radius: float, *, least_curvature: float) -> _Vector:
    """``[r]``: the way to the model's minimum, no longer than ``radius``, with no curvature below ``least_curvature``.

    Moré and Sorensen 1983, in the basis of eigenvectors. The least curvature keeps steps short where the loss is flat:
    there the model's error, and the noise of few images, are larger than any gain.
    """
    eigenvalues, eigenvectors = np.linalg.eigh(model.curvature)
    curvatures = np.maximum(eigenvalues, least_curvature)
    slope = eigenvectors.T @ model.slope
    damping = _damping(curvatures, slope, radius)
    step: _Vector = -(eigenvectors @ (slope / (curvatures + damping)))
    return step


def _damping(curvatures: _Vector, slope: _Vector, radius: float) -> float:
    """What to add to the curvatures so that the step is no longer than ``radius``; by bisection."""
    if not np.linalg.norm(slope / curvatures) > radius:
        return 0.0
    low = 0.0
    high = float(np.linalg.norm(slope)) / radius  # enough whatever the curvatures are, which are above zero
    for _ in range(60):  # halvings, more than a double has bits
        middle = (low + high) / 2
        if np.linalg.norm(slope / (curvatures + middle)) > radius:
            low = middle
        else:
            high = middle
    return high


@dataclasses.dataclass
class _Stage:
    """Evaluations that compare with each other: with the same number of images, on the same noise.

    Attributes:
        start: ``[r]``, where it begins.
        prior: the model around the start; ``None`` while the size of a curvature is not known.
        images: of an evaluation, on the noise of the first stage; ``None`` for plain evaluations.
        length: how many evaluations, also failed ones, end the stage; ``None`` for the last stage.
        points: ``[r]`` each, where losses were measured.
        losses: one for each point.
        told: how many of its evaluations have ended, also failed ones.
    """

    start: _Vector
    prior: _Quadratic | None
    images: int | None = None
    length: int | None = None
    points: list[_Vector] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    told: int = 0

    @property
    def best(self) -> int:
        """The index of the lowest loss."""
        return int(np.argmin(self.losses))

    @property
    def centre(self) -> _Vector:
        """The best point, around which the model is learned; before the first loss the start."""
        if self.points:
            return self.points[self.best]
        return self.start

    def two_sided_changes(self) -> list[float]:
        """loss(x) + loss(-x) - 2 loss(start) of the waves that were probed on both sides.

        Empty where the start's evaluation failed.
        """
        loss_at = {_key(point): loss for point, loss in zip(self.points, self.losses, strict=True)}
        start_loss = loss_at.get(_key(self.start))
        if start_loss is None:
            return []
        changes = []
        for point in self.points:
            opposite_loss = loss_at.get(_key(-point))
            if point.any() and opposite_loss is not None:
                changes.append(loss_at[_key(point)] + opposite_loss - 2 * start_loss)
        return changes


def _key(point: _Vector) -> bytes:
    """Equal points have equal keys: adding zero turns -0 into 0."""
    return (point + 0.0).tobytes()


@dataclasses.dataclass(frozen=True)
class _Asked:
    """A point between ask and tell.

    Attributes:
        stage: its stage; ``None`` for a check.
        point: ``[r]``.
        base_loss: for a step, the centre's loss when it was asked; NaN if the stage had no loss yet.
        promised_gain: for a step, by how much the model says that the loss falls.
    """

    stage: _Stage | None
    point: _Vector
    base_loss: float = math.nan
    promised_gain: float = math.nan

    @property
    def is_step(self) -> bool:
        """Whether the model chose the point; all others are probes, random points and checks."""
        return not math.isnan(self.promised_gain)


class _LCSCQuadratic(Optimizer):  # type: ignore[misc]
    """One running search; :class:`LCSCQuadratic` configures it."""

    def __init__(self, *, config: LCSCQuadratic, **options: Any) -> None:
        super().__init__(**options)
        self._options = config.config()
        self._origin = start_of(self.parametrization)  # [K] or [S, K]
        self._best_told = math.inf  # of candidates that it did not ask
        self._noise = Noise(NOISE_GROUP, int(self._rng.randint(2**31 - 1)))
        self._pending: dict[str, _Asked] = {}  # by uid
        self._radius = _FIRST_RADIUS
        self._scale = math.nan
        self._plain_images = 0  # of a plain evaluation; 0 if all evaluations are plain
        self._since_check = 0
        self._checked: _Vector | None = None
        self._begin(self._options["directions"])

    def plan_budget(self, *, evaluations: int | None, images: int | None, images_per_evaluation: int) -> None:
        """Use fewer waves if the budget is small, so that the first stage leaves most of it, or no first stage.

        Exactly one of ``evaluations`` and ``images`` is given. An objective that samples none has 0 an evaluation.
        """
        few_images = 0
        if images_per_evaluation:
            few_images = max(math.ceil(self._options["share"] * images_per_evaluation), _FEWEST_IMAGES)
        affordable = evaluations or 0
        if images is not None:
            affordable = images // few_images
        # the first stage has two evaluations a wave
        directions = min(self._options["directions"], max(affordable // (2 * _FIRST_SHARE), 1))

        saves_images = few_images < images_per_evaluation
        # Workers ask two each before the probes are told. Something must be left then: only plain evaluations compare.
        if saves_images and affordable > _FEWEST_PROBES + 2 * self.num_workers:
            self._plain_images = images_per_evaluation
            self._begin(directions, few_images)
        else:
            self._plain_images = 0
            self._begin(directions)

    def _begin(self, directions: int, few_images: int | None = None) -> None:
        """Begin the first stage: a probe along every wave, on both sides for some of them.

        Without ``few_images`` it has plain evaluations, and is the only stage.
        """
        # Along a random walk of checkpoints the k-th wave's variance falls as 1/k². The k-th is k times as large here,
        # so that all of them move the merged weights about equally far.
        cosines = cosine_directions(self._origin.shape[-1])[:, :directions]
        count = cosines.shape[1]
        length = self._options["step_size"] / float(np.abs(cosines[:, 0]).sum())  # Σ|change| of the first probe
        self._basis = cosines * np.arange(1, count + 1) * length  # [K, r]

        start = np.zeros(count)
        length_of_stage = None
        if few_images is not None:
            length_of_stage = 2 * count
        self._stage = _Stage(start, prior=None, images=few_images, length=length_of_stage)

        probes = np.eye(count)
        two_sided = np.unique(np.linspace(0, count - 1, min(_PAIRS, count)).astype(int))  # evenly over the waves
        one_sided = np.setdiff1d(np.arange(count), two_sided)
        self._queue = deque([start])
        for wave in two_sided:
            self._queue.append(probes[wave])
            self._queue.append(-probes[wave])
        self._queue.extend(probes[wave] for wave in one_sided)

    # ask

    def _internal_ask_candidate(self) -> ng.p.Parameter:
        if self._check_is_due():
            self._since_check = 0
            self._checked = self._stage.centre
            asked = _Asked(None, self._stage.centre)
        else:
            self._since_check += 1
            asked = self._next()
        candidate = self.parametrization.spawn_child(new_value=self._coefficients(asked.point))
        if asked.stage is not None and asked.stage.images is not None:
            ask_with(candidate, Candidate(candidate.value, images=asked.stage.images, noise=self._noise))
        self._pending[candidate.uid] = asked
        return candidate

    def _check_is_due(self) -> bool:
        """Whether to check a new best point of the first stage, where that costs no more than its share."""
        few_images = self._stage.images
        # each point is an array of its own, and the centre is one of the points
        is_new = bool(self._stage.points) and self._checked is not self._stage.centre
        if few_images is None or not is_new:
            return False
        return (1 - _CHECKS) * self._plain_images <= _CHECKS * self._since_check * few_images

    def _coefficients(self, point: _Vector) -> Coefficients:
        """``[r]`` → ``[K]``; in a space with rows ``[S, K]``, with the same change in each.

        Where these lie outside the space, the parametrization uses the nearest inside.
        The model then maps the points as they were asked to the losses of the nearest ones. If it were learned over the
        nearest points instead, a search in the convex hull would stay at the first wall that it meets: there every step
        leads back to where it began.
        """
        value: Coefficients = self._origin + self._basis @ point
        return value

    def _next(self) -> _Asked:
        """The next point of the stage: a probe of the queue, a random point, or a step."""
        stage = self._stage
        if self._queue:
            return _Asked(stage, self._queue.popleft())
        if not self._learn_scale():
            return _Asked(stage, stage.centre + self._random(1.0))
        model = self._model()
        step = _step_within(model, self._radius, least_curvature=self._options["damping"] * self._scale)
        if any(asked.stage is stage and asked.is_step for asked in self._pending.values()):
            # The model would choose the pending step again.
            return _Asked(stage, stage.centre + step + self._random(self._radius / 2))
        if np.linalg.norm(step) < _SHORTEST_STEP:
            # By the model there is nothing to gain; a point nearby corrects it.
            return _Asked(stage, stage.centre + self._random(_SMALLEST_RADIUS))
        base_loss = stage.losses[stage.best] if stage.points else math.nan
        return _Asked(stage, stage.centre + step, base_loss, -model.change(step))

    def _random(self, length: float) -> _Vector:
        """``[r]``: a random offset of this length."""
        direction: _Vector = self._rng.standard_normal(self._basis.shape[1])
        return length / float(np.linalg.norm(direction)) * direction

    def _learn_scale(self) -> bool:
        """Learn the size of a curvature, once there are losses for it, and return whether it is known.

        It comes from the waves that were probed on both sides; where these failed, from the changes of any losses, of
        which there must be some. The median, since few waves are much steeper than the others.
        """
        stage = self._stage
        if stage.prior is not None:
            return True
        sizes = stage.two_sided_changes()
        if not sizes and len(stage.losses) >= _FEWEST_LOSSES:
            best_loss = stage.losses[stage.best]
            sizes = [abs(loss - best_loss) for loss in stage.losses]
        if not sizes:
            return False
        self._scale = float(np.median(sizes))
        if self._scale <= 0:  # the loss curves downwards along most waves, or does not change
            self._scale = float(np.max(np.abs(sizes))) or 1.0
        count = len(stage.start)
        stage.prior = _Quadratic(np.zeros(count), self._scale * np.eye(count))  # the same in all directions
        return True

    def _model(self) -> _Quadratic:
        """The model around the centre, learned from the losses next to it."""
        stage = self._stage
        centre = stage.centre
        assert stage.prior is not None
        prior = stage.prior.around(centre - stage.start)
        if not stage.points:
            return prior
        offsets = np.array(stage.points) - centre
        changes = np.array(stage.losses) - stage.losses[stage.best]
        distances = np.sum(offsets**2, axis=1)
        near = np.argsort(distances, kind="stable")[: _POINTS * len(centre)]
        near = near[distances[near] > 0]  # no change is measured at the centre itself
        return _fitted(prior, offsets[near], changes[near], scale=self._scale, reach=self._radius)

    # tell

    def _internal_tell_candidate(self, candidate: ng.p.Parameter, loss: float) -> None:
        asked = self._pending.pop(candidate.uid)
        stage = self._stage
        if asked.stage is not stage:  # a check, or a point of the first stage told late
            return
        stage.told += 1
        if failed(candidate):
            self._tell_failed(asked)
        else:
            if asked.is_step:
                self._adapt_radius(asked, loss)  # before its point is stored, which may become the centre
            stage.points.append(asked.point)
            stage.losses.append(loss)
        is_over = stage.length is not None and stage.told >= stage.length
        if is_over and self._learn_scale():  # the last stage needs the size of a curvature; else the first one goes on
            self._begin_last_stage()

    def _tell_failed(self, asked: _Asked) -> None:
        """After a failed step, shorten the next one: the model has learned nothing, and would ask the same again."""
        if not asked.is_step:
            return
        self._adapt_radius(asked, math.inf)
        step_length = float(np.linalg.norm(asked.point - self._stage.centre))
        # never so short that no step is asked any more: only steps that are told let the radius grow again
        self._radius = max(min(self._radius, step_length / 2), 2 * _SHORTEST_STEP)

    def _begin_last_stage(self) -> None:
        """Continue with plain evaluations, from the best point, with the model of the first stage as their prior."""
        centre = self._stage.centre
        self._stage = _Stage(centre, prior=self._model())
        self._queue = deque([centre])

    def _adapt_radius(self, asked: _Asked, loss: float) -> None:
        """Trust the model further where it kept its promise, less far where it did not (Conn et al. 2000, 6.1)."""
        gain = asked.base_loss - loss
        if math.isnan(gain):  # the stage had no loss yet to compare with
            return
        step_length = np.linalg.norm(asked.point - self._stage.centre)
        if gain > 0.7 * asked.promised_gain and step_length > 0.9 * self._radius:
            self._radius = min(1.5 * self._radius, _LARGEST_RADIUS)
        elif gain < 0.25 * asked.promised_gain:
            self._radius = max(0.7 * self._radius, _SMALLEST_RADIUS)

    def _internal_tell_not_asked(self, candidate: ng.p.Parameter, loss: float) -> None:
        """Begin at the best candidate that another search evaluated plainly."""
        if self.num_ask or failed(candidate) or not candidate_of(candidate).compares():
            return
        if loss < self._best_told:
            self._best_told = loss
            self._origin = np.asarray(candidate.value, dtype=np.float64)

    def _internal_provide_recommendation(self) -> _Vector:
        """The best of the stage, in Nevergrad's form."""
        child = self.parametrization.spawn_child(new_value=self._coefficients(self._stage.centre))
        data: _Vector = child.get_standardized_data(reference=self.parametrization)
        return data


class LCSCQuadratic(ConfiguredOptimizer):  # type: ignore[misc]
    """A trust-region search with a quadratic model along the slow waves of the trajectory, in two stages.

    The first stage uses few images per evaluation, on separate noise, and now and then checks the best so far
    plainly. It probes every wave, then makes steps, until there were two evaluations a wave. The second stage uses
    plain evaluations only.

    Args:
        directions: the number of waves to search, from the slowest; fewer for few checkpoints or a small budget.
        share: images of an evaluation in the first stage, as a share of a plain one's; 1 leaves the first stage out.
        step_size: how much weight the first probe along the slowest wave moves between checkpoints, as Σ|change|. The
            wave of number k is probed k times as far.
        damping: the smallest curvature that a step assumes, in units of the typical one.
    """

    def __init__(
        self,
        *,
        directions: Count = _DEFAULT_DIRECTIONS,
        share: Annotated[float, Field(gt=0, le=1)] = 0.2,
        step_size: Positive = 0.07,
        damping: Positive = 0.5,
    ) -> None:
        super().__init__(_LCSCQuadratic, locals(), as_config=True)
