"""Scores from the settings of a study file."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lcsc_opt.base.errors import MetricError
from lcsc_opt.base.progress import notice
from lcsc_opt.metrics.extractors.base import FeatureExtractor
from lcsc_opt.metrics.extractors.by_name import build_extractor, check_extractor
from lcsc_opt.metrics.judges import few_enough, known_features
from lcsc_opt.metrics.keeping import kept_metric
from lcsc_opt.metrics.loss import LossScale, View
from lcsc_opt.metrics.names import (
    OF_HELD_OUT,
    OF_REFERENCE_FEATURES,
    MetricName,
    check_extractor_name,
    parse_loss,
    parse_names,
)
from lcsc_opt.metrics.reference.building import (
    build_reference,
    check_reference,
    holds_images,
    references_by_extractor,
)
from lcsc_opt.metrics.reference.reference import Reference
from lcsc_opt.metrics.reference.split import ReferenceSetting
from lcsc_opt.metrics.scores import CrossCheckSpace, Scores


def build_scores(
    *,
    loss: str | Mapping[str, float] = "fid",
    metrics: Sequence[str] = (),
    held_out_metrics: Sequence[str] = (),
    keep: str | None = None,
    loss_scale: LossScale | None = None,
    reference: ReferenceSetting | None = None,
    weights: Mapping[str, str] | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 250,
    cache: Path,
    cross_check: CrossCheckSpace | None = None,
    judges: bool = False,
) -> Scores:
    """Scores from the settings of a study file; loads the networks and looks at the reference images.

    Args:
        loss: a metric, or the weights of a sum of metrics.
        metrics: computed beside the loss in every evaluation.
        held_out_metrics: computed only on noise that the search does not use.
        keep: a metric that may not get worse than at EMA*.
        loss_scale: ``trace`` divides each distance in the loss by the spread of the real images' features.
        reference: a folder, a file or a dataset, for all extractors; or a mapping from extractors to these.
        weights: extractor → file; without one, published weights are downloaded where they are not there yet.
        device: where networks run and distances are computed.
        batch_size: reference images through a network at once.
        cache: a folder for what is computed from the reference.
        cross_check: reported beside the held-out metrics; ``reference`` and ``weights`` may name its extractor, too.
        judges: whether held-out reports have the default judges, where the reference holds features.

    Raises MetricError for an unknown metric or extractor, or weights or a reference that cannot be used.
    """
    names = _named(loss, metrics, held_out_metrics, keep)
    files, references = _files(names, reference, weights or {}, cross_check)
    build = functools.partial(build_reference, batch_size=batch_size, cache=cache)
    views = {
        alias: _view(alias, names, build_extractor(alias, weights=files.get(alias), device=device), references, build)
        for alias in dict.fromkeys(name.extractor for name in names)
    }

    def judge_reference(alias: str, view: View) -> Reference | None:
        if view.reference is None:
            return None
        known = known_features(alias, view)
        if known is None and not (
            holds_images(references[alias]) and few_enough(alias, view.reference.statistics.count)
        ):
            return None
        return build(references[alias], alias, view.extractor, features=True, held_out=True)

    named: dict[str, Any] = {"loss": loss, "metrics": metrics, "held_out_metrics": held_out_metrics, "keep": keep}
    named["loss_scale"] = loss_scale
    found = judge_reference if judges else None
    return Scores(views, **named, device=device, cross_check=cross_check, judge_reference=found)


def _view(
    alias: str,
    names: Sequence[MetricName],
    extractor: FeatureExtractor,
    references: Mapping[str, ReferenceSetting],
    build: Callable[..., Reference],
) -> View:
    """An extractor, and of its reference what the metrics in its features need."""
    formulas = {name.formula for name in names if name.extractor == alias}
    if formulas == {"is"}:
        return View(extractor, None)
    needed = {"features": bool(formulas & OF_REFERENCE_FEATURES), "held_out": bool(formulas & OF_HELD_OUT)}
    return View(extractor, build(references[alias], alias, extractor, **needed))


def check_scores(
    *,
    loss: str | Mapping[str, float],
    metrics: Sequence[str],
    held_out_metrics: Sequence[str],
    keep: str | None,
    reference: ReferenceSetting | None,
    weights: Mapping[str, str],
    cross_check: CrossCheckSpace | None,
) -> None:
    """Refuse settings that :func:`build_scores` would refuse, without reading images or networks.

    Raises MetricError for an unknown metric or extractor, or a reference or weights that are not there.
    """
    names = _named(loss, metrics, held_out_metrics, keep)
    files, references = _files(names, reference, weights, cross_check)
    for setting in references.values():
        check_reference(setting)
    for extractor in dict.fromkeys([*(name.extractor for name in names), *files]):
        check_extractor(extractor, weights=files.get(extractor))


def _named(
    loss: str | Mapping[str, float], metrics: Sequence[str], held_out_metrics: Sequence[str], keep: str | None
) -> tuple[MetricName, ...]:
    """All metrics that settings name."""
    weights = parse_loss(loss)
    kept = () if keep is None else (kept_metric(keep, weights),)
    return (*weights, *parse_names(metrics), *parse_names(held_out_metrics), *kept)


def _files(
    names: Sequence[MetricName],
    reference: ReferenceSetting | None,
    weights: Mapping[str, str],
    cross_check: CrossCheckSpace | None,
) -> tuple[dict[str, Path], dict[str, ReferenceSetting]]:
    """Weights and references by extractor."""
    extractors = dict.fromkeys(name.extractor for name in names)
    known = list(dict.fromkeys([*extractors, *([] if cross_check is None else [cross_check.metric.extractor])]))
    references = references_by_extractor(reference, known)
    for name in names:
        if name.formula != "is" and name.extractor not in references:
            raise MetricError(
                f"reference: is missing for {name.extractor}; give a folder of images, a file or a dataset"
            )
    return _weights_by_extractor(weights, known), references


def _weights_by_extractor(weights: Mapping[str, str], extractors: Sequence[str]) -> dict[str, Path]:
    for name in weights:
        check_extractor_name(name)
        if name not in extractors:
            notice(f"weights: no metric uses {name}; its file is not read")
    return {name: Path(path).expanduser() for name, path in weights.items()}
