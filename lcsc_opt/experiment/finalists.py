"""What a search sends into the report of its experiment: its best trials, and means of its late iterates."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from optuna.trial import FrozenTrial

from lcsc_opt.base.records import Coefficients
from lcsc_opt.base.study_spec import EMA_GRID
from lcsc_opt.database.arrays import coefficients_of, has_coefficients
from lcsc_opt.database.measurement import Model
from lcsc_opt.database.names import BASELINES, split_name
from lcsc_opt.database.states import SUCCEEDED, compared_trials

AverageName = Callable[[Coefficients], str | None]
"""What people call the coefficients of a baseline."""

LATE = {"the last half": 1 / 2, "the last third": 1 / 3}  # of the steps
FEWEST_ITERATES = 8  # in a mean
PASSES_WITH_GRADIENT = 4  # sampled twice, and a pass back through the second one takes as long as two


@dataclasses.dataclass(frozen=True, eq=False)
class Searched:
    """A search that a report is about.

    Attributes:
        study: its name.
        trials: all of them, with losses as values, in their order.
    """

    study: str
    trials: Sequence[FrozenTrial]

    @property
    def evaluations(self) -> int:
        """How many have ended."""
        return sum(trial.state.is_finished() for trial in self.trials)

    def images(self, per_evaluation: int) -> int:
        """What the search has cost, in images that are sampled once and without a graph.

        A trial that asked for no number has ``per_evaluation``.
        """
        total = 0
        for trial in self.trials:
            images = int(trial.user_attrs.get("images", per_evaluation))
            total += images * (PASSES_WITH_GRADIENT if "gradient" in trial.user_attrs else 1)
        return total

    @property
    def is_ema_grid(self) -> bool:
        """Whether its trials are averages that need no search."""
        return split_name(self.study)[1] == EMA_GRID

    @property
    def is_baseline(self) -> bool:
        """Whether its trials are averages or checkpoints of any family that need no search."""
        return split_name(self.study)[1] in BASELINES

    @property
    def lowest_loss(self) -> float:
        """Of the trials that compare; infinite without one."""
        return min((trial.value for trial in compared_trials(self.trials) if trial.value is not None), default=math.inf)

    def best_models(self, count: int, average_name: AverageName) -> list[Model]:
        """The models of the best trials, the best first; only comparable ones, and the same model once."""
        distinct: dict[str, Model] = {}
        best_first = sorted(compared_trials(self.trials), key=lambda trial: (trial.value, trial.number))
        for trial in best_first:
            if len(distinct) == count:
                break
            title = None
            if self.is_baseline:
                title = average_name(coefficients_of(trial))
            model = self._model_of(trial, title)
            distinct.setdefault(model.key, model)
        return list(distinct.values())

    def path_models(self, count: int) -> list[Model]:
        """The models on the path of a search that follows the gradient, in the order of time; of others none.

        These are some of its checks, and means of its last iterates. The iterates walk around in the noise of their
        steps, and means of them do not (Polyak and Juditsky 1992). A check is a mean of all iterates before it, in
        which late ones weigh more. Which checks: the one with the lowest loss, which curves and tables show, and evenly
        spaced ones, since their losses on the search's own images hardly differ.

        Args:
            count: of checks, at most; with one, there is one mean, too.
        """
        iterates = [trial for trial in self.trials if trial.state in SUCCEEDED and "gradient" in trial.user_attrs]
        stored = [trial for trial in iterates if has_coefficients(trial)]
        checks = compared_trials(self.trials)
        if not iterates or not checks:
            return []
        *early, last = [self._model_of(check) for check in _spaced_with_best(checks, count)]
        means = []
        for words, share in list(LATE.items())[:count]:
            late = stored[-int(share * len(stored)) :]
            if len(late) >= FEWEST_ITERATES:
                mean = np.mean([coefficients_of(trial) for trial in late], axis=0)
                means.append(Model(f"{name_of_search(self.study)}, mean of {words}", mean, study=self.study))
        # by the mean age of their iterates: a quarter of all steps, a fifth (of a check), a sixth
        return [*early, *means[:1], last, *means[1:]]

    def _model_of(self, trial: FrozenTrial, title: str | None = None) -> Model:
        """The model of a trial; ``title`` says which checkpoint or average it is."""
        name = f"{name_of_search(self.study)}, trial {trial.number}"
        return Model(
            name, coefficients_of(trial), study=self.study, trial=trial.number, label=title, searched=trial.value
        )


def _spaced_with_best(checks: Sequence[FrozenTrial], count: int) -> list[FrozenTrial]:
    """So many of the checks, at most, in their order: the one of the lowest loss, the last, and others between.

    The best one takes the place of the evenly spaced one that is nearest to it, but for the last; with a count of one,
    it is the only one.
    """
    best = min(range(len(checks)), key=lambda index: checks[index].value or 0.0)  # 0.0 is for mypy: each has a loss
    if count == 1:
        return [checks[best]]
    spaced = np.unique(np.linspace(0, len(checks) - 1, count).round().astype(int)).tolist()
    if best not in spaced and len(spaced) > 1:
        nearest = min(spaced[:-1], key=lambda index: abs(index - best))
        spaced[spaced.index(nearest)] = best
    return [checks[index] for index in sorted(spaced)]


def name_of_search(study: str) -> str:
    """``LCSC``, and ``LCSC (seed 1)``: a name that no other search of the experiment has."""
    _, name, seed = split_name(study)
    if seed:
        return f"{name} (seed {seed})"
    return name
