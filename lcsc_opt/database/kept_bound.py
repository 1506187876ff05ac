"""EMA* and the bound of the kept metric, as they are stored with each study whose losses it bounds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lcsc_opt.base.records import Coefficients, Constraint
from lcsc_opt.database.arrays import array_of, stored_array

KEPT_BOUND = "kept_bound"
"""The attribute of a study with the bound; ``None`` until its search begins, and where nothing is bounded."""


@dataclasses.dataclass(frozen=True, eq=False)
class KeptBound:
    """EMA* of a study that keeps a metric, and what its losses are bounded by.

    Attributes:
        constraint: the bound.
        coefficients: of EMA*, ``[K]`` or ``[S, K]``.
        label: what EMA* is called, as ``EMA* (EMA 0.9995)``.
        study: the EMA grid whose answer EMA* is.
        trial: the number of this answer.
    """

    constraint: Constraint
    coefficients: Coefficients
    label: str
    study: str
    trial: int

    @classmethod
    def of(cls, attributes: Mapping[str, Any]) -> KeptBound | None:
        """The bound among the attributes of a study; ``None`` without one."""
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
