"""EMA* and the bound of the kept metric of one study, as they are stored with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from optuna.trial import FrozenTrial

from lcsc_opt.base.records import Coefficients, Constraint
from lcsc_opt.database.arrays import array_of, stored_array

KEPT_BOUND = "kept_bound"
"""The attribute of a study with the bound; ``None`` until it is measured. Studies of 0.2.0 lack it: they bounded each
process by a measurement that was not stored."""

BASELINE = "baseline"  # the attribute of a trial that was evaluated to measure the bound: the name of the average


@dataclasses.dataclass(frozen=True, eq=False)
class KeptBound:
    """EMA* of a study that keeps a metric, and what its losses are bounded by.

    Attributes:
        constraint: the bound.
        coefficients: of EMA*, ``[K]`` or ``[S, K]``.
        label: what EMA* is called, as ``EMA* (EMA 0.9995)``.
        study: the EMA grid whose answer EMA* is; ``None`` if the study measured it among its own trials.
        trial: the number of the trial with these coefficients, in that study or in its own.
    """

    constraint: Constraint
    coefficients: Coefficients
    label: str
    study: str | None
    trial: int | None

    @classmethod
    def of(cls, attributes: Mapping[str, Any]) -> KeptBound | None:
        """The bound among the attributes of a study; ``None`` if it was not measured."""
        stored = attributes.get(KEPT_BOUND)
        if stored is None:
            return None
        return cls(
            constraint=Constraint(**stored["constraint"]),
            coefficients=array_of(stored["coefficients"]),
            label=stored["label"],
            study=stored["study"],
            trial=stored["trial"],
        )

    def to_json(self) -> dict[str, Any]:
        """The value of the attribute."""
        return {
            "constraint": dataclasses.asdict(self.constraint),
            "coefficients": stored_array(self.coefficients),
            "label": self.label,
            "study": self.study,
            "trial": self.trial,
        }


def is_baseline(trial: FrozenTrial) -> bool:
    """Whether a trial was evaluated to measure the bound. Optimizers are not told of these."""
    return BASELINE in trial.user_attrs
