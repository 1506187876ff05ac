"""A rehearsal: one candidate, on a few images, by the code that a search and its report will run.

What is broken fails here, in seconds, and not after an hour: a sampler without a graph where an optimizer follows the
gradient, features that expect other channels, a missing file. It also says how long a trial takes.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lcsc_opt.base.errors import ObjectiveError, StudyStoreError
from lcsc_opt.base.progress import notice, progress
from lcsc_opt.base.records import HELD_OUT, SELECTION, Candidate, Coefficients, Cost, Evaluation
from lcsc_opt.evaluation.base import Failure, Outcome, attempt, evaluate_safely
from lcsc_opt.experiment.sameness import ACCEPT, ANEW
from lcsc_opt.experiment.timing import Pace, Seconds, about
from lcsc_opt.objective.contract import Objective

NOTICED_SECONDS = 1.0  # the first evaluation in a process takes longer than others
TIMED_SECONDS = 1.0  # of an evaluation, which say enough
SLOW_SECONDS = 10.0  # what takes as long is timed again with as many images, since it may have loaded something
_LEAST_SLOPE = 0.2  # of the mean: times are noisy
_MORE_IMAGES = 4  # times the images of the evaluation before
_MOSTLY_CALLS = 0.8  # of the time that a quarter of the images takes: nearly all of it is the calls'
_SAME_SCORE = 1e-3  # relative: kernels of a GPU may add in another order
_DISTANCES = (0.02, 0.005)  # of coefficients, for differences of scores; the second where a loss is curved
_SAME_SLOPE = 0.25  # relative: the loss is curved, and few images are rough
_NO_SLOPE = 0.01  # relative to the gradient's length
_RELIABLE_SLOPES = 0.1  # relative: slopes at both distances that differ by more say nothing
_HOLE = (
    "some weights reach the score without a graph, as through no_grad, detach or a reentrant checkpoint. Let them have "
    "one, or search by losses alone: optimizers: [EMAGrid, LCSCQuadratic]"
)
_SILENT_SECONDS = 2.0  # before a rehearsal shows how far it is


class Shown(NamedTuple):
    """How a loss is shown: where a score is maximized, as the score that the user's function returned.

    Attributes:
        word: ``loss`` or ``score``.
        sign: −1 where the loss is a score times −1.
    """

    word: str
    sign: int

    @classmethod
    def of(cls, objective: Objective) -> Shown:
        """Of the losses of an objective."""
        return cls("score", -1) if objective.maximizes else cls("loss", 1)

    def __call__(self, loss: float) -> str:
        """The number, for people."""
        return f"{self.sign * loss:.6g}"


@dataclasses.dataclass
class Rehearsal:
    """What a rehearsal has found.

    Attributes:
        pace: how long evaluations take.
        candidate: the one that was scored, without its gradient.
        shown: how losses are shown.
        loss: its loss; ``None`` if it could not be scored, if scores are random, or if it is known to drift.
        warnings: what is wrong with the score, for all reports.
    """

    pace: Pace
    candidate: Candidate
    shown: Shown
    loss: float | None = None
    warnings: list[str] = dataclasses.field(default_factory=list)

    def check_drift(self, name: str, evaluate: Callable[[Candidate], Outcome]) -> None:
        """Warn once if the same candidate has another loss at the end of a search; ``evaluate`` is that of trials.

        What a score keeps may grow so slowly that two evaluations in a row do not show it.
        """
        if self.loss is None:
            return
        again = evaluate(self.candidate)
        if isinstance(again, Failure) or _is_one_score(again.loss, self.loss):
            return
        warning = (
            f"one model had the {self.shown.word} {self.shown(self.loss)} on a few images before the search, and "
            f"{self.shown(again.loss)} after it: the {self.shown.word} depends on what was scored before. Trust no "
            f"{self.shown.word} before it no longer does"
        )
        notice(f"{name}: {warning}")
        self.warnings.append(warning)
        self.loss = None


def rehearse(
    name: str,
    objective: Objective,
    evaluate: Callable[[Candidate], Outcome],
    first: Candidate,
    *,
    report: bool,
) -> Rehearsal:
    """Evaluate a candidate on each noise, and say how long a trial will take.

    One model is scored twice, with another in between: a score that is no function of the weights would make any search
    believe in luck. Its gradient is compared with differences. A score that seems to ignore the weights is said, too.

    Args:
        name: of the experiment, for messages.
        objective: what is searched.
        evaluate: evaluates a candidate where and as often as trials will be.
        first: a candidate of a search, with its gradient if an optimizer follows it.
        report: whether results will be measured on selection and held-out noise.

    Raises:
        ObjectiveError: the code failed, or gave no gradient where one is followed; one model has two scores, or the
            gradient is not that of the score. Without a gradient, a candidate whose loss is not finite is passed over.
    """
    shown = Shown.of(objective)
    first = dataclasses.replace(first, rehearsal=True)
    plain = dataclasses.replace(first, gradient=False)
    outcomes: dict[str, Evaluation] = {}  # kind, as Pace calls it → the first evaluation
    candidates = _candidates(first, plain, objective, report=report)
    checks = 1 + first.gradient  # of the score, and of the gradient
    with progress(f"{name}: rehearsal", len(candidates) + checks, after=_SILENT_SECONDS) as advance:

        def evaluate_once_more(candidate: Candidate) -> Outcome:
            """Adds a step to the total: only what was measured before says that it is needed."""
            outcome = evaluate(candidate)
            advance(more=1)
            return outcome

        timing = _Timing(evaluate_once_more, objective.samples.per_evaluation)
        for kind, candidate in candidates.items():
            start = time.perf_counter()
            outcome = evaluate(candidate)
            seconds = time.perf_counter() - start
            advance(note=f"{candidate.noise.group} noise")
            if isinstance(outcome, Failure):
                _check_failure(name, outcome, candidate)
            else:
                outcomes[kind] = outcome
                timing.add(kind, candidate, _Measured(outcome.cost, seconds))
        if "search" in outcomes:
            _check_score(name, outcomes["search"].loss, plain, objective, evaluate_once_more)
            advance()
        if "gradient" in outcomes and not objective.is_random:
            _check_gradient(name, outcomes["gradient"], plain, objective, evaluate_once_more)
            advance()
    pace = Pace(**timing.paces)
    # what was not timed is false
    trial_seconds = (pace.gradient or pace.search).of(objective.samples.per_evaluation)
    if trial_seconds >= NOTICED_SECONDS:
        line = f"a trial takes {about(trial_seconds)}"
        if first.gradient and objective.sampler is not None:
            images = f"{objective.samples.per_evaluation:,} images with their gradient"
            line = f"{images} take {about(trial_seconds)}; most steps of a search have fewer"
        notice(f"{name}: {line}")
    loss = None
    if "search" in outcomes and not objective.is_random:
        loss = outcomes["search"].loss
    warnings = [*_about_same_data(outcomes, shown)]
    for warning in warnings:
        notice(f"{name}: {warning}")
    return Rehearsal(pace, plain, shown, loss, warnings)


def _about_same_data(outcomes: Mapping[str, Evaluation], shown: Shown) -> Iterator[str]:
    """A warning where one model has one loss, bit for bit, wherever it is scored: nothing is held out then."""
    losses = [outcomes[kind].loss for kind in ("search", "selection", "held_out") if kind in outcomes]
    if len(losses) < 3 or len(set(losses)) > 1:
        return
    yield (
        f"one model has the same {shown.word}, {shown(losses[0])}, in the search, in the choice of the answer and in "
        "the report: does the score use its draw, or the sampler its noise? If not, the report says nothing about "
        "other data"
    )


class _Measured(NamedTuple):
    """What an evaluation cost, and how long it took: less than its parts where workers share them."""

    cost: Cost
    seconds: float

    @property
    def image_seconds(self) -> float:
        """The seconds that grow with the images: of sampling, and of features."""
        return self.seconds - self.fixed

    @property
    def fixed(self) -> float:
        """The seconds that do not grow with the images."""
        return self.cost.metric_seconds + self.cost.merge_seconds

    @property
    def features(self) -> float:
        """The seconds of the features of an image."""
        return self.cost.features_seconds / self.cost.images


class _Timing:
    """How long the evaluations of a rehearsal take, by their kinds.

    Args:
        evaluate: evaluates a candidate once more.
        trial_images: of a trial; no more are needed to know how long it takes.

    Attributes:
        paces: kind, as :class:`Pace` calls it → how long such an evaluation takes.
    """

    def __init__(self, evaluate: Callable[[Candidate], Outcome], trial_images: int) -> None:
        self.paces: dict[str, Seconds] = {}
        self._evaluate = evaluate
        self._trial_images = trial_images
        self._of_search: _Measured | None = None  # the last evaluation from which the pace of a search is known

    def add(self, kind: str, candidate: Candidate, first: _Measured) -> None:
        """Find out how long a kind takes from its first evaluation, and from more where that does not tell enough."""
        if not first.cost.images:
            self.paces[kind] = Seconds(first.seconds)
        elif not first.cost.sample_seconds:  # of a score, all of whose items were scored
            self.paces[kind] = Seconds(of_image=first.seconds / first.cost.images)
        elif kind in ("selection", "held_out") and self._of_search is not None:  # the same on other noise
            self.paces[kind] = _pace_like(self.paces["search"], self._of_search, first)
        else:
            timed = self._timed(candidate, first)
            if kind == "search":
                self._of_search = timed[-1]
            if not self.paces and timed[0] is first:
                timed = timed[1:] or timed  # the first call of all takes longer
            self.paces[kind] = _pace(timed)

    def _timed(self, candidate: Candidate, first: _Measured) -> list[_Measured]:
        """Evaluations of more and more images, until one takes long enough to say how long larger ones take.

        Args:
            candidate: of a few images.
            first: its first evaluation, which may have loaded networks and real images.
        """
        measured = [first]
        # a first pass back takes longer; and one that took much longer than its images has loaded something, too
        is_telling = TIMED_SECONDS <= first.seconds <= first.cost.sample_seconds + TIMED_SECONDS
        has_told = is_telling and not candidate.gradient
        most = max(first.cost.images, self._trial_images)
        images = first.cost.images
        if first.seconds < SLOW_SECONDS:
            images *= _MORE_IMAGES
        while not has_told:
            images = min(images, most)
            again = self._measure(candidate, images)
            if again is None:  # it failed: those before it are all that is known
                return measured
            measured.append(again)
            has_told = images == most or again.seconds >= TIMED_SECONDS
            images *= _MORE_IMAGES
        last = measured[-1]
        if len(measured) > 2 or last.cost.images == most:
            return measured
        # what further images cost is known from two numbers of them, neither of which paid for what was loaded
        few = self._measure(candidate, max(last.cost.images // _MORE_IMAGES, 1))
        if few is None:
            return measured
        measured.insert(-1, few)  # a pace is that of the last two, of which the second has more images
        # If few images take nearly as long, most of the time is that of the calls, as of a small network whose threads
        # wait for a core that others use. That shows no slope, so more images are measured.
        if few.image_seconds > _MOSTLY_CALLS * last.image_seconds:
            more = self._measure(candidate, min(last.cost.images * _MORE_IMAGES, most))
            if more is not None:
                measured.append(more)
        return measured

    def _measure(self, candidate: Candidate, images: int) -> _Measured | None:
        """One more evaluation, of so many images; ``None`` if it failed."""
        start = time.perf_counter()
        outcome = self._evaluate(dataclasses.replace(candidate, images=images))
        if isinstance(outcome, Failure):
            return None
        return _Measured(outcome.cost, time.perf_counter() - start)


def _pace(measured: Sequence[_Measured]) -> Seconds:
    """How long such an evaluation takes, by the last two that were measured.

    From one number of images to the next, the further images cost less each than all together.
    """
    *earlier, last = measured
    of_image = last.image_seconds / last.cost.images
    if earlier and last.cost.images > earlier[-1].cost.images:
        further = last.image_seconds - earlier[-1].image_seconds
        slope = further / (last.cost.images - earlier[-1].cost.images)
        of_image = min(max(slope, _LEAST_SLOPE * of_image), of_image)  # noise may make the slope steep, or negative
    return Seconds(last.seconds - of_image * last.cost.images, of_image)


def _pace_like(pace: Seconds, of: _Measured, other: _Measured) -> Seconds:
    """How long ``other`` takes with any number of images: it samples as ``of``, which has this ``pace``.

    Its metrics may need further features of each image.
    """
    return Seconds(pace.fixed - of.fixed + other.fixed, pace.of_image + max(other.features - of.features, 0.0))


def _candidates(first: Candidate, plain: Candidate, objective: Objective, *, report: bool) -> dict[str, Candidate]:
    """What is evaluated, by what :class:`Pace` calls it: the search's, and the report's if there will be one.

    ``plain`` is ``first`` without its gradient.
    """
    candidates = {"gradient": first, "search": plain} if first.gradient else {"search": first}
    if report and objective.why_nothing_held_out() is None:
        candidates["selection"] = dataclasses.replace(plain, noise=SELECTION, error=True)
        candidates["held_out"] = dataclasses.replace(plain, noise=HELD_OUT, error=True)
        if len(objective.samples.samplers) > 1:
            candidates["also"] = dataclasses.replace(candidates["held_out"], sampler=1)
    return candidates


def _check_score(
    name: str, loss: float, plain: Candidate, objective: Objective, evaluate: Callable[[Candidate], Outcome]
) -> None:
    """Score the start of the search again, after another model; and say if all models seem to have one score.

    Raises:
        ObjectiveError: it has another score than before.
    """
    shown = Shown.of(objective)
    losses_alone = []
    for row in (0, -1):  # other models, between two scores of the start
        alone = np.zeros(len(objective.steps))
        alone[row] = 1.0
        outcome = evaluate(dataclasses.replace(plain, coefficients=alone))
        if isinstance(outcome, Failure) or outcome.loss != loss:
            break
        losses_alone.append(outcome.loss)
    if losses_alone == [loss, loss] and objective.trajectory is not None:
        notice(
            f"{name}: the first checkpoint, the last one and the start of the search have the same {shown.word}, "
            f"{shown(loss)}: does the score evaluate the model that it is given?"
        )
    if objective.is_random:
        return
    again = evaluate(plain)
    if isinstance(again, Failure) or _is_one_score(again.loss, loss):
        return
    advice = (
        "Seed all that is random (by draw.seed), and keep no state between calls, such as hooks or attributes; if the "
        "score cannot be seeded, set repeats, and it is the mean of so many calls"
    )
    if objective.sampler is not None:
        advice = "Let the sampler take all that is random from the noise that it gets, and keep nothing between calls"
    raise ObjectiveError(
        f"{name}: one model was scored twice, and got {shown(loss)} and then {shown(again.loss)}: the {shown.word} "
        f"depends on something other than the weights. {advice}"
    )


def check_again(trial: str, before: float, again: Outcome, functions: Collection[str]) -> None:
    """Compare the loss of a stored trial with what it has now.

    Nobody can compare functions that were handed over, nor what a score reads by itself, such as its data.

    Args:
        trial: which one, for messages.
        before: its stored loss.
        again: what it was evaluated to now.
        functions: the names of those that were handed over.

    Raises:
        StudyStoreError: it has another loss; or it cannot be evaluated, and functions were handed over.
    """
    named = ", ".join(functions)
    if isinstance(again, Failure):
        if functions:
            raise StudyStoreError(
                f"{trial} could not be evaluated again, so nobody knows whether a function has changed ({named}): "
                f"{again.reason}"
            )
        return
    if _is_one_score(again.loss, before):
        return
    reason = "what the score reads has changed, such as its data, or this machine computes it otherwise"
    advice = f"Put that back, or give the new search another name: {ANEW}; {ACCEPT}"
    if functions:
        reason = f"a function has changed ({named})"
        advice = "Leave out resume, or give the new search another name"
    raise StudyStoreError(
        f"{trial} had the loss {before:.6g}, and has another one now ({again.loss:.6g}): {reason}. {advice}"
    )


def _is_one_score(first: float, second: float) -> bool:
    """Whether two losses are those of one model, up to rounding."""
    return math.isclose(first, second, rel_tol=_SAME_SCORE, abs_tol=_SAME_SCORE**2)  # of scores near zero


def _check_gradient(
    name: str, outcome: Evaluation, plain: Candidate, objective: Objective, evaluate: Callable[[Candidate], Outcome]
) -> None:
    """Compare a gradient with the differences of losses, in three directions at most.

    Its own direction shows a gradient that is too long or too short. What it lacks may be orthogonal to it, such as a
    whole row of coefficients whose layers have no graph: a random direction in all rows shows that, too, and one in the
    rows where the gradient is zero shows the smallest such row. Where the loss does not depend on those, a notice says
    how many they are.

    Raises:
        ObjectiveError: the loss rises otherwise than the gradient says.
    """
    if outcome.gradient is None:
        return
    shown = Shown.of(objective)
    gradient = np.atleast_2d(outcome.gradient)
    gradient = gradient - gradient.mean(axis=1, keepdims=True)  # along which sums stay one
    drawn = np.random.default_rng(0).standard_normal(gradient.shape)
    drawn -= drawn.mean(axis=1, keepdims=True)
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    # so that the loss rises in every row, and rows do not cancel each other
    drawn *= np.where((drawn * gradient).sum(axis=1, keepdims=True) < 0, -1.0, 1.0)
    is_zero = ~gradient.any(axis=1, keepdims=True)

    def disagrees(direction: Coefficients) -> tuple[float, float] | None:
        """How the loss rises by the gradient, and by differences, if these are not the same for sure."""
        expected = float((gradient * direction).sum())
        measured = _measured_slope(plain, direction.reshape(plain.coefficients.shape), expected, length, evaluate)
        return None if measured is None else (expected, measured)

    length = float(np.linalg.norm(gradient))
    if length:
        for direction in (gradient / length, drawn):
            slopes = disagrees(direction)
            if slopes is not None:
                raise ObjectiveError(
                    f"{name}: the gradient says that the {shown.word} rises by {slopes[0]:.4g} where it rises by "
                    f"{slopes[1]:.4g}: {_HOLE}"
                )
    if not is_zero.any():
        return
    rows = np.flatnonzero(is_zero)
    groups = objective.layer_groups
    where = "the gradient"
    if groups is not None and len(groups) == len(gradient):
        layer = int(np.searchsorted(np.cumsum(groups.counts), rows[0], side="right"))
        where += f" in {groups.names[layer]}"
    if len(rows) > 1:
        where += f" and in {len(rows) - 1:,} more of {len(gradient):,} rows"
    slopes = disagrees(np.where(is_zero, drawn, 0.0))
    if slopes is not None:
        raise ObjectiveError(f"{name}: {where} is zero, where the {shown.word} rises by {slopes[1]:.4g}: {_HOLE}")
    if length:
        notice(f"{name}: {where} is zero, since the {shown.word} does not depend on the weights there")


def _measured_slope(
    plain: Candidate,
    direction: Coefficients,
    expected: float,
    length: float,
    evaluate: Callable[[Candidate], Outcome],
) -> float | None:
    """How the loss rises along a direction, if that is for sure not as expected; else ``None``.

    Where losses at two distances disagree about the slope, nothing is known.

    Args:
        plain: the candidate whose gradient is checked, without it.
        direction: of the shape of its coefficients; each row has the length 1 or 0, or that of the gradient's own
            direction, at most 1.
        expected: the slope by the gradient.
        length: of the gradient; slopes that differ by less than :data:`_NO_SLOPE` of it are the same.
        evaluate: evaluates a candidate.
    """
    slopes = []
    for distance in _DISTANCES:
        losses = []
        for sign in (1, -1):
            moved = plain.coefficients + sign * distance * direction
            outcome = evaluate(dataclasses.replace(plain, coefficients=moved))
            if isinstance(outcome, Failure):
                return None
            losses.append(outcome.loss)
        slope = (losses[0] - losses[1]) / (2 * distance)
        if math.isclose(slope, expected, rel_tol=_SAME_SLOPE, abs_tol=_NO_SLOPE * length):
            return None
        slopes.append(slope)
    return slopes[-1] if math.isclose(*slopes, rel_tol=_RELIABLE_SLOPES) else None


def warning_of_kept_state(
    answer: Candidate, evaluate: Callable[[Candidate], Outcome], load: Callable[[], Objective]
) -> str | None:
    """What is wrong if the answer has another loss in a network of its own, as a user would load it.

    A network may keep what it has computed with the first weights that it got, and a score of every later model then
    depends on those.

    Args:
        answer: the candidate, on a few images.
        evaluate: evaluates it where trials were.
        load: loads the objective anew; where that fails, nothing is known.
    """
    objective = attempt(load)
    if isinstance(objective, Failure):  # such as of memory, which two networks may not have
        return None
    alone = evaluate_safely(objective, answer)
    here = evaluate(answer)
    if isinstance(here, Failure) or isinstance(alone, Failure):
        return None
    if _is_one_score(here.loss, alone.loss):
        return None
    shown = Shown.of(objective)
    return (
        f"the answer has the {shown.word} {shown(alone.loss)} in a new network, and {shown(here.loss)} in that of the "
        "search: the network keeps something beside its weights, such as a cache of the first ones. Trust no "
        f"{shown.word} before it no longer does"
    )


def _check_failure(name: str, failure: Failure, candidate: Candidate) -> None:
    """Pass over a candidate that has no score, which says nothing about others.

    Raises:
        ObjectiveError: it was the code that failed; or that gave no gradient, or one of another shape.
    """
    if not failure.traceback and not (candidate.gradient and not failure.retry):
        return
    what = f"{candidate.noise.group} noise"
    if candidate.gradient:
        what += ", with the gradient"
    place = failure.raised_at if failure.retry else ""  # an error of ours says what to do, not where it was raised
    reason = failure.reason.rstrip(".")
    raise ObjectiveError(f"{name}: the first evaluation failed ({what}): {reason}\n{place}".rstrip())
