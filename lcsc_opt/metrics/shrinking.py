"""The weights by which targets of few real images are shrunk towards an average of the checkpoints.

Mean and covariance of 60 images are mostly chance: a search that lowers the distance to them ends farther from real
images than it began. A weighted sum of them with the statistics of a model that is near real images, of which there are
as many samples as anybody wants, is expected to be nearer the truth than either. Its best weight is known in closed
form (James and Stein 1961; Ledoit and Wolf 2004, Theorem 2.1): the squared error of the real images' statistic,
divided by its squared distance to the average's. That distance also has the error of the average's own samples, which
is subtracted.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lcsc_opt.base.jackknife import GROUPS, group_of_each
from lcsc_opt.metrics import tones
from lcsc_opt.metrics.frechet import Array
from lcsc_opt.metrics.names import TONES, Formula
from lcsc_opt.metrics.reference.reference import Reference
from lcsc_opt.metrics.reference.shrinkage import Shrinkage

MOST_REAL = 10_000  # images whose targets may be shrunk: weights are below a thousandth where EMA* is far from them
FEW_REAL = 1_000  # images, up to which whoever reads a distance to them is told how many they are
NEGLIGIBLE = 0.05  # weights, up to which a target stays as it is
NOTHING_ELSE = 0.95  # weights, from which real images say nothing that the average does not
PROBE = 200  # samples of the average, which tell whether any weight can be more than negligible
PROBE_DOUBT = 2.0  # times the error of so few samples, so that chance hides no weight
ENOUGH = 2_000  # samples of the average, at least
MOST_IN_JACKKNIFE = 1_000  # real images: the error of more is told by that of so many

Features = npt.NDArray[np.floating[Any]]


def shrinkage_of(formula: Formula, reference: Reference, average: Features, *, doubt: float = 1.0) -> Shrinkage:
    """How far the target of a distance is to be the average.

    Args:
        formula: ``fid`` or ``tones``.
        reference: the real images, with their features; at least two.
        average: ``[N, D]``, features of samples of the average; at least two.
        doubt: how many times the error of these samples is subtracted; with more than 1, weights are upper bounds.
    """
    if formula == TONES:
        return _of_tones(reference, average, doubt)
    real_mean, real_covariance, mean_error, covariance_error = _gaussian_and_errors(reference.known_features)
    mean, covariance, average_mean_error, average_covariance_error = _gaussian_and_errors(average)
    return Shrinkage(
        _weight(mean_error, _squared(real_mean - mean), doubt * average_mean_error),
        _weight(covariance_error, _squared(real_covariance - covariance), doubt * average_covariance_error),
        average=(mean, covariance),
    )


def _weight(error: float, squared_distance: float, error_of_average: float) -> float:
    """The best weight of the average, from 0 to 1."""
    distance = squared_distance - error_of_average
    if distance <= error:
        return 1.0
    return error / distance


def _squared(difference: Array) -> float:
    """The squared length of a vector, or the squared Frobenius norm of a matrix."""
    return float(np.square(difference).sum())


def _gaussian_and_errors(features: Features) -> tuple[Array, Array, float, float]:
    """Mean ``[D]``, covariance ``[D, D]``, and the expected squared error of each, of ``[n, D]``.

    Those are ``tr S / n`` and ``(mean |x − m|⁴ − |S|²) / n``.
    """
    count = len(features)
    mean = features.mean(axis=0, dtype=np.float64)
    deviations = features - mean
    covariance = deviations.T @ deviations / (count - 1)
    squares = np.square(deviations).sum(axis=1)
    covariance_error = (float(np.square(squares).mean()) - _squared(covariance)) / count
    return mean, covariance, float(np.trace(covariance)) / count, max(0.0, covariance_error)


def _of_tones(reference: Reference, average: Features, doubt: float) -> Shrinkage:
    """That of distributions on a line, whose quantiles are means of vectors: their distance is one of vectors."""
    real = torch.from_numpy(reference.known_features)
    quantiles = tones.quantiles_of(real)
    average_quantiles = tones.quantiles_of(torch.from_numpy(np.asarray(average, dtype=np.float32)))
    error_of_one = _error_of_quantiles(real)
    distance = float(tones.distance_of_sorted(average_quantiles, quantiles))
    # a sample of the average says about as much as a real image
    weight = _weight(error_of_one / len(real), distance, doubt * error_of_one / len(average))
    return Shrinkage(weight, average_quantiles=average_quantiles)


def _error_of_quantiles(real: torch.Tensor) -> float:
    """The expected squared error of the quantiles of ``[n, D]``, times n: by the jackknife, of at most 1,000 images."""
    some = real[:: math.ceil(len(real) / MOST_IN_JACKKNIFE)]
    quantiles = tones.quantiles_of(some)
    groups = min(GROUPS, len(some))  # of fewer images than groups, each is one
    labels = torch.from_numpy(group_of_each(len(some)))
    distances = [
        float(tones.distance_of_sorted(tones.interpolated(rest, tones.LEVELS), quantiles))
        for _, rest in zip(range(groups), tones.sorted_without_each_group(some, labels), strict=False)
    ]
    return len(some) * (groups - 1) / groups * sum(distances)
