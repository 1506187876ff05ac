"""Judges: the default metrics of held-out reports. They show what a search may lose while its loss falls.

Precision and recall tell fidelity and diversity apart, ``near`` measures single images, ``sliced`` is a distance other
than FID, and ``fdr`` is FID in all feature spaces as one number. Where real images are held out, there are also FID to
these, the share of samples that are nearer to an image of the reference than to any held-out one, and authenticity.
Judges need the features of the real images. A folder of images gives them; for a file of mean and covariance there are
no judges.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from lcsc_opt.base.progress import notice
from lcsc_opt.metrics.comparison import Comparison
from lcsc_opt.metrics.distances import NEIGHBOURHOOD
from lcsc_opt.metrics.frechet import FrechetReference
from lcsc_opt.metrics.loss import Loss, View
from lcsc_opt.metrics.names import Formula, MetricName
from lcsc_opt.metrics.reference.reference import Reference
from lcsc_opt.metrics.statistics import FeatureStatistics

DEFAULT: tuple[Formula, ...] = ("precision", "recall", "sliced", "near")
WITH_HELD_OUT: tuple[Formula, ...] = ("fid_held_out", "nearer_train", "authenticity")
FDR = "fdr"  # of all feature spaces together, so it has no extractor
FEWEST_SPLIT = 4  # images: a covariance of each half
MOST_IMAGES = 100_000  # of a reference; with more, all distances take hours without a GPU, and much memory with one

JudgeReference = Callable[[str, View], Reference | None]
"""An extractor's name and its view → the reference that judges compare with; ``None`` where there can be none."""


def known_features(_name: str, view: View) -> Reference | None:
    """The view's reference where it holds features, else None."""
    found = view.reference
    return None if found is None or found.all_features is None else found


def judges_in(name: str, reference: Reference) -> tuple[MetricName, ...]:
    """The default judges in the features of the extractor ``name``; none where there are three real images or fewer."""
    if len(reference.features) <= NEIGHBOURHOOD:
        return ()
    formulas = DEFAULT if reference.held_out is None else (*DEFAULT, *WITH_HELD_OUT)
    return tuple(MetricName(formula, name) for formula in formulas)


def floors(judges: Sequence[MetricName], views: Mapping[str, View], loss: Loss) -> dict[str, float]:
    """Judge → its value for held-out real images in place of samples: about that of a perfect model.

    Args:
        judges: names of metrics.
        views: by the extractor's name; those without held-out images, or with three or fewer, have no floor.
        loss: computes the metrics.
    """
    found: dict[str, float] = {}
    comparisons: dict[str, Comparison] = {}
    for judge in judges:
        reference = views[judge.extractor].reference
        if reference is None or reference.held_out is None or not judge.needs_reference:
            continue
        unseen = reference.held_out.features
        if len(unseen) <= NEIGHBOURHOOD:
            continue
        if judge.formula == "nearer_train":
            found[str(judge)] = len(reference.features) / (len(reference.features) + len(unseen))
            continue
        if judge.extractor not in comparisons:
            comparisons[judge.extractor] = loss.comparison(judge.extractor, unseen, None)
        # the distance between the two sets of real images, either way
        formula: Formula = "fid" if judge.formula == "fid_held_out" else judge.formula
        found[str(judge)] = float(comparisons[judge.extractor].compute(formula))
    return found


def split_distance(reference: Reference) -> float | None:
    """FID of real images to real images: of the held-out ones to the reference, else of its halves to each other.

    ``None`` where there are neither, or where it is zero.
    """
    if reference.held_out is not None:
        other = reference.held_out.statistics
        return reference.frechet.distance(other.mean, other.cov) or None
    if reference.all_features is None or len(reference.features) < FEWEST_SPLIT:
        return None
    one, other_half = (FeatureStatistics.from_features(reference.features[first::2]) for first in (0, 1))
    return FrechetReference(one.mean, one.covariance).distance(other_half.mean, other_half.covariance) or None


def frechet_ratio(distances: Mapping[str, float], splits: Mapping[str, float]) -> float:
    """FDr of FD-loss (arXiv 2604.28190): FID over that of real images, mean over feature spaces.

    Args:
        distances: extractor → FID of the samples.
        splits: extractor → :func:`split_distance`; the mean is over these.
    """
    return statistics.fmean(distances[name] / split for name, split in splits.items())


def few_enough(name: str, count: int | None) -> bool:
    """Whether judges can compare with this many reference images. Where they are too many, a line says so."""
    if count is None or count <= MOST_IMAGES:
        return True
    notice(
        f"{name}: no judges beside the loss, since the reference has {count:,} images and more than {MOST_IMAGES:,} "
        f"take long; name {', '.join(DEFAULT)} in held_out_metrics where they shall be computed all the same"
    )
    return False
