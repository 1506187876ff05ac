"""MetricSuite from the settings of a study file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, JsonValue, model_validator

from lcsc_opt.base.errors import MetricError
from lcsc_opt.base.paths import given_path
from lcsc_opt.base.progress import notice
from lcsc_opt.base.settings import FrozenModel
from lcsc_opt.metrics.extractors.by_name import find_extractor
from lcsc_opt.metrics.extractors.rewards import PUBLISHED, find_reward
from lcsc_opt.metrics.names import (
    DISTANCES,
    EXTRACTORS,
    HELD_OUT_REWARD,
    OF_HELD_OUT,
    OF_REFERENCE_FEATURES,
    REWARD,
    MetricName,
)
from lcsc_opt.metrics.reference.building import ReferenceSettings
from lcsc_opt.metrics.reference.reference import Reference
from lcsc_opt.metrics.report_metrics import REPORTED
from lcsc_opt.metrics.suite import MetricSuite

MOST_IMAGES = 100_000  # of a reference; with more, all distances take hours without a GPU, and much memory with one


class ScoreSettings(FrozenModel):
    """What every objective over images may be told about its loss and its metrics.

    Attributes:
        loss: a metric, or metrics with their weights in a sum.
        metrics: reported with the loss in every evaluation.
        held_out_metrics: reported on noise other than the search's. The default is precision, recall, ``sliced`` and
            ``near`` if the reference is images, and FID in features that the loss does not see, if these are available.
        keep: ``precision`` or another metric of single images, which may not get worse than at EMA*, or than a bound:
            ``{precision: 0.7}``. It is in the features of the loss where it names no others.
        reward: ``module:function``, images [N, C, H, W] and perhaps prompts → scores [N]; or ``clip_score``,
            ``pickscore`` or ``hpsv2``, with their folder in ``weights``. It is the metric ``reward``. With it in the
            loss, the default metrics are reported whatever ``held_out_metrics`` names.
        held_out_reward: another one, which only held-out reports see.
        unguarded: allows a loss of a reward without a distance between distributions.
    """

    loss: str | dict[str, float] = "fid"
    metrics: list[str] = Field(default_factory=list)
    held_out_metrics: list[str] | None = None
    keep: str | dict[str, float] | None = None
    reward: str | None = None
    held_out_reward: str | None = None
    unguarded: bool = False

    @model_validator(mode="after")
    def _rewards_are_given(self) -> ScoreSettings:
        named = {*([self.loss] if isinstance(self.loss, str) else self.loss), *self.metrics}
        for name in {*named, *(self.held_out_metrics or ())} & {REWARD, HELD_OUT_REWARD} - {*self.rewards}:
            raise ValueError(f"{name} is a metric here, so give {name}: module:function, or {', '.join(PUBLISHED)}")
        return self

    @property
    def rewards(self) -> dict[str, str]:
        """``reward`` and ``held_out_reward`` → the function, of those that are given."""
        given = {REWARD: self.reward, HELD_OUT_REWARD: self.held_out_reward}
        return {name: function for name, function in given.items() if function is not None}

    def why_no_gradient(self) -> str | None:
        """Why there is no gradient, as far as that is known from the settings; ``None`` if there may be one."""
        return MetricName.why_no_gradient(MetricName.parse_loss(self.loss))


class ReferenceScoreSettings(ScoreSettings):
    """Also of real images, in the features of published networks or of a user's own.

    Attributes:
        reference: the real images, for all extractors or by extractor; the Inception Score needs none. ``train`` and
            ``held_out``, or ``held_out_fraction``, keep some of them for reports.
        weights: extractor → file of its weights; missing ones are downloaded. Published rewards need their folder.
    """

    reference: str | dict[str, JsonValue] | None = None
    weights: dict[str, str] = Field(default_factory=dict)


def _located(reference: str | dict[str, JsonValue]) -> str | dict[str, JsonValue]:
    """The reference with its paths resolved from the study file's folder. Other texts are names of data sets."""
    if isinstance(reference, str):
        path = given_path(reference)
        return str(path) if path.exists() else reference
    return {name: _located(value) if isinstance(value, (str, dict)) else value for name, value in reference.items()}


class ScoresBuilder:
    """The metrics, references and weights that settings name, checked without reading images or networks.

    By default, held-out reports compare with the features of the real images, if the reference has images, and have FID
    in the features of CLIP if the loss uses Inception, else in those of Inception. A search needs neither, and no user
    asked for them, so a notice says what is missing.

    Raises:
        MetricError: for an unknown metric or extractor, a missing reference, or a reward without a guard.
    """

    def __init__(self, settings: ReferenceScoreSettings) -> None:
        self._settings, self._rewards = settings, settings.rewards
        parsed = self._loss = MetricName.parse_loss(settings.loss, unguarded=settings.unguarded)
        kept = () if settings.keep is None else (MetricName.parse_kept(settings.keep, parsed),)
        others = [*settings.metrics, *(settings.held_out_metrics or ())]
        self._names = (*parsed, *MetricName.parse_all(others), *kept)
        self._extractors = [*dict.fromkeys([name.extractor for name in self._names] + [*self._rewards])]
        self._given = None if settings.reference is None else _located(settings.reference)
        searched = {name.extractor for name in parsed}
        self._only_reward = searched == {REWARD} and self._given is not None
        # Inception, CLIP and DINOv2 suit the images if the loss uses one of them, or nothing but a reward
        suited = self._only_reward or bool(searched & {*EXTRACTORS})
        others = [name for name in EXTRACTORS if name not in searched] if suited else []
        named = any(name.extractor not in searched and name.formula in DISTANCES for name in self._names)
        self._default = settings.held_out_metrics is None or REWARD in searched
        self._cross_check = others[0] if others and self._default and not named else None
        known = [*dict.fromkeys([*self._extractors, *others[: self._cross_check is not None]])]
        self._references = ReferenceSettings.by_extractor(self._given, known)
        for name in self._names:
            if name.needs_reference and name.extractor not in self._references:
                raise MetricError(
                    f"reference: is missing for {name.extractor}; give a folder of images, a file or a data set"
                )
        for extractor in settings.weights:
            if extractor not in PUBLISHED:
                MetricName.parse(f"fid@{extractor}")
        self._weights = {extractor: given_path(path) for extractor, path in settings.weights.items()}

    def check(self) -> None:
        """Raise MetricError if a reference, a file of weights or a factory is not there; nothing is read."""
        for settings in self._references.values():
            settings.check()
        for reward in self._rewards.values():
            find_reward(reward, weights=self._weights.get(reward))
        for extractor in dict.fromkeys([*self._extractors, *self._weights]):
            if extractor not in (*self._rewards, *PUBLISHED):
                find_extractor(extractor, weights=self._weights.get(extractor))

    def build(self, *, device: torch.device | str = "cpu", batch_size: int = 250, cache: Path) -> MetricSuite:
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

        scores = MetricSuite(
            references,
            loss=self._settings.loss,
            metrics=self._settings.metrics,
            held_out_metrics=self._settings.held_out_metrics or (),
            keep=self._settings.keep,
            device=device,
            report_references=for_reports if self._default else None,
        )
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
