"""The contract of scorers: the merged weights of any model → its score and other metrics.

:class:`Scorer` is what an objective calls. :class:`Draw` says on which data it measures, and :func:`metrics_of` turns
what a user's function or command returned into metrics.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lcsc_opt.base.errors import MetricError, ObjectiveError
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


class Scorer(Protocol):
    """Scores a model with given weights.

    Attributes:
        device: where it expects the weights; candidates are merged there.
        takes_draw: whether its data depend on the :class:`Draw`.
        takes_group: whether they may depend on the group of the draw, and not only on its seed.
    """

    device: torch.device
    takes_draw: bool
    takes_group: bool

    def measure(
        self, weights: dict[str, Tensor], draw: Draw, varying: Collection[str] | None = None
    ) -> tuple[dict[str, float], Mapping[str, Tensor]]:
        """Measure the metrics, and the gradient of the score.

        Args:
            weights: name → tensor. They are used once; a scorer may clear the dictionary to free memory.
            draw: on which data.
            varying: the names of the weights to differentiate in; ``None`` computes no gradient.

        Returns:
            The metrics, the first of which is the score; and name → gradient of the score in that tensor.

        Raises:
            ObjectiveError: the score is no number, or the gradient is unavailable.
            MetricError: a metric is not finite.
        """

    def why_no_gradient(self, varying: Collection[str] | None, size: int | None) -> str | None:
        """Why gradients are unavailable, as the end of a sentence, or ``None``.

        Args:
            varying: the names of the weights to differentiate in; ``None`` stands for all.
            size: the number of items of an evaluation.
        """

    def statistics(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Tensors of the model that are computed for these weights, by name; exports contain them."""

    def describe(self) -> dict[str, Any]:
        """JSON-able: every setting that changes the score, for the study's fingerprint."""


def metrics_of(returned: Any, name: str) -> dict[str, float]:
    """What a score returned, as metrics; the first one is the score.

    Single outcomes become their mean, followed by its standard error under the same name with ``_stderr``.

    Args:
        returned: a number, single outcomes ``[n]``, or a mapping of names to either.
        name: the score's name, used unless ``returned`` is a mapping.

    Raises:
        ObjectiveError: a value is neither a number nor outcomes.
        MetricError: a value is not finite.
    """
    entries: Mapping[Any, Any] = {name: returned}
    if isinstance(returned, Mapping) and returned:
        entries = returned
    metrics: dict[str, float] = {}
    for entry, value in entries.items():
        # "loss" is reserved for what the search minimizes
        key = f"{name}.loss" if entry == "loss" else str(entry)
        values = outcomes(key, value)
        metrics[key] = float(values.mean())
        if len(values) > 1:
            metrics[f"{key}{STANDARD_ERROR}"] = float(values.std(ddof=1) / np.sqrt(len(values)))
    for key, number in metrics.items():
        if not np.isfinite(number):
            raise MetricError(f"the score is not finite: {key} is {number}")
    return metrics


def outcomes(name: str, value: Any) -> Floats:
    """A number or single outcomes, as ``[n]`` float64 with n ≥ 1.

    Raises:
        ObjectiveError: ``value`` is neither.
    """
    if isinstance(value, Tensor) and not value.is_complex():  # complex numbers are refused below
        value = value.detach().cpu().double().numpy()
    try:
        array = np.asarray(value)
    except ValueError:  # lists of different lengths
        array = np.empty(0, dtype=object)
    if array.dtype.kind not in "biuf":
        raise ObjectiveError(f"score: {name} must return a number, or single outcomes [n]; got {excerpt(value)}")
    if array.ndim > 1 or not array.size:
        raise ObjectiveError(
            f"score: {name} must return a number, or single outcomes [n]; got the shape {list(array.shape)}"
        )
    return np.atleast_1d(array)
