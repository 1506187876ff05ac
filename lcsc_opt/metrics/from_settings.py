"""Scores from the settings of a study file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lcsc_opt.base.errors import MetricError
from lcsc_opt.base.progress import notice
from lcsc_opt.metrics.extractors.by_name import build_extractor, check_extractor
from lcsc_opt.metrics.names import (
    DISTANCES,
    EXTRACTORS,
    OF_HELD_OUT,
    OF_REFERENCE_FEATURES,
    MetricName,
)
from lcsc_opt.metrics.reference.building import ReferenceSetting, ReferenceSettings
from lcsc_opt.metrics.reference.reference import Reference
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

    Raises:
        MetricError: for an unknown metric or extractor, or weights or a reference that cannot be used.
    """
    wanted = _Wanted(loss, metrics, held_out_metrics, keep, reference, weights or {})
    place: dict[str, Any] = {"batch_size": batch_size, "cache": cache}
    references = {alias: wanted.reference(alias, device=device, **place) for alias in wanted.extractors}

    def for_reports() -> dict[str, Reference]:
        found: dict[str, Reference] = {}
        for alias in scores.extractors:
            known = references[alias]
            if known.gaussian is None or (known.features is None and not wanted.references[alias].holds_images):
                continue
            if known.features is None and (known.count or 0) > MOST_IMAGES:
                notice(
                    f"{alias}: held-out reports have no {', '.join(REPORTED)}, since the reference has {known.count:,} "
                    f"images and more than {MOST_IMAGES:,} take long; name them in held_out_metrics all the same"
                )
                continue
            settings = wanted.references[alias]
            found[alias] = settings.build(alias, known.extractor, features=True, held_out=True, **place)
        if (other := wanted.cross_check) is not None:
            try:
                settings, extractor = wanted.images_for(other), wanted.extractor(other, device=device)
                found[other] = settings.build(other, extractor, features=False, held_out=True, **place)
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

    Raises:
        MetricError: for an unknown metric or extractor, or a reference or weights that are not there.
    """
    wanted = _Wanted(loss, metrics, held_out_metrics, keep, reference, weights)
    for settings in wanted.references.values():
        settings.check()
    for extractor in dict.fromkeys([*wanted.extractors, *wanted.weights]):
        check_extractor(extractor, weights=wanted.weights.get(extractor))


class _Wanted:
    """The metrics, references and weights that settings name.

    Attributes:
        extractors: of the metrics.
        cross_check: the published extractor for FID in other features than the loss's, if none is asked for and
            Inception, CLIP or DINOv2 suit the images, as the loss uses one of them.
        references: extractor → real images.
        weights: extractor → file.
    """

    def __init__(
        self,
        loss: str | Mapping[str, float],
        metrics: Sequence[str],
        held_out_metrics: Sequence[str] | None,
        keep: str | None,
        reference: ReferenceSetting | None,
        weights: Mapping[str, str],
    ) -> None:
        parsed = MetricName.parse_loss(loss)
        kept = () if keep is None else (MetricName.parse_kept(keep, parsed),)
        self._names = (*parsed, *MetricName.parse_all([*metrics, *(held_out_metrics or ())]), *kept)
        self.extractors = [*dict.fromkeys(name.extractor for name in self._names)]
        searched = {name.extractor for name in parsed}
        others = [name for name in EXTRACTORS if name not in searched] if searched & {*EXTRACTORS} else []
        named = any(name.extractor not in searched and name.formula in DISTANCES for name in self._names)
        self.cross_check = others[0] if others and held_out_metrics is None and not named else None
        known = [*dict.fromkeys([*self.extractors, *others[: self.cross_check is not None]])]
        self._given, self.references = reference, ReferenceSettings.by_extractor(reference, known)
        for name in self._names:
            if name.needs_reference and name.extractor not in self.references:
                raise MetricError(
                    f"reference: is missing for {name.extractor}; give a folder of images, a file or a dataset"
                )
        for extractor in weights:
            MetricName.parse(f"fid@{extractor}")
            if extractor not in known:
                notice(f"weights: no metric uses {extractor}; its file is not read")
        self.weights = {extractor: Path(path).expanduser() for extractor, path in weights.items()}

    def extractor(self, alias: str, *, device: torch.device | str) -> Any:
        """The network."""
        return build_extractor(alias, weights=self.weights.get(alias), device=device)

    def reference(self, alias: str, *, device: torch.device | str, batch_size: int, cache: Path) -> Reference:
        """What the metrics of one extractor compare with."""
        extractor = self.extractor(alias, device=device)
        formulas = {name.formula for name in self._names if name.extractor == alias}
        if formulas == {"is"}:
            return Reference(extractor)
        features, held_out = bool(formulas & OF_REFERENCE_FEATURES), bool(formulas & OF_HELD_OUT)
        options: dict[str, Any] = {"features": features, "held_out": held_out, "batch_size": batch_size, "cache": cache}
        return self.references[alias].build(alias, extractor, **options)

    def images_for(self, extractor: str) -> ReferenceSettings:
        """The reference of an extractor, which may hold numbers only; else the images of all or of another one.

        Raises:
            MetricError: there are none.
        """
        if isinstance(self._given, Mapping) and extractor in self._given:
            return self.references[extractor]
        for settings in self.references.values():
            if settings.holds_images:
                return settings
        raise MetricError(
            f"it needs reference images; give them under reference: {{{extractor}: a folder, a .zip, ...}}"
        )
