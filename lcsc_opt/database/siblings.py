"""The other studies of an experiment: what they have measured serves all that have the same objective and code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lcsc_opt.base.study_spec import EMA_GRID
from lcsc_opt.database.history import best_ema
from lcsc_opt.database.names import EMA, is_ranked, split_name
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.report import Model
from lcsc_opt.database.store import StoredStudy, our_studies


def known_ema(study: StoredStudy) -> tuple[Model, float] | None:
    """EMA*: the best of the experiment's finished EMA grids with this study's objective; and its lowest searched loss.

    ``None`` if there is no such grid.
    """
    grids = [name for name in siblings(study) if split_name(name)[1] == EMA_GRID]
    reader = HistoryReader(study.storage)
    ema = best_ema(reader.read_studies(grids))
    if ema is None:
        return None
    coefficients = reader.answer(ema)
    if coefficients is None or ema.lowest_loss is None:
        return None
    return Model(EMA, coefficients, study=ema.study, trial=ema.chosen, label=ema.label), ema.lowest_loss


def siblings(study: StoredStudy) -> dict[str, dict[str, Any]]:
    """Name → attributes of this study and of the experiment's searches and grids with its objective and code."""
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
