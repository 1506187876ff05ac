"""What a search sends into the report of its experiment: its best trials."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from optuna.trial import FrozenTrial

from lcsc_opt.base.study_spec import EMA_GRID
from lcsc_opt.coefficients.layer_groups import Rule
from lcsc_opt.coefficients.profiles import average_name
from lcsc_opt.database.arrays import coefficients_of
from lcsc_opt.database.measurement import Model
from lcsc_opt.database.names import split_name
from lcsc_opt.database.states import compared_trials


@dataclasses.dataclass(frozen=True, eq=False)
class Searched:
    """A search that a report is about.

    Attributes:
        study: its name.
        trials: all of them, with losses as values, in their order.
        rule: of its rows of coefficients.
    """

    study: str
    trials: Sequence[FrozenTrial]
    rule: Rule | None

    @property
    def evaluations(self) -> int:
        """How many have ended."""
        return sum(trial.state.is_finished() for trial in self.trials)

    @property
    def is_ema_grid(self) -> bool:
        """Whether its trials are averages that need no search."""
        return split_name(self.study)[1] == EMA_GRID

    @property
    def lowest_loss(self) -> float:
        """Of the trials that compare; infinite without one."""
        return min((trial.value for trial in compared_trials(self.trials) if trial.value is not None), default=math.inf)

    def best_models(self, count: int, steps: Sequence[int]) -> list[Model]:
        """The models of the best trials, the best first; only comparable ones, and the same model once.

        What a search stops by, it chooses by: the loss to real images that it does not see, where it has measured one.
        """
        distinct: dict[str, Model] = {}
        best_first = sorted(
            compared_trials(self.trials), key=lambda trial: (trial.user_attrs.get("unseen", trial.value), trial.number)
        )
        for trial in best_first:
            if len(distinct) == count:
                break
            coefficients = coefficients_of(trial)
            title = average_name(coefficients, steps) if self.is_ema_grid else None
            name = name_of_trial(self.study, trial.number)
            model = Model(name, coefficients, study=self.study, trial=trial.number, label=title)
            distinct.setdefault(model.key, model)
        return list(distinct.values())


def name_of_trial(study: str, number: int) -> str:
    """``LCSC, trial 38``, and ``LCSC (seed 1), trial 38``: a name that no other model of the experiment has."""
    _, name, seed = split_name(study)
    if seed:
        name += f" (seed {seed})"
    return f"{name}, trial {number}"
