"""Scores from the settings of a study file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lcsc_opt.base.errors import MetricError
from lcsc_opt.base.progress import notice
from lcsc_opt.metrics.extractors.by_name import find_extractor
from lcsc_opt.metrics.extractors.rewards import PUBLISHED, find_reward
from lcsc_opt.metrics.names import (
    DISTANCES,
    EXTRACTORS,
    OF_HELD_OUT,
    OF_REFERENCE_FEATURES,
    REWARD,
    MetricName,
)
from lcsc_opt.metrics.reference.building import ReferenceSetting, ReferenceSettings
from lcsc_opt.metrics.reference.reference import Reference
from lcsc_opt.metrics.scores import REPORTED, Scores

MOST_IMAGES = 100_000  # of a reference; with more, all distances take hours without a GPU, and much memory with one


class ScoresBuilder:
    """The metrics, references and weights that a study file names, checked without reading images or networks.

    By default, held-out reports compare with the features of the real images, if the reference has images, and have FID
    in the features of CLIP if the loss uses Inception, else in those of Inception. A search needs neither, and no user
    asked for them, so a notice says what is missing.

    Args:
        loss: a metric, or the weights of a sum of metrics.
        metrics: computed with the loss in every evaluation.
        held_out_metrics: computed only in held-out reports; ``None`` takes the default ones.
        keep: a metric that may not get worse than at EMA*.
        reference: a folder, a file or a dataset, for all extractors; or a mapping from extractors to these.
        weights: extractor → file; without one, published weights are downloaded if they are not there yet. Published
            rewards need their folder.
        rewards: ``reward`` and ``held_out_reward`` → their function; both are reported. With a reward in the loss, the
            default metrics are reported whatever ``held_out_metrics`` names.
        unguarded: allows a reward without a distance between distributions.

    Raises:
        MetricError: for an unknown metric or extractor, a missing reference, or a reward without a guard.
    """

    def __init__(
        self,
        *,
        loss: str | Mapping[str, float] = "fid",
        metrics: Sequence[str] = (),
        held_out_metrics: Sequence[str] | None = (),
        keep: str | None = None,
        reference: ReferenceSetting | None = None,
        weights: Mapping[str, str] | None = None,
        rewards: Mapping[str, str] | None = None,
        unguarded: bool = True,
    ) -> None:
        self._named: dict[str, Any] = {
            "loss": loss, "metrics": metrics, "held_out_metrics": held_out_metrics or (), "keep": keep
        }  # fmt: skip
        parsed = self._loss = MetricName.parse_loss(loss, unguarded=unguarded)
        self._rewards = dict(rewards or {})
        kept = () if keep is None else (MetricName.parse_kept(keep, parsed),)
        self._names = (*parsed, *MetricName.parse_all([*metrics, *(held_out_metrics or ())]), *kept)
        self._extractors = [*dict.fromkeys([name.extractor for name in self._names] + [*self._rewards])]
        searched = {name.extractor for name in parsed}
        self._only_reward = searched == {REWARD} and reference is not None
        # Inception, CLIP and DINOv2 suit the images if the loss uses one of them, or nothing but a reward
        suited = self._only_reward or bool(searched & {*EXTRACTORS})
        others = [name for name in EXTRACTORS if name not in searched] if suited else []
        named = any(name.extractor not in searched and name.formula in DISTANCES for name in self._names)
        self._default = held_out_metrics is None or REWARD in searched
        self._cross_check = others[0] if others and self._default and not named else None
        known = [*dict.fromkeys([*self._extractors, *others[: self._cross_check is not None]])]
        self._given, self._references = reference, ReferenceSettings.by_extractor(reference, known)
        for name in self._names:
            if name.needs_reference and name.extractor not in self._references:
                raise MetricError(
                    f"reference: is missing for {name.extractor}; give a folder of images, a file or a dataset"
                )
        for extractor in weights or ():
            if extractor not in PUBLISHED:
                MetricName.parse(f"fid@{extractor}")
            if extractor not in (*known, *self._rewards.values()):
                notice(f"weights: no metric uses {extractor}; its file is not read")
        self._weights = {extractor: Path(path).expanduser() for extractor, path in (weights or {}).items()}

    def check(self) -> None:
        """Raise MetricError if a reference, a file of weights or a factory is not there; nothing is read."""
        for settings in self._references.values():
            settings.check()
        for reward in self._rewards.values():
            find_reward(reward, weights=self._weights.get(reward))
        for extractor in dict.fromkeys([*self._extractors, *self._weights]):
            if extractor not in (*self._rewards, *PUBLISHED):
                find_extractor(extractor, weights=self._weights.get(extractor))

    def build(
        self,
        *,
        device: torch.device | str = "cpu",
        batch_size: int = 250,
        cache: Path,
    ) -> Scores:
        """Load the networks, and look at the reference images.

        Args:
            device: where networks run and distances are computed.
            batch_size: reference images through a network at once.
            cache: a folder for what is computed from the reference.

        Raises:
            MetricError: weights or a reference cannot be used.
        """
        place: dict[str, Any] = {"batch_size": batch_size, "cache": cache}
        references: dict[str, Reference] = {}
        for alias in self._extractors:
            if (reward := self._rewards.get(alias)) is not None:
                references[alias] = Reference(find_reward(reward, weights=self._weights.get(reward))(device))
                continue
            extractor = find_extractor(alias, weights=self._weights.get(alias))(device)
            named = [name for name in self._names if name.extractor == alias]
            formulas = {name.formula for name in named}
            if not any(name.needs_reference for name in named):
                references[alias] = Reference(extractor)
                continue
            held_out = bool(formulas & OF_HELD_OUT) or MetricName("fid", alias) in self._loss
            features = bool(formulas & OF_REFERENCE_FEATURES)
            settings = self._references[alias]
            references[alias] = settings.build(alias, extractor, features=features, held_out=held_out, **place)

        def for_reports() -> dict[str, Reference]:
            found = self._of_the_loss({alias: references[alias] for alias in scores.extractors}, place)
            return {**found, **self._of_other_features(device, place)}

        reports = for_reports if self._default else None
        scores = Scores(references, **self._named, device=device, report_references=reports)
        return scores

    def _of_the_loss(self, references: Mapping[str, Reference], place: Mapping[str, Any]) -> dict[str, Reference]:
        """The references of the loss with their features, and with the held-out images, if that does not take long."""
        found: dict[str, Reference] = {}
        for alias, known in references.items():
            if known.gaussian is None or (known.features is None and not self._references[alias].holds_images):
                continue
            if known.features is None and (known.count or 0) > MOST_IMAGES:
                notice(
                    f"{alias}: held-out reports have no {', '.join(REPORTED)}, since the reference has {known.count:,} "
                    f"images and more than {MOST_IMAGES:,} take long; name them in held_out_metrics all the same"
                )
                continue
            settings = self._references[alias]
            found[alias] = settings.build(alias, known.extractor, features=True, held_out=True, **place)
        return found

    def _of_other_features(self, device: torch.device | str, place: Mapping[str, Any]) -> dict[str, Reference]:
        """The reference of the cross-check; a line says why it cannot be had."""
        if (other := self._cross_check) is None:
            return {}
        try:
            own = isinstance(self._given, Mapping) and other in self._given  # it may hold numbers only
            images = [found for found in self._references.values() if found.holds_images] if not own else []
            settings = self._references[other] if own else next(iter(images), None)
            if settings is None:
                raise MetricError(
                    f"it needs reference images; give them under reference: {{{other}: a folder, a .zip, ...}}"
                )
            extractor = find_extractor(other, weights=self._weights.get(other))(device)
            return {other: settings.build(other, extractor, features=self._only_reward, held_out=True, **place)}
        except (MetricError, OSError, RuntimeError) as error:  # RuntimeError: out of the device's memory
            reason = str(error).partition("\n")[0]
            notice(
                f"no cross-check: {MetricName('fid', other)}, which would confirm a gain in features that the loss "
                f"does not use, is left out: {reason}. Name a metric in held_out_metrics of the study file, or none: []"
            )
            return {}
