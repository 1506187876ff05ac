"""Any Python callable over coefficients as an objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.records import HELD_OUT, Candidate, Coefficients, Evaluation
from lcsc_opt.coefficients.profiles import check_steps
from lcsc_opt.objective.contract import Objective


class CoefficientFunction(Objective):
    """Any Python callable over coefficients as an objective.

    Args:
        function: ``[K]`` float64 → float, lower is better.
        steps: ``[K]`` training steps.
        name: its name in the study's fingerprint.
        gradient: ``[K]`` float64 → ``[K]``, the function's gradient, for optimizers that need one.
        held_out: ``[K]`` float64 → float, lower is better: the final loss of the answer, on data that the search does
            not see. The answer is still chosen by ``function``.
        held_out_name: the name of ``held_out`` in the study's fingerprint.
    """

    def __init__(
        self,
        function: Callable[[Coefficients], float],
        steps: Sequence[int],
        *,
        name: str,
        gradient: Callable[[Coefficients], npt.ArrayLike] | None = None,
        held_out: Callable[[Coefficients], float] | None = None,
        held_out_name: str | None = None,
    ) -> None:
        self._function, self._steps, self._name = function, check_steps(steps), name
        self._gradient, self._held_out, self._held_out_name = gradient, held_out, held_out_name

    @property
    def steps(self) -> tuple[int, ...]:
        """``[K]`` training steps."""
        return self._steps

    def why_no_gradient(self) -> str | None:
        """See :class:`Objective`; ``None`` if a gradient was given."""
        return f"no gradient of {self._name} was given" if self._gradient is None else None

    def why_nothing_held_out(self) -> str | None:
        """See :class:`Objective`; ``None`` if a held-out function was given."""
        return f"no held_out function was given with {self._name}" if self._held_out is None else None

    def evaluate(self, candidate: Candidate, *, gradient: bool = False) -> Evaluation:
        """Call the function, and its gradient if wanted, on copies of the coefficients.

        The final loss of the answer is that of ``held_out``; else the function has no noise.

        Raises:
            ObjectiveError: the function does not give a number, the gradient does not give K numbers, or a held-out
                loss is wanted and there is no held-out function.
        """
        function, coefficients = self._function, candidate.coefficients
        if candidate.noise.group == HELD_OUT.group:
            if self._held_out is None:
                raise ObjectiveError(f"nothing is held out: {self.why_nothing_held_out()}")
            if candidate.noise.seed != HELD_OUT.seed:
                raise ObjectiveError("a held-out function has one group of noise; leave --groups and --first-group out")
            function = self._held_out
        value: Any = function(coefficients.copy())
        try:
            loss = float(value.detach() if hasattr(value, "detach") else value)
        except (TypeError, ValueError) as error:
            raise ObjectiveError(f"the objective returned {value!r}, expected a number") from error
        if not gradient:
            return Evaluation(loss)
        if self._gradient is None:
            raise ObjectiveError(f"a gradient was asked for, and {self.why_no_gradient()}")
        slope = np.asarray(self._gradient(coefficients.copy()), dtype=np.float64)
        if slope.shape != coefficients.shape:
            raise ObjectiveError(f"the gradient has the shape {list(slope.shape)}, expected {list(coefficients.shape)}")
        return Evaluation(loss, gradient=slope)

    def describe(self) -> dict[str, Any]:
        """The callables' names and the steps."""
        held_out = {} if self._held_out is None else {"held_out": self._held_out_name}
        return {"callable": self._name, "steps": list(self._steps), **held_out}
