"""``LCSCGradient``: follows the exact gradient of the loss in the coefficients, on fresh noise at every step.

Adam works coordinate by coordinate, so it matters which coordinates it is given. Here they are cosines along the
trajectory: the checkpoints of a training run lie like a random walk, whose principal directions are cosines with
variances that fall as 1/k² (Antognini and Sohl-Dickstein 2018). They do as well as the trajectory's own principal
directions, a little better than single coefficients (``docs/architecture.md``), and need no Gram matrix.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated, Any

import nevergrad as ng
import numpy as np
import numpy.typing as npt
from nevergrad.optimization.base import ConfiguredOptimizer, Optimizer
from pydantic import Field

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.jackknife import standard_error
from lcsc_opt.base.records import Candidate, Coefficients, Evaluation, Noise
from lcsc_opt.base.settings import Positive
from lcsc_opt.coefficients.spaces import AffineSpace, CoefficientSpace
from lcsc_opt.optimizers.parametrization import (
    ask_with,
    candidate_of,
    evaluation_of,
    failed,
    space_of,
    start_of,
    steps_of,
)

_Floats = npt.NDArray[np.float64]
"""``[d]`` or ``[S, d]``: a free vector of the space, affine for a plain array; or components along directions."""

# Adam's beta_1 and beta_2: shorter than usual, since a search has only some hundred steps.
_MOMENTUM = 0.8
_MEMORY = 0.99
_DELAY = 0.5  # how much a step shrinks for each step that was made since its gradient was asked
_FIRST_TRY = 0.05  # the length of the first step that is tried before all others
_MOST_DOUBLINGS = 6  # of it
_MOST_HALVINGS = 4  # near the floor the first step, as long in every direction, only harms, and later ones gain
_MOST_LENGTHENED = 2.0  # how many times as long the other steps are planned where the budget allows few of them
_SHORTER = 0.5  # of the first round: the steps of each further one, and their length
LEAST_GAIN = 0.01  # of the whole gain: less is not worth a round, however certain it is
_AVERAGING = 3  # the exponent of the average; its mean age is a fifth of the steps

# The weight of a kept metric, in units of the loss. Its dual ascent multiplies it, so from zero it could not return.
FIRST_KEEP_WEIGHT = 0.1
_LEAST_KEEP_WEIGHT = 0.01
_KEEP_RATE = 0.05  # of the dual ascent, per standard error of the violation
_MOST_VIOLATION = 3.0  # standard errors

USUAL_CLOSENESS = 6.0  # of the weights, where nobody knows them, to what checkpoints deviate

NOISE_STRIDE = 2**20  # seeds of one search's noise; below 2^31 times this they are exact in JSON


@dataclasses.dataclass(frozen=True)
class _PendingAsk:
    """A candidate between ask and tell.

    Attributes:
        number: how many asks came before it.
        steps: how many steps the path had made when it was asked.
        ends_round: whether it is the check at the end of a round.
        doublings: of the first length that is tried, if it tries a length.
    """

    number: int
    steps: int
    ends_round: bool = False
    doublings: int | None = None


class _FirstLength:
    """Which lengths of the first step were tried, as powers of two, and with which losses.

    The neighbours of the best one are tried until both are worse.
    """

    def __init__(self) -> None:
        self._asked: set[int] = set()
        self._losses: dict[int, float] = {}

    def ask(self) -> int | None:
        """Another power of two to try; ``None`` if none is left, or the losses that are still to come decide."""
        best = self.best
        for doublings in (best, best - 1, best + 1):
            if doublings not in self._asked and self._may_be_tried(doublings):
                self._asked.add(doublings)
                return doublings
        return None

    def tell(self, doublings: int, loss: float) -> None:
        """The loss after a step of this length; infinity if it failed."""
        self._losses[doublings] = loss

    @property
    def best(self) -> int:
        """The power of two with the lowest loss; of equals the shortest one."""
        if not self._losses:
            return 0
        return min(sorted(self._losses), key=self._losses.__getitem__)

    @property
    def are_found(self) -> bool:
        """Whether the best one has worse neighbours."""
        neighbours = {self.best - 1, self.best, self.best + 1}
        return all(near in self._losses or not self._may_be_tried(near) for near in neighbours)

    @staticmethod
    def _may_be_tried(doublings: int) -> bool:
        return -_MOST_HALVINGS <= doublings <= _MOST_DOUBLINGS


@dataclasses.dataclass(frozen=True)
class _Check:
    """A plain evaluation of the average.

    Attributes:
        loss: of the average, on noise that all checks share.
        without: the loss without one of the groups of images each; ``None`` if that is not known.
    """

    loss: float
    without: Sequence[float] | None


class _LCSCGradient(Optimizer):  # type: ignore[misc]
    """One running search; :class:`LCSCGradient` configures it.

    Attributes:
        needs_gradient: it cannot search an objective that gives only losses.
        asks_one_at_a_time: a second gradient, asked before the first is told, would be at the same point.
        check_next: whether the next candidate is a check, whatever is planned: the budget may have changed since.
    """

    needs_gradient = True
    asks_one_at_a_time = True

    def __init__(self, *, config: LCSCGradient, **options: Any) -> None:
        super().__init__(**options)
        self._options = config.config()
        start = start_of(self.parametrization)
        self._space = space_of(self.parametrization) or AffineSpace(steps_of(self.parametrization), start)
        self.check_next = False
        step_size = self._options["step_size"]
        self._path = _Path(self._space, start, step_size or _FIRST_TRY, self._options["steps"])
        self._first_length = None if step_size else _FirstLength()  # while the first step has none
        self._noise_of_first_length: Noise | None = None
        self._noise_base = int(self._rng.randint(2**31 - 1)) * NOISE_STRIDE
        self._cost_since_check = 0
        # of a plain evaluation; 0 if the objective samples none, so all candidates cost the same; None without a plan
        self._check_images: int | None = None
        self._budget_left: int | None = None
        self._budget_in_images = False
        self._first_check: _Check | None = None
        self._round_ends: list[_Check] = []
        self._checked_end_at = 0  # steps, after which the end of a round was last checked
        self._pending: dict[str, _PendingAsk] = {}  # by uid
        self._retreated_at = 0
        self._best_told = np.inf  # of candidates that it did not ask
        self._keep_weight = FIRST_KEEP_WEIGHT  # of a kept metric; by dual ascent

    def plan_budget(self, *, evaluations: int | None, images: int | None, images_per_evaluation: int) -> None:
        """Plan the first round and the checks, so that the last one ends the budget; exactly one number is given.

        If the budget is raised later, the first round stays as it was planned, and more rounds follow.
        """
        self._check_images = images_per_evaluation
        self._budget_in_images = images is not None
        self._budget_left = evaluations if images is None else images
        self._plan_round()

    def _plan_round(self) -> None:
        """Make the first round no longer than what is left of the budget allows."""
        left = self._budget_left
        if left is None:
            return
        step_images = min(self._options["images"], self._check_images or math.inf)
        share_of_steps = 1 - self._options["checks"]
        if self._budget_in_images:
            affordable = share_of_steps * left / step_images
        else:
            images_between = share_of_steps / self._options["checks"] * (self._check_images or 1)
            steps_between = max(images_between / (step_images if self._check_images else 1), 1)
            affordable = left * steps_between / (steps_between + 1)
        self._path.plan(max(int(affordable), 1))

    @property
    def finished(self) -> bool:
        """Whether the last round of shorter steps brought nothing.

        It did if the check at its end has a lower loss than the one at the end of the round before, by more than the
        paired error of the difference (over the images, which all checks share and no step uses, and over the real
        images; zero if it is not known) and by more than a hundredth of the whole gain.
        """
        if len(self._round_ends) < 2 or self._first_check is None:
            return False
        before, last = self._round_ends[-2:]
        error = 0.0
        if before.without is not None and last.without is not None and len(before.without) == len(last.without):
            error = standard_error(np.subtract(before.without, last.without).tolist())
        return before.loss - last.loss <= max(error, LEAST_GAIN * (self._first_check.loss - last.loss))

    @property
    def is_unchecked(self) -> bool:
        """Whether a step was asked since the last check."""
        return self._cost_since_check > 0

    def _internal_ask_candidate(self) -> ng.p.Parameter:
        ends_round = self._round_is_unchecked
        is_check = ends_round or self._check_is_due()
        doublings = None
        if self._first_length is not None and self._path.has_direction:
            if is_check:  # the last one of the budget
                self._begin_with_best_length()
            else:
                doublings = self._first_length.ask()
        if is_check:
            asked = self._spawn(self._path.average)
            ask_with(asked, Candidate(asked.value, error=True))
            self._checked_end_at = self._path.steps
        elif doublings is not None:
            asked = self._spawn(self._path.after_first_step(2.0**doublings))
            self._ask_for_length(asked)
        else:
            asked = self._spawn(self._path.free)
            self._ask_for_gradient(asked)
        self._pending[asked.uid] = _PendingAsk(self.num_ask, self._path.steps, ends_round, doublings)
        self._charge(candidate_of(asked))
        return asked

    def _spawn(self, free: _Floats) -> ng.p.Parameter:
        return self.parametrization.spawn_child(new_value=self._space.to_coefficients(free))

    def _charge(self, candidate: Candidate) -> None:
        """Count what a candidate costs, when it is asked; :meth:`_check_is_due` decides by these numbers."""
        images = candidate.images or self._check_images or 0
        if candidate.gradient:
            self._cost_since_check += images if self._check_images else 1
        elif not candidate.unbiased:
            self._cost_since_check = 0
        if self._budget_left is not None:
            self._budget_left -= images if self._budget_in_images else 1

    @property
    def _round_is_unchecked(self) -> bool:
        """Whether the path has ended a round, and no check was asked since.

        Where only a step and the last check are left of the budget, that one will do.
        """
        left = self._budget_left
        leaves_no_check = left is not None and self._check_price < left <= 2 * self._check_price
        return self._path.has_ended_round and self._path.steps > self._checked_end_at and not leaves_no_check

    @property
    def _check_price(self) -> int:
        """What a check takes from the budget."""
        return (self._check_images or 1) if self._budget_in_images else 1

    def _check_is_due(self) -> bool:
        """Whether to ask for a check now: a plain evaluation of the average of the iterates.

        The checks' share of images has to allow it, or it is the last one of the budget. The last one is made even if
        no step was told yet, as with many workers; else the study would end without a comparable loss.
        """
        if self.check_next:
            return True
        if self._budget_left is not None and self._budget_left > 0:
            taken = self._check_price
            # only the last check is still to come: one now would leave no budget for steps before it
            if self._budget_left <= 2 * taken:
                return self._budget_left <= taken and self._cost_since_check > 0
        if self._path.steps == 0:
            return False
        check_images = self._check_images or 1
        with_check = self._cost_since_check + check_images
        return bool(check_images <= self._options["checks"] * with_check)

    @property
    def _images_of_step(self) -> int | None:
        """No more than a check has; ``None`` where the objective samples none."""
        if self._check_images == 0:
            return None
        return int(min(self._options["images"], self._check_images or math.inf))  # plain Nevergrad plans nothing

    def _fresh_noise(self) -> Noise:
        # results of others count, too: a search with the same seed has had the same noise
        return Noise("gradient", self._noise_base + self.num_ask + self.num_tell_not_asked)

    def _ask_for_gradient(self, asked: ng.p.Parameter) -> None:
        """Make it a step: its gradient is wanted, on noise of its own."""
        step = Candidate(
            asked.value,
            images=self._images_of_step,
            noise=self._fresh_noise(),
            gradient=True,
            keep_weight=self._keep_weight,
            unbiased=True,
        )
        ask_with(asked, step)

    def _ask_for_length(self, asked: ng.p.Parameter) -> None:
        """Make it a try of a length: its loss is wanted, on noise that all of them share and no step has."""
        self._noise_of_first_length = self._noise_of_first_length or self._fresh_noise()
        images = self._images_of_step
        ask_with(asked, Candidate(asked.value, images=images, noise=self._noise_of_first_length, unbiased=True))

    def _internal_tell_candidate(self, candidate: ng.p.Parameter, loss: float) -> None:
        pending = self._pending.pop(candidate.uid)
        evaluation = evaluation_of(candidate)
        if pending.doublings is not None:
            self._tell_length(pending.doublings, math.inf if failed(candidate) else loss)
            return
        if not candidate_of(candidate).gradient:
            self._tell_check(candidate, loss, ends_round=pending.ends_round)
            return
        if failed(candidate):
            self._retreat(pending)
            return
        if evaluation is None or evaluation.gradient is None:
            raise StudySpecError(
                "LCSCGradient was told a loss without a gradient: before the tell, pass the result of "
                "objective.evaluate(candidate_of(candidate)) to attach_evaluation"
            )
        if not np.isfinite(evaluation.gradient).all():  # a loop of the user's may not have checked it
            self._retreat(pending)
            return
        self._path.see(candidate.value, evaluation.gradient)
        if self._first_length is None:
            self._path.step(delay=self._path.steps - pending.steps)
        self._adjust_keep_weight(evaluation)

    def _tell_length(self, doublings: int, loss: float) -> None:
        if self._first_length is None:  # asked with others, of which one has ended the budget
            return
        self._first_length.tell(doublings, loss)
        if self._first_length.are_found:
            self._begin_with_best_length()

    def _begin_with_best_length(self) -> None:
        """Make the first step, as long as was best of what was tried, and plan those that are still to come."""
        if self._first_length is None:
            return
        self._path.lengthen(2.0**self._first_length.best)
        self._first_length = None
        self._plan_round()
        self._path.step(delay=0)
        self._path.lengthen(min(self._options["steps"] / self._path.round, _MOST_LENGTHENED))

    def _adjust_keep_weight(self, evaluation: Evaluation) -> None:
        """Dual ascent: the weight grows when the kept metric was worse than its bound, and falls when it was better.

        It follows the iterates, which are evaluated on fresh images. Their average, which is the answer, is mostly
        better; but a short search may end before the weight has grown enough. Checks measure the average, but have a
        quarter of the images, of one noise.
        """
        if evaluation.violation is None:
            return
        violation = min(max(evaluation.violation, -_MOST_VIOLATION), _MOST_VIOLATION)
        self._keep_weight = max(self._keep_weight * math.exp(_KEEP_RATE * violation), _LEAST_KEEP_WEIGHT)

    def _tell_check(self, candidate: ng.p.Parameter, loss: float, *, ends_round: bool) -> None:
        """Remember the loss of a check, by which rounds are compared."""
        if failed(candidate):
            return
        evaluation = evaluation_of(candidate)
        without = None
        if evaluation is not None:
            without = evaluation.without_groups.get("loss")
        check = _Check(loss, without)
        self._first_check = self._first_check or check
        if ends_round:
            self._round_ends.append(check)

    def _retreat(self, pending: _PendingAsk) -> None:
        """Go back to the average after a failure; once for all candidates that were asked before that."""
        if pending.number >= self._retreated_at:
            self._path.retreat()
            self._retreated_at = self.num_ask

    def _internal_tell_not_asked(self, candidate: ng.p.Parameter, loss: float) -> None:
        """Continue where another search ended: at its last gradient, or at its best loss if it has no gradients."""
        if failed(candidate):
            return
        evaluation = evaluation_of(candidate)
        evaluated = candidate_of(candidate)
        free = self._space.to_free(candidate.value)
        if evaluation is not None and evaluation.gradient is not None:
            self._path.free = free
            self._path.see(candidate.value, evaluation.gradient)
            self._path.step(delay=0)
            self._adjust_keep_weight(evaluation)
        elif self._path.steps == 0 and loss < self._best_told and evaluated.compares():
            self._best_told = loss
            self._path.free = free
            self._path.average = free

    def _internal_provide_recommendation(self) -> _Floats:
        """The average of the iterates, in Nevergrad's form."""
        data: _Floats = self._spawn(self._path.average).get_standardized_data(reference=self.parametrization)
        return data


