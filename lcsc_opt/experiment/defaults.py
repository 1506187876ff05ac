"""What a study has where nobody chose: the optimizers and the rows of coefficients.

The budget is that of :meth:`lcsc_opt.base.study_spec.BudgetSpec.default`. A study stores all of this, so that a default
may change.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

from lcsc_opt.base.progress import notice
from lcsc_opt.base.study_file import StudyFile
from lcsc_opt.base.study_spec import AUTO, CHANNELS, EMA_GRID, OptimizerSpec
from lcsc_opt.database.names import BASELINES, split_name
from lcsc_opt.objective.contract import Objective
from lcsc_opt.optimizers.registry import configure
from lcsc_opt.trajectory.adapters import adapters_in, is_of_adapters


def completed(
    study_file: StudyFile,
    stored: Callable[[], Mapping[str, Mapping[str, Any]]],
    objective: Callable[[], Objective],
) -> list[StudyFile]:
    """The study file with nothing left open; several if its optimizers have different rows by default.

    Args:
        study_file: the study file.
        stored: gives name → attributes of the stored studies, which keep what they have.
        objective: gives what is searched. Both are called only if something is to be chosen.

    Raises:
        LcscError: the objective or the stored studies cannot be loaded, or an optimizer or its options are unknown.
    """

    @functools.cache
    def specifications() -> dict[str, Mapping[str, Any]]:
        """Optimizer → specification of the experiment's first search with it."""
        first_of: dict[str, Mapping[str, Any]] = {}
        for name, attributes in stored().items():
            experiment, optimizer, _ = split_name(name)
            if experiment == study_file.name:
                first_of.setdefault(optimizer, attributes["specification"])
        return first_of

    chosen = list(study_file.optimizers)
    # an experiment keeps the searches that it has; with a grid alone, it was interrupted before its search
    if not chosen and specifications().keys() - BASELINES.keys():
        chosen = [OptimizerSpec.model_validate(before["optimizer"]) for before in specifications().values()]
    if not chosen:
        chosen = _default_optimizers(study_file.name, objective())
    if study_file.space.rows != AUTO:
        return [study_file.model_copy(update={"optimizers": tuple(chosen)})]

    def rows_of(optimizer: OptimizerSpec) -> Any:
        """Those of its stored searches; of a new one a row for each output channel, where that pays, else ``None``."""
        if not configure(optimizer).needs_gradient:
            return None
        if optimizer.name in specifications():
            return specifications()[optimizer.name]["space"]["rows"]
        if objective().sampler is None or objective().trajectory is None:
            return None
        return CHANNELS

    return [
        study_file.model_copy(
            update={"optimizers": tuple(group), "space": study_file.space.model_copy(update={"rows": rows})}
        )
        for rows, group in itertools.groupby(chosen, rows_of)
    ]


def _default_optimizers(experiment: str, objective: Objective) -> list[OptimizerSpec]:
    """A grid of averages to compare with, and a search: by the gradient; if there is none, a notice says why.

    Of LoRAs also each alone, since people choose one of their epochs.
    """
    search = "LCSCGradient"
    reason = objective.why_no_gradient()
    if reason is not None:
        search = "LCSCQuadratic"
        notice(f"{experiment}: using {search}, because there is no gradient: {reason}")
    grids = [OptimizerSpec(name=EMA_GRID)]
    trajectory = objective.trajectory
    if trajectory is not None and is_of_adapters(trajectory) and adapters_in(trajectory) is None:
        grids.append(OptimizerSpec(name="Grid", options={"profile": "single"}))
    return [*grids, OptimizerSpec(name=search)]
