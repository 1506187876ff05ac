"""A cross-check for held-out reports: FID in the features of a published extractor that the loss does not use.

A search can lower FID by what one extractor alone sees. In other features such a gain does not show.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch

from lcsc_opt.base.errors import MetricError
from lcsc_opt.base.progress import notice
from lcsc_opt.metrics.extractors.by_name import build_extractor
from lcsc_opt.metrics.loss import View
from lcsc_opt.metrics.names import EXTRACTORS, MetricName, parse_loss
from lcsc_opt.metrics.reference.building import build_reference, dataset_settings, holds_images
from lcsc_opt.metrics.reference.split import ReferenceSetting, is_split
from lcsc_opt.metrics.scores import CrossCheckSpace, Scores


def published_cross_check(
    loss: str | Mapping[str, float],
    *,
    reference: ReferenceSetting | None,
    weights: Mapping[str, str] | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 250,
    cache: Path,
) -> CrossCheckSpace | None:
    """FID in the features of CLIP where the loss uses Inception, else in those of Inception.

    It is built when it is first needed, since a search needs neither its memory nor its weights. No user asked for it,
    so missing weights or reference images are no error: a notice says what is missing and how to get it, and there is
    no cross-check. The same holds where the loss uses only the user's own extractors, since a published one may not fit
    such images.

    Args:
        loss: a metric, or the weights of a sum of metrics.
        reference: for all extractors or by extractor; images that another extractor has are used, too.
        weights: extractor → file; without one, published weights are downloaded where they are missing.
        device: where the network runs.
        batch_size: reference images through the network at once.
        cache: a folder for what is computed from the reference.

    Returns:
        What builds it; None where the loss uses all published extractors.

    Raises:
        MetricError: for an unknown metric.
    """
    searched = {metric.extractor for metric in parse_loss(loss)}
    free = [name for name in EXTRACTORS if name not in searched]
    if not free:
        return None
    metric = MetricName("fid", free[0])
    file = (weights or {}).get(metric.extractor)

    def build() -> View | None:
        try:
            _check_published(searched)
            images = _images(reference, metric.extractor)
            path = None if file is None else Path(file).expanduser()
            extractor = build_extractor(metric.extractor, weights=path, device=device)
            how: dict[str, Any] = {"features": False, "held_out": True, "batch_size": batch_size, "cache": cache}
            seen = build_reference(images, metric.extractor, extractor, **how)
            view = View(extractor, seen)
            Scores({metric.extractor: view}, loss=str(metric))  # this checks that the two fit
        except (MetricError, OSError, RuntimeError) as error:  # RuntimeError: out of the device's memory
            notice(_left_out(metric, error))
            return None
        return view

    return CrossCheckSpace(metric, build)


def _check_published(searched: Set[str]) -> None:
    if not searched & set(EXTRACTORS):
        raise MetricError(f"its features may not suit your images, since the loss uses your own, {min(searched)}")


def _left_out(metric: MetricName, error: Exception) -> str:
    reason = str(error).partition("\n")[0]
    return (
        f"no cross-check: {metric}, which would confirm a gain in features that the loss does not use, is left out: "
        f"{reason}. Name a metric in held_out_metrics of the study file, or none: []"
    )


def _images(reference: ReferenceSetting | None, extractor: str) -> ReferenceSetting:
    """The reference of an extractor; else the images for all extractors, or those of another one.

    Raises:
        MetricError: there are none.
    """
    given: list[ReferenceSetting] = [] if reference is None else [reference]
    if isinstance(reference, Mapping) and dataset_settings(reference) is None and not is_split(reference):
        given = [*reference.values()]
        if extractor in reference:
            own: ReferenceSetting = reference[extractor]
            return own  # which may hold numbers only
    for setting in given:
        if holds_images(setting):
            return setting
    raise MetricError(f"it needs reference images; give them under reference: {{{extractor}: a folder, a .zip, ...}}")
