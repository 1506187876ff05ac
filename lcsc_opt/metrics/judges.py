"""Metrics of held-out reports that nobody has to ask for: what a search may lose while its loss falls.

Precision and recall tell fidelity and diversity apart, ``near`` looks at single images, and ``sliced`` is a distance
that is no FID. They need the features of the real images, which folders of images have and files of mean and covariance
do not; where there are none, there are no judges.
"""

from __future__ import annotations

from collections.abc import Callable

from lcsc_opt.base.progress import notice
from lcsc_opt.metrics.distances import NEIGHBOURHOOD
from lcsc_opt.metrics.loss import View
from lcsc_opt.metrics.names import Formula, MetricName
from lcsc_opt.metrics.reference.reference import Reference

DEFAULT: tuple[Formula, ...] = ("precision", "recall", "sliced", "near")
MOST_IMAGES = 100_000  # of a reference: distances between all of more take hours without a GPU, and memory with one

JudgeReference = Callable[[str, View], Reference | None]
"""An extractor's name and its view → the reference that judges compare with; ``None`` where there can be none."""


def known_features(_name: str, view: View) -> Reference | None:
    """The view's own reference, where it holds features."""
    found = view.reference
    return None if found is None or found.all_features is None else found


def judges_in(name: str, reference: Reference) -> tuple[MetricName, ...]:
    """The default judges in the features of the extractor ``name``; none for too many real images, or too few."""
    count = len(reference.features)
    if count <= NEIGHBOURHOOD:
        return ()
    return tuple(MetricName(formula, name) for formula in DEFAULT)


def few_enough(name: str, count: int | None) -> bool:
    """Whether so many reference images are no more than judges look at; a line says so where they are."""
    if count is None or count <= MOST_IMAGES:
        return True
    notice(
        f"{name}: no judges beside the loss, since the reference has {count:,} images and more than {MOST_IMAGES:,} "
        f"take long; name {', '.join(DEFAULT)} in held_out_metrics where they shall be computed all the same"
    )
    return False