class LCSCGradient(ConfiguredOptimizer):  # type: ignore[misc]
    """Adam (Kingma and Ba 2015, Algorithm 1) on fresh noise, in rounds in which the step falls to zero.

    The first step is as long as lowers the loss most, on noise of its own: its length is doubled, or halved up to four
    times, until both neighbours are worse. What is right differs much between training runs. Where the budget makes the
    first round shorter, its other steps are longer by as much, at most twice.

    Its candidates need a gradient: that of the loss corrected for their small number of images. Objectives without one
    are refused. Every few steps the average of the iterates is *checked*: evaluated plainly, on the noise and with the
    number of images of all other optimizers. The step falls linearly over a round; a small budget makes the first round
    shorter. Each further round has half as many steps, half as long. It is :attr:`~_LCSCGradient.finished` when such a
    round brought nothing, so a budget is only a bound.

    Args:
        images: images of a step.
        steps: of the first round, if the budget allows so many.
        step_size: the length of the first step in coefficients, in each row, shared equally by all cosine directions,
            for checkpoints that deviate from each other as much as their weights are large. For closer ones it grows
            with the root of their closeness (:attr:`CoefficientSpace.closeness`). By default it is searched.
        checks: share of all images that is spent on checks of the average.
    """

    def __init__(
        self,
        *,
        images: Annotated[int, Field(ge=2)] = 200,
        steps: Annotated[int, Field(ge=2)] = 60,
        step_size: Positive | None = None,
        checks: Annotated[float, Field(gt=0, lt=1)] = 0.2,
    ) -> None:
        super().__init__(_LCSCGradient, locals(), as_config=True)

    @property
    def round_steps(self) -> int:
        """How many steps the first round has, if the budget allows so many."""
        steps: int = self.config()["steps"]
        return steps

    def steps_of_check(self, check_images: int) -> tuple[float, int]:
        """How many steps come before a check of so many images, in the mean, and how many images each has.

        Where the objective samples none, 0, all cost the same.
        """
        options = self.config()
        images = min(options["images"], check_images)
        of_check = (1 - options["checks"]) / options["checks"]  # images of all its steps for each of its own
        return of_check * (check_images / images if images else 1), images


