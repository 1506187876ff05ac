"""The settings of a study file about metrics, and the metric suite that is built from them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import torch
from pydantic import Field, JsonValue
from torch import Tensor

from lcsc_opt.base.errors import MetricError, MissingPackageError
from lcsc_opt.base.paths import BuildContext
from lcsc_opt.base.progress import notice
from lcsc_opt.base.settings import FrozenModel
from lcsc_opt.metrics.extractors.base import FeatureExtractor
from lcsc_opt.metrics.extractors.by_name import find_extractor
from lcsc_opt.metrics.extractors.named_rewards import NamedReward, find_reward
from lcsc_opt.metrics.extractors.pixels import Thumbnails, pixel_reference
from lcsc_opt.metrics.extractors.second import SecondFeatures
from lcsc_opt.metrics.loss import Loss
from lcsc_opt.metrics.names import (
    CROSS_CHECK,
    FDR,
    FID_HELD_OUT,
    HELD_OUT_REWARD,
    PIXELS,
    REWARD,
    THUMBNAILS,
    TO_HELD_OUT,
    WITHOUT_NETWORK,
    MetricName,
    need_real_features,
)
from lcsc_opt.metrics.reference.building import ImageSets, ReferenceSettings
from lcsc_opt.metrics.reference.reference import Reference
from lcsc_opt.metrics.suite import REPORTED, MetricSuite
from lcsc_opt.metrics.suite_metrics import SuiteMetrics

MOST_IMAGES = 100_000  # of a reference: distances to more take hours without a GPU, and much memory with one


class ScoreSettings(FrozenModel):
    """The settings of the loss and the metrics that all objectives over images have.

    Attributes:
        loss: a metric, the metrics of a weighted sum with their weights, each in units of its value for an average of
            the checkpoints, or ``fdr``: the mean of FID in the features
            of a network, FID in pixels, and tones, each relative to that of an average of the checkpoints.
            ``fdr@clip`` uses another network, ``{fdr: [inception, dinov2, pixels]}`` these representations,
            ``{fdr: 1, reward: -1}`` has a reward beside it.
        metrics: metrics that are reported with the loss in every evaluation.
        held_out_metrics: metrics that are reported on held-out noise. The default is precision and recall if the
            reference is images. FID in features that the loss does not see is added to every list that is not empty,
            and how much clipping to [−1, 1] changes an image to all.
        keep: ``precision`` or another metric of single images, which may not get worse than at EMA*, or than a bound:
            ``{precision: 0.7}``. Without ``@extractor`` it is in the features of the loss.
        reward: ``module:function``, images [N, C, H, W] and perhaps prompts → scores [N]; or a network by name, with
            its weights, as ``{clip: FOLDER}`` (:class:`NamedReward`). It is the metric ``reward``.
            If the loss contains it, reports have the default metrics in addition to ``held_out_metrics``.
        held_out_reward: another reward, which only held-out reports use.
    """

    loss: str | dict[str, float | list[str]] = "fdr"
    metrics: list[str] = Field(default_factory=list)
    held_out_metrics: list[str] | None = None
    keep: str | dict[str, float] | None = None
    reward: str | NamedReward | None = None
    held_out_reward: str | NamedReward | None = None

    @property
    def rewards(self) -> dict[str, str | NamedReward]:
        """``reward`` and ``held_out_reward`` → their functions or networks, without those that are not set."""
        functions = {REWARD: self.reward, HELD_OUT_REWARD: self.held_out_reward}
        return {name: function for name, function in functions.items() if function is not None}

    def parsed_loss(self) -> Loss:
        """The loss, with the metric that is kept. Raises MetricError as :meth:`Loss.parse`."""
        return Loss.parse(self.loss, self.keep)

    def suite_metrics(self, loss: Loss) -> SuiteMetrics:
        """The metrics of searches and reports beside this loss. Raises MetricError as :meth:`SuiteMetrics.of`."""
        return SuiteMetrics.of(
            loss,
            metrics=self.metrics,
            held_out_metrics=self.held_out_metrics,
            rewards=self.rewards,
        )


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
    """The setting ``reference`` with its paths resolved by ``context``, also those in a mapping by extractor.

    Names of data sets and numbers stay as they are.
    """
    if isinstance(reference, str):
        path = context.path(reference)
        if path.exists():
            return str(path)
        return reference
    resolved: dict[str, JsonValue] = {}
    for name, value in reference.items():
        resolved[name] = _resolve_paths(value, context) if isinstance(value, (str, dict)) else value
    return resolved


def _without_images(loss: Loss, reference: str | dict[str, JsonValue]) -> Loss:
    """The loss; where the reference has no images, ``fdr`` of its network only, since pixels and tones need images.

    Args:
        loss: one whose settings list no representations: these are meant.
        reference: the setting, with its paths resolved.
    """
    if not loss.of_fdr or loss.of_fdr[0].extractor in WITHOUT_NETWORK:
        return loss
    of_network = loss.of_fdr[0]
    # any name in a mapping is taken here: which it may have is checked when all metrics are known
    names = [of_network.extractor] if isinstance(reference, str) else list(reference)
    settings = ReferenceSettings.by_extractor(reference, names)
    if any(source.holds_images for source in settings.values()):
        return loss
    notice(
        "loss: the reference has statistics and no images, so fdr compares features of the network only; give the "
        "images, so that a search does not gain by what clipping hides"
    )
    others = {metric: weight for metric, weight in loss.weights.items() if metric not in loss.of_fdr}
    weight = math.fsum(loss.weights[metric] for metric in loss.of_fdr)
    return dataclasses.replace(loss, weights={of_network: weight, **others}, of_fdr=(of_network,))


class ScoreSources:
    """The extractors and real images that settings name: found and checked, and read when the suite is made of them.

    By default, held-out reports have precision, recall and the like if the reference has images, and a cross-check: FID
    in features that the loss does not use. These are CLIP's if the loss uses Inception's, the second network of bundled
    images, and bundled or random ones (:class:`~lcsc_opt.metrics.extractors.second.SecondFeatures`) where neither can
    be had. The search needs none of this, so a notice in place of an error says what is unavailable.

    Args:
        settings: of the study file.
        context: finds the files that they name; statistics and features of the reference are kept in its folder.
        device: where networks run and distances are computed.
        batch_size: reference images that pass through a network at once.

    Attributes:
        metrics: those of searches and reports.

    Raises:
        MetricError: an unknown metric or extractor, a missing reference, or a reward alone as the loss.
    """

    def __init__(
        self,
        settings: ReferenceScoreSettings,
        context: BuildContext,
        *,
        device: torch.device | str = "cpu",
        batch_size: int = 250,
    ) -> None:
        self._rewards = settings.rewards
        self._find_reward = functools.partial(find_reward, place=context.path)
        self._device = device
        self._batch_size = batch_size
        self._sets = ImageSets(context.files)
        reference = None
        if settings.reference is not None:
            reference = _resolve_paths(settings.reference, context)
        loss = settings.parsed_loss()
        lists_representations = isinstance(settings.loss, dict) and isinstance(settings.loss.get(FDR), list)
        if not lists_representations and reference is not None:
            loss = _without_images(loss, reference)
        self.metrics = settings.suite_metrics(loss)
        self._extractors = tuple(dict.fromkeys(metric.extractor for metric in self.metrics.reported))
        self._cross_check = None if reference is None else self.metrics.default_cross_check

        compared_extractors = list(self._extractors)
        if self._cross_check is not None and self._cross_check not in compared_extractors:
            compared_extractors.append(self._cross_check)
        self._references = ReferenceSettings.by_extractor(reference, compared_extractors)
        for name in WITHOUT_NETWORK:  # they take the images of another extractor, where they have none of their own
            if self._references and name in self._extractors and name not in self._references:
                self._references[name] = self._image_settings(name)
        for metric in self.metrics.reported:
            if metric.needs_reference and metric.extractor not in self._references:
                raise MetricError(
                    f"reference: is missing for {metric.extractor}; give a folder of images, a file or a data set"
                )
        for extractor in settings.weights:
            MetricName.parse(f"fid@{extractor}")  # raises if there is no such extractor
        self._weights = {extractor: context.path(path) for extractor, path in settings.weights.items()}

    def check(self) -> None:
        """Raise MetricError if a reference, a file of weights or a factory is missing; nothing is read."""
        for settings in self._references.values():
            settings.check()
        for extractor in dict.fromkeys([*self._extractors, *self._weights]):
            self._found(extractor)

    def real_images(self, count: int) -> Tensor | None:
        """At most ``count`` real images ``[B, C, H, W]`` in [-1, 1]; ``None`` if the reference has no images.

        Raises:
            MetricError: they cannot be read.
        """
        for settings in self._references.values():
            if settings.holds_images:
                return settings.images(self._sets).evenly_spaced(count)
        return None

    def suite(self) -> MetricSuite:
        """Load the networks, and read the real images that a search needs; what only reports need is read later.

        Raises:
            MetricError: weights or a reference cannot be used.
        """
        references = {name: self._reference(name) for name in self._extractors}

        def report_references() -> dict[str, Reference]:
            built: dict[str, Reference] = {}
            if self.metrics.adds_defaults:
                built |= self._loss_references_with_features(references)
            return built | self._cross_check_reference()

        return MetricSuite(
            references,
            self.metrics,
            device=self._device,
            report_references=report_references,
            real_images=self.real_images,
        )

    def _found(self, name: str) -> Callable[[], FeatureExtractor]:
        """What makes the extractor, or returns the reward, of this name. It is not made yet, so that a check is fast.

        Raises MetricError if it is missing.
        """
        if name in self._rewards:
            load_reward = self._find_reward(self._rewards[name])
            return lambda: load_reward(self._device)
        make = find_extractor(name, weights=self._weights.get(name))
        return lambda: make(self._device)

    def _reference(self, name: str) -> Reference:
        """The reference of an extractor or reward that the settings name, with only what their metrics need."""
        extractor = self._found(name)()
        metrics = [metric for metric in self.metrics.reported if metric.extractor == name]
        if not any(metric.needs_reference for metric in metrics):
            return Reference(extractor)
        settings = self._references[name]
        formulas = {metric.formula for metric in metrics}
        # a distance of the loss is also measured to real images that the loss does not see
        terms = [metric for metric in metrics if metric in self.metrics.loss.weights]
        compared_unseen = any(metric.formula in TO_HELD_OUT for metric in terms)
        is_set_of_images = settings.is_set_of_images(MOST_IMAGES, self._sets)
        built = self._built(
            settings,
            name,
            extractor,
            # the errors of distances count the real images, and need their features, unless they are too many
            features=need_real_features(formulas) or is_set_of_images,
            held_out=FID_HELD_OUT in formulas or compared_unseen,
        )
        # of others features are known only where a metric needs them, and no reported metric may change the loss
        return dataclasses.replace(built, may_be_shrunk=is_set_of_images)

    def _built(
        self, settings: ReferenceSettings, name: str, extractor: FeatureExtractor, *, features: bool, held_out: bool
    ) -> Reference:
        """The reference in the features of ``extractor``; the options are those of :meth:`ReferenceSettings.build`.

        For ``pixels``, another extractor takes the place of the given one: the principal components of the real images.
        """
        build = functools.partial(
            settings.build, features=features, held_out=held_out, batch_size=self._batch_size, sets=self._sets
        )
        if name == PIXELS:
            return pixel_reference(build(THUMBNAILS, Thumbnails()))
        return build(name, extractor)

    def _loss_references_with_features(self, references: Mapping[str, Reference]) -> dict[str, Reference]:
        """The references of the loss with all features and the held-out images, for the default metrics of a report.

        One without images, or with too many, is left out, unless others are held out; features that the search has
        already are read again.
        """
        complete: dict[str, Reference] = {}
        for name in self.metrics.loss.extractors:
            reference = references[name]
            if reference.gaussian is None:
                continue
            settings = self._references[name]
            if reference.features is None:
                if reference.held_out is not None:  # FID to these needs no features of the others
                    complete[name] = reference
                if not settings.holds_images:
                    continue
                count = reference.count or 0
                if count > MOST_IMAGES:
                    notice(
                        f"{name}: held-out reports have no {', '.join(REPORTED)}, since the reference has {count:,} "
                        f"images and more than {MOST_IMAGES:,} take long; to compute them all the same, name them in "
                        "held_out_metrics"
                    )
                    continue
            built = self._built(settings, name, reference.extractor, features=True, held_out=True)
            # the study was begun with this identity; ADM's archives have another one if their images are read, too
            complete[name] = dataclasses.replace(built, identity=reference.identity)
        return complete

    def _cross_check_reference(self) -> dict[str, Reference]:
        """The reference of the cross-check by its extractor's name; empty, with a notice that says why, without one."""
        if self._cross_check is None:
            return {}
        names = [self._cross_check]
        has_images = any(settings.holds_images for settings in self._references.values())
        if has_images and CROSS_CHECK not in names:
            names.append(CROSS_CHECK)  # random convolutions, which need images and no download
        for name in names:
            try:
                return {name: self._built_cross_check(name)}
            except (MetricError, MissingPackageError, OSError, RuntimeError) as error:  # RuntimeError: out of memory
                reason = str(error).partition("\n")[0]
            missing = f"{MetricName('fid', name)}, which would confirm a gain in features that the loss does not use"
            if name == names[-1]:
                notice(f"no cross-check: {missing}, cannot be measured: {reason}")
            else:
                stand_in = MetricName("fid", names[-1])
                notice(f"cross-check: {missing}, cannot be measured: {reason}. {stand_in} takes its place")
        return {}

    def _built_cross_check(self, name: str) -> Reference:
        """The reference of one cross-check. Raises MetricError and what reading files and networks raises."""
        settings = self._image_settings(name)
        images = settings.images(self._sets)
        extractor: FeatureExtractor
        if name == CROSS_CHECK:
            extractor = SecondFeatures(images.evenly_spaced(1).shape[1:], self._device)
        else:
            extractor = self._found(name)()
        features = images.count <= MOST_IMAGES  # for the error of the distance, which counts the real images
        return self._built(settings, name, extractor, features=features, held_out=True)

    def _image_settings(self, name: str) -> ReferenceSettings:
        """The real images for what may have no reference of its own: ``pixels``, ``tones``, or the cross-check.

        Its own reference if that is images, not statistics; else the first reference that is.
        """
        for settings in (self._references.get(name), *self._references.values()):
            if settings is not None and settings.holds_images:
                return settings
        raise MetricError(f"{name} needs real images; give them under reference: {{{name}: a folder, a .zip, ...}}")
