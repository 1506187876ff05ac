"""What a score is told and what it returns: the data of a :class:`Draw`, and its result as metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lcsc_opt.base.errors import MetricError, ObjectiveError
from lcsc_opt.base.jackknife import GROUPS, group_of_each
from lcsc_opt.base.records import HELD_OUT, SEARCH, SELECTION, STANDARD_ERROR, Noise
from lcsc_opt.base.reproducibility import derive_seed
from lcsc_opt.base.settings import excerpt

_SEED_BITS = 31  # every random generator accepts a seed of so many bits

Floats = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Draw:
    """Which data a score is measured on.

    Attributes:
        group: ``search``, ``selection`` (which chooses among the best trials) or ``held-out`` (the final report).
        seed: for everything random. It differs between groups, and between evaluations that ask for fresh data.
        size: the number of items; ``None`` leaves it to the score.
    """

    group: str
    seed: int
    size: int | None

    @classmethod
    def of(cls, noise: Noise, size: int | None) -> Draw:
        """The draw that belongs to a group of noise. Groups that an optimizer made up count as the search's."""
        seed = derive_seed(noise.seed, noise.group, bits=_SEED_BITS)
        if noise.group in (SELECTION.group, HELD_OUT.group):
            return cls(noise.group, seed, size)
        return cls(SEARCH.group, seed, size)


class Scored(NamedTuple):
    """What a score returned.

    Attributes:
        metrics: name → value; the first one is the score.
        without_groups: name → its values without one of ten groups of outcomes each, where there are enough outcomes.
    """

    metrics: dict[str, float]
    without_groups: dict[str, list[float]]

    @classmethod
    def of(cls, returned: Any, name: str) -> Scored:
        """What a score returned, as metrics.

        Single outcomes become their mean, followed by its standard error under the same name with ``_stderr``.

        Args:
            returned: a number, single outcomes ``[n]``, or a mapping of names to either.
            name: the score's name, used unless ``returned`` is a mapping.

        Raises:
            ObjectiveError: a value is neither a number nor outcomes.
            MetricError: a value is not finite.
        """
        metrics: dict[str, float] = {}
        without_groups: dict[str, list[float]] = {}
        for entry, value in named_entries(returned, name).items():
            # "loss" is reserved for what the search minimizes
            key = f"{name}.loss" if entry == "loss" else str(entry)
            values = outcomes(key, value)
            metrics[key] = float(values.mean())
            if len(values) > 1:
                metrics[f"{key}{STANDARD_ERROR}"] = float(values.std(ddof=1) / np.sqrt(len(values)))
            if len(values) >= GROUPS:  # also equal ones: a model that solves all items is certainly better than another
                groups = group_of_each(len(values))
                without_groups[key] = [float(values[groups != group].mean()) for group in range(GROUPS)]
        for key, number in metrics.items():
            if not np.isfinite(number):
                raise MetricError(f"the score gave {number} as {key!r}, expected a finite number")
        return cls(metrics, without_groups)


def named_entries(returned: Any, name: str) -> Mapping[Any, Any]:
    """What a score returned, by the names that it gave; without names it is one entry, called ``name``.

    An empty mapping is an entry, too, which :func:`outcomes` refuses.
    """
    if isinstance(returned, Mapping) and returned:
        return returned
    return {name: returned}


def outcomes(name: str, value: Any) -> Floats:
    """A number or single outcomes, as ``[n]`` float64 with n ≥ 1. ``name`` is for error messages.

    Raises:
        ObjectiveError: ``value`` is neither.
    """
    if isinstance(value, Tensor) and not value.is_complex():  # complex numbers are refused below
        value = value.detach().cpu().double().numpy()
    if isinstance(value, tuple):  # such as a loss and an accuracy, whose mean means nothing
        raise ObjectiveError(
            f"score: {name} returned a tuple: return the score alone, a mapping of names whose first is the score, or "
            "single outcomes as a list"
        )
    if isinstance(value, list):
        value = [one.detach().cpu().double().numpy() if isinstance(one, Tensor) else one for one in value]
    if isinstance(value, np.ma.MaskedArray) and value.ndim == 1:
        value = value.compressed()  # asarray below would count what is masked out, too
    try:
        array = np.asarray(value)
    except ValueError:  # lists of different lengths
        array = np.empty(0, dtype=object)
    if array.dtype.kind not in "biuf":  # bools, integers and floats
        raise ObjectiveError(f"score: {name} must return a number, or single outcomes [n]; got {excerpt(value)}")
    if array.ndim > 1 or not array.size:
        raise ObjectiveError(
            f"score: {name} must return a number, or single outcomes [n]; got the shape {list(array.shape)}"
        )
    return np.atleast_1d(array).astype(np.float64)  # in half precision the mean of many could overflow