class _Path:
    """The iterates of one search, as free vectors ``[d]``, or ``[S, d]`` in a space with rows.

    ``step_size`` is the length of a first step that is as large as Adam allows in every direction, for a closeness of
    one, and ``steps`` the number of steps of the first round.

    Attributes:
        free: the next iterate.
        average: the average of the iterates of this round, in which late ones weigh more; the start before the first
            step.
        steps: how many were made.
        round: how many steps a round has.
    """

    def __init__(self, space: CoefficientSpace, start: Coefficients, step_size: float, steps: int) -> None:
        self.free = space.to_free(start)
        self.average = self.free
        self.steps = 0
        self._space = space
        cosines = cosine_directions(start.shape[-1])
        self._directions = _free_directions(space, cosines)  # [d, K - 1]
        count = cosines.shape[1]
        closeness = np.full(1, USUAL_CLOSENESS) if space.closeness is None else space.closeness
        lengths = np.sqrt(closeness / count)  # in each direction, for a step size of one
        self._lengths = lengths.reshape((-1, 1) if len(space.shape) > 1 else ())
        self._step_size = step_size  # at the beginning of this round
        self.round = steps
        self._steps_in_round = 0
        self._is_first_round = True
        self._adam = _Adam((*space.shape[:-1], count))
        self._ratio: _Floats | None = None  # of Adam, of the last gradient

    def plan(self, steps: int) -> None:
        """Make the first round no longer than this."""
        self.round = min(self.round, steps)

    @property
    def has_ended_round(self) -> bool:
        """Whether the step has fallen to zero; the next one begins another round."""
        return self._steps_in_round == self.round

    @property
    def has_direction(self) -> bool:
        """Whether it has seen a gradient."""
        return self._ratio is not None

    def see(self, coefficients: Coefficients, gradient: Coefficients) -> None:
        """Take in the gradient at ``coefficients``, of their shape; :meth:`step` goes against it."""
        free_gradient = self._space.to_free_gradient(self._space.to_free(coefficients), gradient)
        self._ratio = self._adam.updated_ratio(_rows_times(free_gradient, self._directions))

    def after_first_step(self, factor: float) -> _Floats:
        """Where a first step would end that is ``factor`` times as long."""
        return self._moved(factor * self._step_size)

    def lengthen(self, factor: float) -> None:
        """Make all steps ``factor`` times as long."""
        self._step_size *= factor

    def step(self, *, delay: int) -> None:
        """One step against the last gradient, which was asked ``delay`` steps ago.

        Late gradients make shorter steps, else the path swings: the first gradients of all workers are asked at one
        point, and full steps along all of them would lead much too far.
        """
        if self.has_ended_round:
            self._begin_round()
        remaining = 1 - self._steps_in_round / self.round
        self.free = self._moved(self._step_size * remaining / (1 + _DELAY * delay))
        self.steps += 1
        self._steps_in_round += 1
        # polynomial-decay averaging (Shamir and Zhang 2013)
        share = (_AVERAGING + 1) / (self._steps_in_round + _AVERAGING)
        self.average = self.average + share * (self.free - self.average)

    def _moved(self, size: float) -> _Floats:
        if self._ratio is None:
            return self.free
        moved = self.free - size * self._lengths * _rows_times(self._ratio, self._directions.T)
        return self._space.to_free(self._space.to_coefficients(moved))  # a convex space clips

    def _begin_round(self) -> None:
        """Half as many steps as the first round has, and half as long."""
        if self._is_first_round:
            self.round = max(math.ceil(_SHORTER * self.round), 1)
            self._step_size *= _SHORTER
            self._is_first_round = False
        self._steps_in_round = 0

    def retreat(self) -> None:
        """Go back to the average, without momentum, with half the step."""
        self.free = self.average
        self._step_size /= 2
        self._adam.forget_momentum()


