"""Scores from the settings of a study file."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from lcsc_opt.base.errors import MetricError
from lcsc_opt.base.progress import notice
from lcsc_opt.metrics.constraint import kept_metric
from lcsc_opt.metrics.extractors.by_name import build_extractor, check_extractor
from lcsc_opt.metrics.names import (
    DISTANCES,
    EXTRACTORS,
    OF_HELD_OUT,
    OF_REFERENCE_FEATURES,
    MetricName,
    check_extractor_name,
    parse_loss,
    parse_names,
)
from lcsc_opt.metrics.reference.building import build_reference
from lcsc_opt.metrics.reference.reference import Reference
from lcsc_opt.metrics.reference.setting import (
    ReferenceSetting,
    check_reference,
    dataset_settings,
    holds_images,
    is_split,
    references_by_extractor,
)
from lcsc_opt.metrics.scores import REPORTED, LossScale, Scores

MOST_IMAGES = 100_000  # of a reference; with more, all distances take hours without a GPU, and much memory with one


def build_scores(
    *,
    loss: str | Mapping[str, float] = "fid",
    metrics: Sequence[str] = (),
    held_out_metrics: Sequence[str] | None = (),
    keep: str | None = None,
    loss_scale: LossScale | None = None,
    reference: ReferenceSetting | None = None,
    weights: Mapping[str, str] | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 250,
    cache: Path,
) -> Scores:
    """Scores from the settings of a study file; loads the networks and looks at the reference images.

    By default, held-out reports compare with the features of the real images, if the reference has images, and have FID
    in the features of CLIP if the loss uses Inception, else in those of Inception. A search needs neither, and no user
    asked for them, so a notice says what is missing.

    Args:
        loss: a metric, or the weights of a sum of metrics.
        metrics: computed with the loss in every evaluation.
        held_out_metrics: computed only in held-out reports; ``None`` takes the default ones.
        keep: a metric that may not get worse than at EMA*.
        loss_scale: ``trace`` divides each distance in the loss by the spread of the real images' features.
        reference: a folder, a file or a dataset, for all extractors; or a mapping from extractors to these.
        weights: extractor → file; without one, published weights are downloaded if they are not there yet.
        device: where networks run and distances are computed.
        batch_size: reference images through a network at once.
        cache: a folder for what is computed from the reference.

    Raises MetricError for an unknown metric or extractor, or weights or a reference that cannot be used.
    """
    names = _names(loss, metrics, held_out_metrics, keep)
    files, settings = _files(names, loss, reference, weights or {}, held_out_metrics)
    build = functools.partial(build_reference, batch_size=batch_size, cache=cache)
    references = {}
    for alias in dict.fromkeys(name.extractor for name in names):
        extractor = build_extractor(alias, weights=files.get(alias), device=device)
        formulas = {name.formula for name in names if name.extractor == alias}
        if formulas == {"is"}:
            references[alias] = Reference(extractor)
            continue
        features, held_out = bool(formulas & OF_REFERENCE_FEATURES), bool(formulas & OF_HELD_OUT)
        references[alias] = build(settings[alias], alias, extractor, features=features, held_out=held_out)

    def for_reports() -> dict[str, Reference]:
        found: dict[str, Reference] = {}
        for alias in scores.extractors:
            known = references[alias]
            if known.gaussian is None:
                continue
            if known.features is not None or (holds_images(settings[alias]) and _few_enough(alias, known.count)):
                found[alias] = build(settings[alias], alias, known.extractor, features=True, held_out=True)
        if (other := _cross_check(names, loss)) is not None:
            try:
                if not set(scores.extractors) & set(EXTRACTORS):
                    own = min(scores.extractors)
                    raise MetricError(f"its features may not suit your images, since the loss uses your own, {own}")
                images = _images(reference, other)
                extractor = build_extractor(other, weights=files.get(other), device=device)
                found[other] = build(images, other, extractor, features=False, held_out=True)
            except (MetricError, OSError, RuntimeError) as error:  # RuntimeError: out of the device's memory
                reason = str(error).partition("\n")[0]
                notice(
                    f"no cross-check: {MetricName('fid', other)}, which would confirm a gain in features that the loss "
                    f"does not use, is left out: {reason}. Name a metric in held_out_metrics of the study file, or "
                    "none: []"
                )
        return found

    scores = Scores(
        references,
        loss=loss,
        metrics=metrics,
        held_out_metrics=held_out_metrics or (),
        keep=keep,
        loss_scale=loss_scale,
        device=device,
        report_references=for_reports if held_out_metrics is None else None,
    )
    return scores


def check_scores(
    *,
    loss: str | Mapping[str, float],
    metrics: Sequence[str],
    held_out_metrics: Sequence[str] | None,
    keep: str | None,
    reference: ReferenceSetting | None,
    weights: Mapping[str, str],
) -> None:
    """Refuse settings that :func:`build_scores` would refuse, without reading images or networks.

    Raises MetricError for an unknown metric or extractor, or a reference or weights that are not there.
    """
    names = _names(loss, metrics, held_out_metrics, keep)
    files, references = _files(names, loss, reference, weights, held_out_metrics)
    for setting in references.values():
        check_reference(setting)
    for extractor in dict.fromkeys([*(name.extractor for name in names), *files]):
        check_extractor(extractor, weights=files.get(extractor))


def _names(
    loss: str | Mapping[str, float], metrics: Sequence[str], held_out_metrics: Sequence[str] | None, keep: str | None
) -> tuple[MetricName, ...]:
    """All metrics that settings name."""
    weights = parse_loss(loss)
    kept = () if keep is None else (kept_metric(keep, weights),)
    return (*weights, *parse_names(metrics), *parse_names(held_out_metrics or ()), *kept)


def _files(
    names: Sequence[MetricName],
    loss: str | Mapping[str, float],
    reference: ReferenceSetting | None,
    weights: Mapping[str, str],
    held_out_metrics: Sequence[str] | None,
) -> tuple[dict[str, Path], dict[str, ReferenceSetting]]:
    """Weights and references by extractor; those of the cross-check may be among them."""
    cross_check = _cross_check(names, loss) if held_out_metrics is None else None
    known = list(dict.fromkeys([*(name.extractor for name in names), *([cross_check] if cross_check else [])]))
    references = references_by_extractor(reference, known)
    for name in names:
        if name.needs_reference and name.extractor not in references:
            raise MetricError(
                f"reference: is missing for {name.extractor}; give a folder of images, a file or a dataset"
            )
    for extractor in weights:
        check_extractor_name(extractor)
        if extractor not in known:
            notice(f"weights: no metric uses {extractor}; its file is not read")
    return {extractor: Path(path).expanduser() for extractor, path in weights.items()}, references


def _cross_check(names: Sequence[MetricName], loss: str | Mapping[str, float]) -> str | None:
    """The published extractor for FID in other features than the loss's; ``None`` if a metric is of such, or it uses
    all.
    """
    searched = {name.extractor for name in parse_loss(loss)}
    if any(name.extractor not in searched and name.formula in DISTANCES for name in names):
        return None
    return next((name for name in EXTRACTORS if name not in searched), None)


def _few_enough(alias: str, count: int | None) -> bool:
    """Whether reports can compare with so many reference images. If not, a line says so."""
    if count is None or count <= MOST_IMAGES:
        return True
    notice(
        f"{alias}: held-out reports have no {', '.join(REPORTED)}, since the reference has {count:,} images and more "
        f"than {MOST_IMAGES:,} take long; name them in held_out_metrics to compute them all the same"
    )
    return False


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
