"""``LCSCQuadratic``: follows a quadratic model of the loss that it learns from losses alone; it needs no gradient.

Two things make it cheap (``docs/optimizers.md``). First, the checkpoints of a training run lie like a random
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

from lcsc_opt.base.records import Coefficients, Noise
from lcsc_opt.optimizers.gradient import cosine_directions
from lcsc_opt.optimizers.parametrization import Count, Positive, Request, attach_request, failed, request_of, steps_of

_Vector = npt.NDArray[np.float64]

NOISE_GROUP = "quadratic"
_DEFAULT_DIRECTIONS = 80
_PAIRS = 8  # waves that are probed on both sides, for the size of a curvature
_FIRST_SHARE = 5  # the first stage takes a fifth of the budget at most, its checks not counted
_FEWEST_IMAGES = 2  # a covariance needs them
_FEWEST_PROBES = 3  # of a first stage with one wave; with more workers, others are asked before these are told
_POINTS = 5  # losses that the model is learned from, for each wave
_CHECKS = 0.2  # largest share of the first stage's images that is spent on checks
_SHORTEST_STEP = 1e-3  # in probes; instead of a shorter step, a random point is asked, from which the model learns
_FIRST_RADIUS, _SMALLEST_RADIUS, _LARGEST_RADIUS = 2.0, 0.2, 6.0  # of the trust region, in probes
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


def _fitted(prior: _Quadratic, offsets: _Vector, changes: _Vector, *, scale: float, reach: float) -> _Quadratic:
    """The quadratic that explains the measured changes and differs least from ``prior`` (Powell 2004).

    It is the mean of a Gaussian process, so that losses need not be met exactly: far from the centre none is quadratic.

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
    rest = changes - offsets @ prior.slope - np.sum((offsets @ prior.curvature) * offsets, axis=1) / 2
    products = offsets @ offsets.T
    misfit = _MISFIT * scale * np.maximum(np.diag(products), (reach / 100) ** 2)
    covariance = (_SLOPE_SPREAD * scale) ** 2 * products + (_CURVATURE_SPREAD * scale * products) ** 2 / 2
    weights = np.linalg.solve(covariance + np.diag(misfit**2), rest)
    slope = prior.slope + (_SLOPE_SPREAD * scale) ** 2 * (weights @ offsets)
    curvature = prior.curvature + (_CURVATURE_SPREAD * scale) ** 2 * (offsets.T * weights) @ offsets
    return _Quadratic(slope, (curvature + curvature.T) / 2)


def _step_within(model: _Quadratic, radius: float, *, floor: float) -> _Vector:
    """``[r]``: the way to the model's minimum, no longer than ``radius``, with curvatures of at least ``floor``.

    Moré and Sorensen 1983, in the basis of eigenvectors. The floor keeps steps short where the loss is flat: there the
    model's error, and the noise of few images, are larger than any gain.
    """
    values, vectors = np.linalg.eigh(model.curvature)
    values, slope = np.maximum(values, floor), vectors.T @ model.slope
    damping = 0.0
    if np.linalg.norm(slope / values) > radius:
        low, high = 0.0, float(np.linalg.norm(slope)) / radius
        for _ in range(60):
            damping = (low + high) / 2
            low, high = (damping, high) if np.linalg.norm(slope / (values + damping)) > radius else (low, damping)
        damping = high
    step: _Vector = -(vectors @ (slope / (values + damping)))
    return step


@dataclasses.dataclass
class _Stage:
    """Evaluations that compare with each other: with the same number of images, on the same noise."""

    request: Request
    start: _Vector  # [r], where it begins
    prior: _Quadratic | None  # around the start; None while the size of a curvature is not known
    points: list[_Vector] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    told: int = 0  # failed ones count

    @property
    def best(self) -> int:
        return int(np.argmin(self.losses))

    @property
    def centre(self) -> _Vector:
        return self.points[self.best] if self.points else self.start


@dataclasses.dataclass(frozen=True)
class _Asked:
    """A point between ask and tell: its stage, the point, and for a step the gain that the model promised."""

    stage: _Stage | None  # None: a check
    point: _Vector
    base: float = math.nan
    promised: float = math.nan


