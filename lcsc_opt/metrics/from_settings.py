"""Builds a metric suite from the settings of a study file."""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, JsonValue, model_validator
from torch import Tensor

from lcsc_opt.base.errors import MetricError
from lcsc_opt.base.paths import BuildContext
from lcsc_opt.base.progress import notice
from lcsc_opt.base.settings import FrozenModel
from lcsc_opt.metrics.extractors.base import FeatureExtractor
from lcsc_opt.metrics.extractors.by_name import find_extractor
from lcsc_opt.metrics.extractors.pixels import Thumbnails, pixel_reference
from lcsc_opt.metrics.extractors.rewards import find_reward
from lcsc_opt.metrics.extractors.second import SecondFeatures
from lcsc_opt.metrics.loss import LossSetting, in_features_of, parse_kept, parse_loss
from lcsc_opt.metrics.names import (
    BIASED,
    CROSS_CHECK,
    DISTANCES,
    EXTRACTORS,
    FDR,
    FID_HELD_OUT,
    HELD_OUT_REWARD,
    PIXELS,
    REWARD,
    THUMBNAILS,
    TRAINED,
    WITHOUT_NETWORK,
    MetricName,
    need_real_features,
)
from lcsc_opt.metrics.reference.building import ReferenceSettings
from lcsc_opt.metrics.reference.reference import Reference
from lcsc_opt.metrics.report_metrics import REPORTED
from lcsc_opt.metrics.suite import MetricSuite

MOST_IMAGES = 100_000  # of a reference: distances to more take hours without a GPU, and much memory with one


class ScoreSettings(FrozenModel):
    """The settings of the loss and the metrics that all objectives over images have.

    Attributes:
        loss: a metric, the metrics of a weighted sum with their weights, or ``fdr``: the mean of FID in the features
            of a network, FID in pixels, and tones, each relative to that of an average of the checkpoints.
            ``fdr@clip`` uses another network, ``{fdr: [inception, dinov2, pixels]}`` these representations.
        metrics: metrics that are reported with the loss in every evaluation.
        held_out_metrics: metrics that are reported on held-out noise. The default is precision and recall if the
            reference is images. FID in features that the loss does not see is added to every list that is not empty,
            and the share of values outside [−1, 1] to all.
        keep: ``precision`` or another metric of single images, which may not get worse than at EMA*, or than a bound:
            ``{precision: 0.7}``. Without ``@extractor`` it is in the features of the loss.
        reward: ``module:function``, images [N, C, H, W] and perhaps prompts → scores [N]. It is the metric ``reward``.
            If the loss contains it, reports have the default metrics in addition to ``held_out_metrics``.
        held_out_reward: another reward, which only held-out reports use.
        unguarded: whether the loss may be a reward without a distance between distributions.
    """

    loss: str | dict[str, float | list[str]] = "fdr"
    metrics: list[str] = Field(default_factory=list)
    held_out_metrics: list[str] | None = None
    keep: str | dict[str, float] | None = None
    reward: str | None = None
    held_out_reward: str | None = None
    unguarded: bool = False

    @model_validator(mode="after")
    def _rewards_are_given(self) -> ScoreSettings:
        loss_metrics = [self.loss] if isinstance(self.loss, str) else list(self.loss)
        named_metrics = {*loss_metrics, *self.metrics, *(self.held_out_metrics or ())}
        for name in (REWARD, HELD_OUT_REWARD):
            if name in named_metrics and name not in self.rewards:
                raise ValueError(f"{name} is a metric here, so give {name}: module:function")
        return self

    @property
    def rewards(self) -> dict[str, str]:
        """``reward`` and ``held_out_reward`` → their functions, without those that are not set."""
        functions = {REWARD: self.reward, HELD_OUT_REWARD: self.held_out_reward}
        return {name: function for name, function in functions.items() if function is not None}

    @property
    def adds_default_metrics(self) -> bool:
        """Whether held-out reports have the default metrics: none are named, or a reward is searched."""
        searches_reward = any(metric.extractor == REWARD for metric in parse_loss(self.loss))
        return self.held_out_metrics is None or searches_reward

    @property
    def adds_cross_check(self) -> bool:
        """Whether held-out reports have FID in features that the loss does not see: always, unless none are wanted."""
        return self.adds_default_metrics or bool(self.held_out_metrics)


