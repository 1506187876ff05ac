"""What an optimizer asks for in addition to coefficients, and what it is told in addition to a loss.

Nevergrad's ask and tell carry a candidate and a number. An optimizer that wants other noise, fewer images or a gradient
attaches that to the candidate that it asks, and finds the whole evaluation there when it is told.
"""

from __future__ import annotations

import dataclasses

import nevergrad as ng
import numpy as np

from lcsc_opt.base.records import SEARCH, Candidate, Evaluation, Noise

_REQUEST, _EVALUATION = "lcsc_request", "lcsc_evaluation"  # in a candidate's metadata, where optimizers keep theirs


@dataclasses.dataclass(frozen=True)
class Request:
    """How a candidate is to be evaluated.

    Attributes:
        images: how many; ``None`` leaves it to the objective's settings.
        noise: which group of noise.
        gradient: whether the gradient of the loss in the coefficients is wanted, too.
        keep_weight: the weight of the kept metric in that gradient; ``None`` uses the penalty of the loss.
    """

    images: int | None = None
    noise: Noise = SEARCH
    gradient: bool = False
    keep_weight: float | None = None

    def compares(self, images: int | None = None) -> bool:
        """Whether its loss compares with others: on the search's noise, with as many images as plain evaluations have.

        Args:
            images: of a plain evaluation, where known: a request for exactly that many compares, too.
        """
        return self.images in (None, images) and self.noise == SEARCH


def attach_request(parameter: ng.p.Parameter, request: Request) -> None:
    """Say how a candidate is to be evaluated, before it is asked."""
    parameter._meta[_REQUEST] = request


def request_of(parameter: ng.p.Parameter) -> Request:
    """How a candidate is to be evaluated; plainly if its optimizer said nothing."""
    request: Request = parameter._meta.get(_REQUEST, Request())
    return request


def candidate_of(parameter: ng.p.Parameter) -> Candidate:
    """What an optimizer asked, for an objective: ``objective.evaluate(candidate_of(optimizer.ask()))``."""
    request = request_of(parameter)
    coefficients = np.asarray(parameter.value, dtype=np.float64)
    return Candidate(coefficients, request.images, request.noise, request.keep_weight)


def attach_evaluation(parameter: ng.p.Parameter, evaluation: Evaluation | None) -> None:
    """Hand the whole evaluation to the optimizer that is told its loss next; ``None`` if it failed."""
    parameter._meta[_EVALUATION] = evaluation


def evaluation_of(parameter: ng.p.Parameter) -> Evaluation | None:
    """A candidate's evaluation; ``None`` if it failed, or if plain Nevergrad told only a loss."""
    evaluation: Evaluation | None = parameter._meta.get(_EVALUATION)
    return evaluation


def failed(parameter: ng.p.Parameter) -> bool:
    """Whether its evaluation failed; never with plain Nevergrad, which attaches no evaluation."""
    return _EVALUATION in parameter._meta and evaluation_of(parameter) is None
