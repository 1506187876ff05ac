"""What an objective is."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.records import SEARCH, Candidate, Coefficients, Cost, Evaluation
from lcsc_opt.coefficients.profiles import check_coefficients


class Objective(abc.ABC):
    """A black box over coefficients: ``objective(coefficients) -> float``, lower is better.

    Nothing in the runner, the optimizers or the database knows about images; they know this class.
    """

    @property
    @abc.abstractmethod
    def steps(self) -> tuple[int, ...]:
        """``[K]`` training steps of the checkpoints that coefficients combine, strictly increasing."""

    @abc.abstractmethod
    def evaluate(self, candidate: Candidate, *, gradient: bool = False) -> Evaluation:
        """Evaluate one candidate, with the gradient of the loss in its coefficients where ``gradient`` asks for it.

        Raises:
            Exception: any; it fails this trial, with its reason, and the study goes on.
        """

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """JSON-able: everything that changes results. A study resumes only where this is what it was."""

    def why_no_gradient(self) -> str | None:
        """What keeps this objective from giving gradients, as the end of a sentence; ``None`` where it gives them."""
        return "it gives a loss without a gradient"

    @property
    def second_metric(self) -> str | None:
        """The metric of held-out evaluations, lower is better, that a search cannot improve by cheating its loss.

        FID in features that the loss does not look at, say. ``None`` where there is none.
        """
        return None

    @property
    def images_per_evaluation(self) -> int:
        """How many images one evaluation of a search samples; 0 where there are none."""
        return 0

    def gram(self) -> npt.NDArray[np.float64]:
        """``[K, K]`` inner products of the centered checkpoints, which the ``principal`` space needs.

        Raises:
            ObjectiveError: when the objective has no weights.
        """
        raise ObjectiveError("space.principal: this objective has no weights to take directions from; use affine")

    def __call__(self, coefficients: npt.ArrayLike) -> float:
        """The loss of ``[K]`` coefficients that sum to one."""
        checked = check_coefficients(coefficients, len(self.steps))
        return self.evaluate(Candidate(checked, noise=SEARCH)).loss


@runtime_checkable
class StagedObjective(Protocol):
    """An objective whose evaluations go through stages, which overlap those of others, and divide into parts by images.

    ``evaluate`` is the same as one stage after the other, on all images. The stages of one candidate follow each
    other; those of different candidates run at the same time in different threads, one at a time of each kind.
    """

    @property
    def overlaps(self) -> bool:
        """Whether the stages use different parts of the machine, so that it is worth to overlap them."""
        ...

    def images_of(self, candidate: Candidate) -> int:
        """How many images a candidate is evaluated on."""
        ...

    def prepare(self, candidate: Candidate) -> Any:
        """Merge; the answer stays in the process."""
        ...

    def sample(self, candidate: Candidate, prepared: Any, first: int, last: int, *, gradient: bool = False) -> Any:
        """Sample the images ``[first, last)`` and reduce them to what is small, and travels between processes."""
        ...

    def score(self, candidate: Candidate, parts: Sequence[Any], *, gradient: bool = False) -> Any:
        """The evaluation, of all parts in the order of their images; with ``gradient`` also what each goes back from.

        Returns:
            The :class:`Evaluation`, its gradient still missing, and one object for each part, which travels, too;
            without ``gradient`` these are ``None``.
        """
        ...

    def slope(self, candidate: Candidate, first: int, last: int, back: Any) -> tuple[Coefficients, Cost]:
        """What the images ``[first, last)`` contribute to the gradient ``[K]``, and what that cost.

        Mostly called where this part was sampled with ``gradient`` just before, unless that process has died meanwhile.
        """
        ...