class ReferenceScoreSettings(ScoreSettings):
    """The settings of objectives that compare with real images, in the features of networks.

    Attributes:
        reference: the real images, for all extractors or by extractor; the Inception Score needs none. With ``train``
            and ``held_out``, or ``held_out_fraction``, some of them are used only in reports.
        weights: extractor → file of its weights; missing ones are downloaded.
    """

    reference: str | dict[str, JsonValue] | None = None
    weights: dict[str, str] = Field(default_factory=dict)


def _resolve_paths(reference: str | dict[str, JsonValue], context: BuildContext) -> str | dict[str, JsonValue]:
    """The reference with its paths resolved by ``context``; names of data sets stay as they are."""
    if isinstance(reference, str):
        path = context.path(reference)
        return str(path) if path.exists() else reference
    resolved: dict[str, JsonValue] = {}
    for name, value in reference.items():
        resolved[name] = _resolve_paths(value, context) if isinstance(value, (str, dict)) else value
    return resolved


class MetricSuiteBuilder:
    """The metrics, references and weights that settings name, checked without reading images or networks.

    By default, held-out reports have precision, recall and the like if the reference has images, and a cross-check: FID
    in features that the loss does not use. These are CLIP's if the loss uses Inception's, the second network of bundled
    images, and bundled or random ones (:class:`~lcsc_opt.metrics.extractors.second.SecondFeatures`) where neither can
    be had. The search needs none of this, so a notice in place of an error says what is unavailable.

    Args:
        settings: of the study file.
        context: finds the files that they name.

    Raises:
        MetricError: an unknown metric or extractor, a missing reference, or a reward alone as the loss.
    """

    def __init__(self, settings: ReferenceScoreSettings, context: BuildContext) -> None:
        self._settings = settings
        self._rewards = settings.rewards
        self._reference: str | dict[str, JsonValue] | None = None
        if settings.reference is not None:
            self._reference = _resolve_paths(settings.reference, context)
        self._loss_setting = self._loss_of_reference(settings.loss)
        self._loss = parse_loss(self._loss_setting, unguarded=settings.unguarded)
        reported = MetricName.parse_all(in_features_of(self._loss, settings.held_out_metrics or ()))
        searched = MetricName.parse_all(in_features_of(self._loss, settings.metrics))
        metrics = [*self._loss, *searched, *reported]
        if settings.keep is not None:
            metrics.append(parse_kept(settings.keep, self._loss))
        self._metrics = tuple(metrics)
        extractors = [metric.extractor for metric in metrics] + list(self._rewards)
        self._extractors = list(dict.fromkeys(extractors))

        loss_extractors = {metric.extractor for metric in self._loss}
        self._searches_reward = REWARD in loss_extractors
        self._only_reward_with_reference = loss_extractors == {REWARD} and self._reference is not None
        self._adds_defaults = settings.adds_default_metrics
        self._cross_check: str | None = None
        if settings.adds_cross_check:
            self._cross_check = self._cross_check_extractor(loss_extractors)

        compared_extractors = list(self._extractors)
        if self._cross_check is not None and self._cross_check not in compared_extractors:
            compared_extractors.append(self._cross_check)
        self._references = ReferenceSettings.by_extractor(self._reference, compared_extractors)
        for name in WITHOUT_NETWORK:
            if self._references and name in self._extractors and name not in self._references:
                self._references[name] = self._image_settings(name)
        for metric in self._metrics:
            if metric.needs_reference and metric.extractor not in self._references:
                raise MetricError(
                    f"reference: is missing for {metric.extractor}; give a folder of images, a file or a data set"
                )
        for extractor in settings.weights:
            MetricName.parse(f"fid@{extractor}")  # raises if there is no such extractor
        self._weights = {extractor: context.path(path) for extractor, path in settings.weights.items()}

    def _cross_check_extractor(self, loss_extractors: Set[str]) -> str | None:
        """The extractor of the default cross-check; ``None`` if the settings name one, or there are no real images."""
        for metric in self._metrics:
            if metric.extractor not in loss_extractors and metric.formula in DISTANCES:
                return None
        if self._reference is None:
            return None
        for name in TRAINED:
            if name in loss_extractors and f"{name}2" not in loss_extractors:
                return f"{name}2"
        # these networks see natural images: they suit only if the loss uses one of them, or is a reward alone
        if self._only_reward_with_reference or not loss_extractors.isdisjoint(EXTRACTORS):
            for name in EXTRACTORS:
                if name not in loss_extractors:
                    return name
        return CROSS_CHECK

    def _loss_of_reference(self, loss: LossSetting) -> LossSetting:
        """The loss; of a plain ``fdr`` only the network where the reference has no images."""
        if not isinstance(loss, str) or loss.partition("@")[0] != FDR or self._reference is None:
            return loss
        network = next(iter(parse_loss(loss)))
        if network.extractor in WITHOUT_NETWORK:
            return loss
        settings = ReferenceSettings.by_extractor(self._reference, [PIXELS, network.extractor, *EXTRACTORS])
        if any(one.holds_images for one in settings.values()):
            return loss
        notice(
            "loss: the reference has statistics and no images, so fdr compares features of the network only; give the "
            "images, so that a search does not gain by what clipping hides"
        )
        return {FDR: [network.extractor]}

    def check(self) -> None:
        """Raise MetricError if a reference, a file of weights or a factory is missing; nothing is read."""
        for settings in self._references.values():
            settings.check()
        for reward in self._rewards.values():
            find_reward(reward)
        for extractor in dict.fromkeys([*self._extractors, *self._weights]):
            if extractor not in self._rewards:
                find_extractor(extractor, weights=self._weights.get(extractor))

    def real_images(self, count: int, *, folder: Path) -> Tensor | None:
        """At most ``count`` real images ``[B, C, H, W]`` in [-1, 1]; ``None`` if the reference has no images.

        Raises:
            MetricError: they cannot be read.
        """
        for settings in self._references.values():
            if settings.holds_images:
                return settings.images(folder).evenly_spaced(count)
        return None

    def build(self, *, device: torch.device | str = "cpu", batch_size: int = 250, folder: Path) -> MetricSuite:
        """Load the networks, and read the reference images.

        Args:
            device: where networks run and distances are computed.
            batch_size: reference images that pass through a network at once.
            folder: for the statistics and features of the reference.

        Raises:
            MetricError: weights or a reference cannot be used.
        """
        references: dict[str, Reference] = {}
        for name in self._extractors:
            references[name] = self._reference_of(name, device, batch_size, folder)

        def report_references() -> dict[str, Reference]:
            loss_references = {name: references[name] for name in suite.extractors}
            built: dict[str, Reference] = {}
            if self._adds_defaults:
                built |= self._loss_references_with_features(loss_references, batch_size, folder)
            return built | self._cross_check_reference(device, batch_size, folder)

        suite = MetricSuite(
            references,
            loss=self._loss_setting,
            metrics=self._settings.metrics,
            held_out_metrics=self._settings.held_out_metrics or (),
            keep=self._settings.keep,
            device=device,
            report_references=report_references if self._settings.adds_cross_check else None,
        )
        return suite

    def _reference_of(
        self,
        name: str,
        device: torch.device | str,
        batch_size: int,
        folder: Path,
    ) -> Reference:
        """The reference of an extractor or reward that the settings name, with only what their metrics need."""
        reward = self._rewards.get(name)
        if reward is not None:
            return Reference(find_reward(reward))
        extractor = find_extractor(name, weights=self._weights.get(name))(device)
        metrics = [metric for metric in self._metrics if metric.extractor == name]
        if not any(metric.needs_reference for metric in metrics):
            return Reference(extractor)
        formulas = {metric.formula for metric in metrics}
        compared_unseen = any(metric in self._loss for metric in metrics if metric.formula in BIASED)
        return self._built(
            self._references[name],
            name,
            extractor,
            features=need_real_features(formulas),
            held_out=FID_HELD_OUT in formulas or compared_unseen,
            batch_size=batch_size,
            folder=folder,
        )

    def _built(
        self,
        settings: ReferenceSettings,
        name: str,
        extractor: FeatureExtractor,
        **needs: Any,
    ) -> Reference:
        """The reference in the features of ``extractor``; in ``pixels`` in components of the real images."""
        if name != PIXELS:
            return settings.build(name, extractor, **needs)
        return pixel_reference(settings.build(THUMBNAILS, Thumbnails(), **needs))

    def _loss_references_with_features(
        self, references: Mapping[str, Reference], batch_size: int, folder: Path
    ) -> dict[str, Reference]:
        """The references of the loss with all features and the held-out images, for the default metrics of a report.

        A reference without images, or with too many, is left out.
        """
        complete: dict[str, Reference] = {}
        for name, reference in references.items():
            if reference.gaussian is None:
                continue
            settings = self._references[name]
            if reference.features is None:
                if not settings.holds_images:
                    continue
                count = reference.count or 0
                if count > MOST_IMAGES:
                    _notice_too_many(name, count)
                    continue
            complete[name] = self._built(
                settings,
                name,
                reference.extractor,
                features=True,
                held_out=True,
                batch_size=batch_size,
                folder=folder,
            )
        return complete

    def _cross_check_reference(self, device: torch.device | str, batch_size: int, folder: Path) -> dict[str, Reference]:
        """The reference of the cross-check; a notice says why it is unavailable."""
        name = self._cross_check
        if name is None:
            return {}
        try:
            reference = self._built_cross_check(name, device, batch_size, folder)
        except (MetricError, OSError, RuntimeError) as error:  # RuntimeError: out of the device's memory
            reason = str(error).partition("\n")[0]
            missing = f"{MetricName('fid', name)}, which would confirm a gain in features that the loss does not use"
            if not any(settings.holds_images for settings in self._references.values()):
                notice(f"no cross-check: {missing}, is not measured: {reason}. {self._advice_on_cross_check()}")
                return {}
            name = CROSS_CHECK
            notice(f"cross-check: {missing}, is not measured: {reason}. {MetricName('fid', name)} takes its place")
            reference = self._built_cross_check(name, device, batch_size, folder)
        if self._only_reward_with_reference and reference.features is None:
            _notice_too_many(name, reference.count or 0)
        return {name: reference}

    def _built_cross_check(self, name: str, device: torch.device | str, batch_size: int, folder: Path) -> Reference:
        """The reference of one cross-check. Raises MetricError and what reading files and networks raises."""
        settings = self._image_settings(name)
        extractor: FeatureExtractor
        if name == CROSS_CHECK:
            extractor = SecondFeatures(device)
        else:
            extractor = find_extractor(name, weights=self._weights.get(name))(device)
        return self._built(
            settings,
            name,
            extractor,
            # beside a reward alone, the other metrics of reports are in these features
            features=self._only_reward_with_reference,
            features_of_at_most=MOST_IMAGES,
            held_out=True,
            batch_size=batch_size,
            folder=folder,
        )

    def _advice_on_cross_check(self) -> str:
        """How a study file has another cross-check, or none, without this notice."""
        if self._searches_reward:  # then reports have it whatever other metrics are named
            return "Name a distance in other features in held_out_metrics of the study file, such as fid@pixels"
        return "Name a metric in held_out_metrics of the study file, or none: []"

    def _image_settings(self, name: str) -> ReferenceSettings:
        """The real images for what may have no reference of its own: ``pixels``, ``tones``, or the cross-check.

        Its own reference if that is images, not statistics; else the first reference that is.
        """
        if name in self._references and self._references[name].holds_images:
            return self._references[name]
        for settings in self._references.values():
            if settings.holds_images:
                return settings
        raise MetricError(f"{name} needs real images; give them under reference: {{{name}: a folder, a .zip, ...}}")


def _notice_too_many(name: str, count: int) -> None:
    notice(
        f"{name}: held-out reports have no {', '.join(REPORTED)}, since the reference has {count:,} images and more "
        f"than {MOST_IMAGES:,} take long; to compute them all the same, name them in held_out_metrics"
    )