def _rows_times(rows: _Floats, matrix: _Floats) -> _Floats:
    """``[n]`` or ``[S, n]`` by ``[n, m]``: without BLAS, whose last bits depend on its threads."""
    product = np.zeros((*rows.shape[:-1], matrix.shape[1]))
    for column, weights in zip(np.moveaxis(rows, -1, 0), matrix, strict=True):
        product += column[..., None] * weights
    return product


class _Adam:
    """Kingma and Ba 2015, Algorithm 1, without its epsilon, so that the loss's unit does not matter."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._momentum = np.zeros(shape)  # m
        self._square = np.zeros(shape)  # v
        self._steps = 0
        self._since_forgotten = 0

    def updated_ratio(self, slopes: _Floats) -> _Floats:
        """Take in the slopes along the directions; how far to go against each, in step sizes.

        That is about 1 where slopes have had one sign and size.
        """
        self._steps += 1
        self._since_forgotten += 1
        self._momentum += (1 - _MOMENTUM) * (slopes - self._momentum)
        self._square += (1 - _MEMORY) * (np.square(slopes) - self._square)
        mean = self._momentum / (1 - _MOMENTUM**self._since_forgotten)
        spread = np.sqrt(self._square / (1 - _MEMORY**self._steps))
        ratio: _Floats = np.divide(mean, spread, out=np.zeros_like(mean), where=spread > 0)
        return ratio

    def forget_momentum(self) -> None:
        """Start again with the mean, but not with the spread."""
        self._momentum = np.zeros_like(self._momentum)
        self._since_forgotten = 0


def _free_directions(space: CoefficientSpace, cosines: _Floats) -> _Floats:
    """``[d, K - 1]``: how the free vector, that of any row, changes with one unit of each cosine direction."""
    origin = space.to_coefficients(np.zeros(space.shape))
    zero = space.to_free(origin)
    columns = [np.atleast_2d(space.to_free(origin + column) - zero)[0] for column in cosines.T]  # all rows are alike
    return np.stack(columns, axis=-1)


def cosine_directions(count: int) -> npt.NDArray[np.float64]:
    """``[K, K - 1]`` orthonormal columns that sum to zero: the discrete cosine transform II without its constant."""
    frequencies = np.arange(1, count)
    positions = np.arange(count)[:, None] + 0.5
    directions: npt.NDArray[np.float64] = np.sqrt(2 / count) * np.cos(np.pi / count * positions * frequencies)
    return directions
