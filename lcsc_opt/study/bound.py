"""EMA* of an experiment, and the bound of a kept metric: both are read from the experiment's EMA grid.

The grid is a study of its own. :func:`lcsc_opt.study.plan.with_grids` puts it before the searches that keep a metric.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.records import Coefficients, Constraint
from lcsc_opt.database.history import StudyHistory, best_ema
from lcsc_opt.database.kept_bound import KeptBound
from lcsc_opt.database.names import EMA_GRID, is_ranked, split_name
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy, our_studies


def bound_of(study: StoredStudy) -> KeptBound:
    """The bound for a study that keeps a metric: what the answer of its experiment's EMA grid has measured.

    Raises:
        StudyStoreError: the experiment has no finished grid with this objective, or its answer has no bound.
    """
    experiment = split_name(study.name)[0]
    ema_and_answer = known_ema(study)
    if ema_and_answer is None:
        raise StudyStoreError(
            f"{study.name}: keeps a metric as good as {EMA_GRID}'s answer has it, and {experiment} has no finished "
            f"{EMA_GRID} study of this objective; run that first: lcsc run FILE --optimizer {EMA_GRID}"
        )
    ema, coefficients = ema_and_answer
    assert ema.chosen is not None  # it has an answer
    _, _, attributes = StoredStudy.open(study.storage, ema.study).chosen_trial(ema.chosen)
    if attributes.get("constraint") is None:
        raise StudyStoreError(f"{study.name}: keeps a metric, and trial {ema.chosen} of {ema.study} has no value of it")
    return KeptBound(Constraint(**attributes["constraint"]), coefficients, ema.label, ema.study, ema.chosen)


def known_ema(study: StoredStudy) -> tuple[StudyHistory, Coefficients] | None:
    """EMA*: the best of the experiment's finished EMA grids with this study's objective, and its answer."""
    grids = [name for name in siblings(study) if split_name(name)[1] == EMA_GRID]
    if not grids:
        return None
    reader = HistoryReader(study.storage)
    ema = best_ema(reader.read_studies(grids))
    if ema is None:
        return None
    coefficients = reader.answer(ema)
    if coefficients is None:
        return None
    return ema, coefficients


def siblings(study: StoredStudy) -> dict[str, dict[str, Any]]:
    """Name → attributes of the experiment's searches and grids with this study's objective and code, and its own."""
    experiment = split_name(study.name)[0]
    function = _function_of(study.attributes)
    return {
        name: attributes
        for name, attributes in our_studies(study.storage).items()
        if is_ranked(name) and split_name(name)[0] == experiment and _function_of(attributes) == function
    }


def _function_of(attributes: Mapping[str, Any]) -> Any:
    """The objective and the code in a stored study's fingerprint."""
    fingerprint = attributes["fingerprint"]
    return fingerprint["objective"], fingerprint.get("code")
