"""``racing``: candidates of any optimizer race, and only the better ones are evaluated on all images.

It is asynchronous successive halving (Jamieson and Talwalkar 2016; Li et al. 2020). Each candidate is first evaluated
on a part of the images, the best 1/η of them on η times as many, and so on until all images. An image has a prompt, so
a part of the images is a part of the prompts. With three rungs and η = 3, three times as many candidates are seen with
the same images: of nine candidates, all have a ninth of the images, three a third, and one has all.

Losses on different numbers of images do not compare, but differences on the same images do. So of a candidate that
drops out, the optimizer is told the best loss on all images so far, plus the difference between the two candidates on
the last images that this one was evaluated on.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from typing import Annotated, Any

import nevergrad as ng
import numpy as np
import numpy.typing as npt
from nevergrad.optimization.base import Optimizer
from pydantic import Field, model_validator

from lcsc_opt.base.settings import FrozenModel
from lcsc_opt.optimizers.parametrization import Request, attach_evaluation, attach_request, evaluation_of, failed

FEWEST_IMAGES = 2  # of an evaluation: a covariance
_MOST_PARTS = 1000  # of all images; the first rung has one of them
_RECENT = 3  # times eta: so many of the last candidates of a rung are compared, since a search moves on


class RacingOptions(FrozenModel):
    """How candidates race.

    Attributes:
        eta: η: one candidate in η goes on to the next rung, which has η times as many images.
        rungs: how many numbers of images there are; the last one is all.
    """

    eta: Annotated[int, Field(ge=2)] = 3
    rungs: Annotated[int, Field(ge=2)] = 3

    @model_validator(mode="after")
    def _first_rung_has_images(self) -> RacingOptions:
        if self.rungs > _MOST_PARTS or self.parts > _MOST_PARTS:
            raise ValueError(
                f"the first of {self.rungs} rungs has 1 / {self.eta}^{self.rungs - 1} of the images; expected at least "
                f"1 / {_MOST_PARTS}"
            )
        return self

    @property
    def parts(self) -> int:
        """How many parts all images have; the first rung is evaluated on one of them."""
        return int(self.eta ** (self.rungs - 1))

    @property
    def fewest_images(self) -> int:
        """The smallest number of all images of which the first rung has enough."""
        return FEWEST_IMAGES * self.parts

    def images(self, rung: int, all_images: int) -> int:
        """The images of a rung, from 0."""
        of_last_rung = int(self.eta ** (self.rungs - 1 - rung))
        return math.ceil(all_images / of_last_rung)

    def candidates(self, evaluations: int) -> int:
        """About how many candidates can race for the images of so many evaluations on all images."""
        return math.ceil(evaluations * self.parts / self.rungs)


class _Rung:
    """The candidates on one number of images.

    Args:
        eta: one in eta goes on.
    """

    def __init__(self, eta: int) -> None:
        self._eta = eta
        self._recent: deque[float] = deque(maxlen=_RECENT * eta)
        self._told = 0
        self._promoted = 0

    def tell(self, loss: float, loss_of_best: float) -> bool:
        """Record the loss of a candidate; give whether the candidate goes on to more images.

        It does if its loss is among the lowest of the recent ones and fewer than one in eta have gone on so far; so
        does the first. With a loss below ``loss_of_best`` it always goes on: no optimizer is told of such a loss unless
        it holds on all images.

        Args:
            loss: on the images of this rung.
            loss_of_best: that of the best candidate on all images, on the images of this rung; −∞ before there is one.
        """
        self._recent.append(loss)
        self._told += 1
        better_count = sum(recent_loss < loss for recent_loss in self._recent)
        is_good = better_count < max(len(self._recent) / self._eta, 1)  # of fewer than eta, the lowest
        has_turn = self._promoted < self._told / self._eta
        goes_on = loss < loss_of_best or (is_good and has_turn)
        if goes_on:
            self._promoted += 1
        return goes_on


@dataclasses.dataclass(eq=False)
class _Racer:
    """A candidate, and its ``losses`` on the images of each rung that it has passed."""

    parameter: Any
    losses: list[float] = dataclasses.field(default_factory=list)


class Racing(Optimizer):  # type: ignore[misc]
    """Races between the candidates of another optimizer, which is told their losses.

    Args:
        optimizer: asks the candidates; it attaches no requests itself.
        options: how they race.
        images: of an evaluation on all images; 0 until :meth:`plan_budget` tells it.
        num_workers: candidates that may be evaluated at once.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        options: RacingOptions | None = None,
        *,
        images: int = 0,
        num_workers: int = 1,
    ) -> None:
        super().__init__(optimizer.parametrization, budget=optimizer.budget, num_workers=num_workers)
        self.optimizer = optimizer
        self._options = RacingOptions() if options is None else options
        self._all_images = images
        self._rungs = [_Rung(self._options.eta) for _ in range(self._options.rungs - 1)]
        self._promoted: deque[_Racer] = deque()
        self._pending: dict[str, _Racer] = {}  # by uid
        self._best: _Racer | None = None  # of those that were evaluated on all images
        self._dropped_out: list[_Racer] = []  # before there was a best one

    def plan_budget(self, *, images_per_evaluation: int, **_: Any) -> None:
        """Learn how many images all are; the budget itself changes nothing."""
        self._all_images = images_per_evaluation

    def suggest(self, *arguments: Any, **keywords: Any) -> None:
        """Candidates to ask first; they race like all others."""
        self.optimizer.suggest(*arguments, **keywords)

    def _internal_ask_candidate(self) -> ng.p.Parameter:
        if self._promoted:
            racer = self._promoted.popleft()
        else:
            racer = _Racer(self.optimizer.ask())
        candidate = self.parametrization.spawn_child(new_value=racer.parameter.value)
        attach_request(candidate, self._request(len(racer.losses)))
        self._pending[candidate.uid] = racer
        return candidate

    def _request(self, rung: int) -> Request:
        """The images of a rung; on the last one an evaluation is plain."""
        images = self._options.images(rung, self._all_images)
        if images >= self._all_images:
            return Request()
        return Request(images=images)

    def _internal_tell_candidate(self, candidate: ng.p.Parameter, loss: float) -> None:
        racer = self._pending.pop(candidate.uid)
        attach_evaluation(racer.parameter, evaluation_of(candidate))
        if failed(candidate):
            self.optimizer.tell(racer.parameter, loss)
            return
        rung = len(racer.losses)
        racer.losses.append(loss)
        if rung == len(self._rungs):
            self._finish(racer)
        elif self._rungs[rung].tell(loss, self._best_loss(rung)):
            self._promoted.append(racer)
        else:
            self._drop_out(racer)

    def _best_loss(self, rung: int) -> float:
        """The best candidate's loss on the images of a rung; −∞ before any was evaluated on all."""
        if self._best is None:
            return -math.inf
        return self._best.losses[rung]

    def _finish(self, racer: _Racer) -> None:
        """Tell the loss on all images."""
        if self._best is None or racer.losses[-1] < self._best.losses[-1]:
            self._best = racer
        self.optimizer.tell(racer.parameter, racer.losses[-1])
        waiting_racers = self._dropped_out
        self._dropped_out = []
        for waiting in waiting_racers:
            if waiting.losses[-1] < self._best_loss(len(waiting.losses) - 1):
                self._promoted.append(waiting)  # what beats the best so far is evaluated on all images
            else:
                self._drop_out(waiting)

    def _drop_out(self, racer: _Racer) -> None:
        """Tell what the loss on all images would be, by the difference to the best so far on the same images."""
        if self._best is None:
            self._dropped_out.append(racer)
            return
        lag = racer.losses[-1] - self._best_loss(len(racer.losses) - 1)
        self.optimizer.tell(racer.parameter, self._best.losses[-1] + lag)

    def _internal_tell_not_asked(self, candidate: ng.p.Parameter, loss: float) -> None:
        """What another search evaluated on all images."""
        self.optimizer.tell(candidate, loss)

    def _internal_provide_recommendation(self) -> npt.NDArray[np.float64]:
        """The best candidate that was evaluated on all images, in Nevergrad's form."""
        best = self.optimizer.recommend() if self._best is None else self._best.parameter
        data: npt.NDArray[np.float64] = best.get_standardized_data(reference=self.parametrization)
        return data