class _LCSCQuadratic(Optimizer):  # type: ignore[misc]
    """One running search; :class:`LCSCQuadratic` configures it."""

    def __init__(self, *arguments: Any, config: LCSCQuadratic | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._options = (LCSCQuadratic() if config is None else config).config()
        self._count = len(steps_of(self.parametrization))
        self._origin = np.asarray(self.parametrization.value, dtype=np.float64)  # [K] or [S, K]
        self._best_inherited = math.inf
        self._noise = Noise(NOISE_GROUP, int(self._rng.randint(2**31 - 1)))
        self._pending: dict[str, _Asked] = {}  # by uid
        self._radius, self._scale = _FIRST_RADIUS, math.nan
        self._images = 0  # of a plain evaluation; 0: there is only one kind
        self._since_check = 0
        self._checked: _Vector | None = None
        self._begin(self._options["directions"])

    def plan_budget(self, *, evaluations: int | None, images: int | None, images_per_evaluation: int) -> None:
        """Take fewer waves if the budget is small, so that the first stage leaves most of it, or no first stage."""
        few = images_per_evaluation and max(math.ceil(self._options["share"] * images_per_evaluation), _FEWEST_IMAGES)
        affordable = (evaluations or 0) if images is None else images // max(few, 1)
        in_two_stages = few < images_per_evaluation and affordable > _FEWEST_PROBES + 2 * self.num_workers
        self._images = images_per_evaluation if in_two_stages else 0
        most = max(affordable // (2 * _FIRST_SHARE), 1)
        self._begin(min(self._options["directions"], most), few if in_two_stages else None)

    def _begin(self, directions: int, images: int | None = None) -> None:
        """Begin the first stage: a probe along every wave, on both sides for some of them."""
        # Along a random walk of checkpoints the k-th wave's variance falls as 1/k². The k-th is k times as large here,
        # so that all of them move the merged weights about equally far.
        cosines = cosine_directions(self._count)[:, :directions]
        count = cosines.shape[1]
        length = self._options["step_size"] / float(np.abs(cosines[:, 0]).sum())
        self._basis = cosines * np.arange(1, count + 1) * length  # [K, r]
        start = np.zeros(count)
        request = Request() if images is None else Request(images=images, noise=self._noise)
        self._stage, self._first = _Stage(request, start, None), 2 * count if images is not None else None
        unit = np.eye(count)
        both = np.unique(np.linspace(0, count - 1, min(_PAIRS, count)).astype(int))
        pairs = [sign * unit[i] for i in both for sign in (1, -1)]
        self._queue = deque([start, *pairs, *(unit[i] for i in range(count) if i not in both)])

    # ask

    def _internal_ask_candidate(self) -> ng.p.Parameter:
        images, centre = self._stage.request.images, self._stage.centre
        is_new = bool(self._stage.points) and self._checked is not centre
        # in the first stage the best so far is checked where that costs no more than its share
        if images is not None and is_new and (1 - _CHECKS) * self._images <= _CHECKS * self._since_check * images:
            self._since_check, self._checked = 0, centre
            asked, request = _Asked(None, centre), Request()
        else:
            self._since_check += 1
            asked, request = self._next(), self._stage.request
        candidate = self.parametrization.spawn_child(new_value=self._coefficients(asked.point))
        attach_request(candidate, request)
        self._pending[candidate.uid] = asked
        return candidate

    def _coefficients(self, point: _Vector) -> Coefficients:
        """``[r]`` → ``[K]``; in a space with rows ``[S, K]``, with the same change in each.

        Where these lie outside the space, the parametrization takes the nearest inside.
        The model then maps the points as they were asked to the losses of the nearest ones. If it were learned over the
        nearest points instead, a search in the convex hull would stay at the first wall that it meets: there every step
        leads back to where it began.
        """
        value: Coefficients = self._origin + self._basis @ point
        return value

    def _next(self) -> _Asked:
        stage = self._stage
        if self._queue:
            return _Asked(stage, self._queue.popleft())
        if not self._know_scale():
            return _Asked(stage, stage.centre + self._random(1.0))
        model = self._model()
        step = _step_within(model, self._radius, floor=self._options["damping"] * self._scale)
        if any(asked.stage is stage and not math.isnan(asked.promised) for asked in self._pending.values()):
            return _Asked(stage, stage.centre + step + self._random(self._radius / 2))  # next to a step not told yet
        if np.linalg.norm(step) < _SHORTEST_STEP:
            return _Asked(stage, stage.centre + self._random(_SMALLEST_RADIUS))  # nothing left to gain by the model
        base = stage.losses[stage.best] if stage.points else math.nan
        return _Asked(stage, stage.centre + step, base, -model.change(step))

    def _random(self, length: float) -> _Vector:
        direction: _Vector = self._rng.standard_normal(self._basis.shape[1])
        return length / float(np.linalg.norm(direction)) * direction

    def _know_scale(self) -> bool:
        """Find the size of a curvature, and return whether it is known.

        It comes from the waves that were probed on both sides; where these failed, from the changes of any losses.
        """
        stage = self._stage
        losses = stage.losses
        if stage.prior is not None:
            return True
        at = {(point + 0.0).tobytes(): loss for point, loss in zip(stage.points, losses, strict=True)}  # no -0
        middle = at.get((stage.start + 0.0).tobytes())
        sides = [(at[(p + 0.0).tobytes()], at.get((0.0 - p).tobytes())) for p in stage.points if p.any()]
        sizes = [one + other - 2 * middle for one, other in sides if None not in (other, middle)]  # type: ignore[operator]
        if not sizes and len(losses) > _PAIRS:
            sizes = [abs(loss - losses[stage.best]) for loss in losses]
        if sizes:
            typical = float(np.median(sizes))
            self._scale = typical if typical > 0 else float(np.max(np.abs(sizes))) or 1.0
            count = len(stage.start)
            stage.prior = _Quadratic(np.zeros(count), self._scale * np.eye(count))  # the same in all directions
        return stage.prior is not None

    def _model(self) -> _Quadratic:
        """The model around the centre, learned from the losses next to it."""
        stage, centre = self._stage, self._stage.centre
        assert stage.prior is not None
        prior = stage.prior.around(centre - stage.start)
        if not stage.points:
            return prior
        offsets = np.array(stage.points) - centre
        changes = np.array(stage.losses) - stage.losses[stage.best]
        distances = np.sum(offsets**2, axis=1)
        near = np.argsort(distances, kind="stable")[: _POINTS * len(centre)]
        near = near[distances[near] > 0]
        return _fitted(prior, offsets[near], changes[near], scale=self._scale, reach=self._radius)

    # tell

    def _internal_tell_candidate(self, candidate: ng.p.Parameter, loss: float) -> None:
        asked = self._pending.pop(candidate.uid)
        stage = self._stage
        if asked.stage is not stage:
            return
        stage.told += 1
        is_lost = failed(candidate)
        if not math.isnan(asked.promised):
            self._judge(asked, math.inf if is_lost else loss)
            if is_lost:  # without a loss the model learns nothing, and would ask the same again
                self._radius = min(self._radius, float(np.linalg.norm(asked.point - stage.centre)) / 2)
        if not is_lost:
            stage.points.append(asked.point)
            stage.losses.append(loss)
        if self._first is not None and stage.told >= self._first and self._know_scale():
            centre = stage.centre  # on to plain evaluations, with the model of the first stage as their prior
            self._stage, self._first = _Stage(Request(), centre, self._model()), None
            self._queue = deque([centre])

    def _judge(self, asked: _Asked, loss: float) -> None:
        """Trust the model further where it kept its promise, less far where it did not (Conn et al. 2000, 6.1)."""
        gained = asked.base - loss
        if math.isnan(gained):  # the stage had no loss yet to compare with
            return
        if gained > 0.7 * asked.promised and np.linalg.norm(asked.point - self._stage.centre) > 0.9 * self._radius:
            self._radius = min(1.5 * self._radius, _LARGEST_RADIUS)
        elif gained < 0.25 * asked.promised:
            self._radius = max(0.7 * self._radius, _SMALLEST_RADIUS)

    def _internal_tell_not_asked(self, candidate: ng.p.Parameter, loss: float) -> None:
        """Begin at the best candidate that another search evaluated plainly."""
        plain = request_of(candidate).compares() and not failed(candidate)
        if not self.num_ask and plain and loss < self._best_inherited:
            self._best_inherited, self._origin = loss, np.asarray(candidate.value, dtype=np.float64)

    def _internal_provide_recommendation(self) -> _Vector:
        """The best of the stage, in Nevergrad's form."""
        child = self.parametrization.spawn_child(new_value=self._coefficients(self._stage.centre))
        data: _Vector = child.get_standardized_data(reference=self.parametrization)
        return data


class LCSCQuadratic(ConfiguredOptimizer):  # type: ignore[misc]
    """A trust-region search with a quadratic model along the slow waves of the trajectory, in two stages.

    The first stage uses few images per evaluation, on a noise of its own, and now and then checks the best so far
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
