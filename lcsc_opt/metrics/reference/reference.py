"""The real images that samples are compared with, in the features of one extractor."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from typing import TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lcsc_opt.base.errors import MetricError, ObjectiveError
from lcsc_opt.metrics.extractors.base import FeatureExtractor, extract
from lcsc_opt.metrics.frechet import FrechetReference, Moments
from lcsc_opt.metrics.reference.shrinkage import NOTHING, Shrinkage

FEWEST_UNSEEN = 50  # real images of each part: a distance to fewer prefers samples that vary less

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """An extractor, and the statistics or features of the real images in it.

    Mean and covariance are enough for FID, other metrics need the features, the Inception Score neither. Values that
    all evaluations share are computed once, when they are first needed.

    Attributes:
        extractor: the network.
        gaussian: mean and covariance; ``None`` without real images.
        count: how many real images; ``None`` if a file of statistics does not say.
        identity: names the images and the extractor by their content, for the fingerprint of a study.
        features: ``[M, D]`` float32; ``None`` if only mean and covariance are known or needed.
        size: height and width of the real images; ``None`` where only their statistics or features are known.
        held_out: further real images for reports, with their features.
        selection: others that choose the answer.
        shrinkage: how far the statistics are those of an average of the checkpoints.
        may_be_shrunk: whether they may be, where the real images are few.

    Raises:
        MetricError: the statistics are of another number of features than the extractor has.
    """

    extractor: FeatureExtractor
    gaussian: FrechetReference | None = None
    count: int | None = None
    identity: str | None = None
    features: npt.NDArray[np.float32] | None = None
    size: tuple[int, int] | None = None
    held_out: Reference | None = None
    selection: Reference | None = None
    shrinkage: Shrinkage = NOTHING
    may_be_shrunk: bool = True
    _computed: dict[tuple[str, str], object] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.gaussian is not None and self.gaussian.dimension != self.extractor.dimension:
            raise MetricError(
                f"the reference has {self.gaussian.dimension} features and the extractor {self.extractor.name} "
                f"{self.extractor.dimension}; compute both with the same extractor"
            )

    @classmethod
    def of_gaussian(
        cls, extractor: FeatureExtractor, gaussian: FrechetReference, count: int | None = None
    ) -> Reference:
        """A reference of the mean and covariance of so many images; enough for FID."""
        digest = hashlib.sha256(json.dumps([gaussian.dimension, count, extractor.name]).encode())
        for array in (gaussian.mean, gaussian.cov):
            digest.update(np.ascontiguousarray(array, dtype="<f8").tobytes())
        return cls(extractor, gaussian, count, digest.hexdigest())

    @classmethod
    def of_images(cls, extractor: FeatureExtractor, images: Tensor) -> Reference:
        """A reference of ``[M, C, H, W]`` in [−1, 1], M at least 2. Raises MetricError as :func:`extract`."""
        reference = cls.of_features(extractor, extract(extractor, images, batch_size=500))
        return dataclasses.replace(reference, size=(images.shape[-2], images.shape[-1]))

    @classmethod
    def of_features(cls, extractor: FeatureExtractor, features: npt.ArrayLike) -> Reference:
        """A reference of the features ``[M, D]`` that ``extractor`` gave: finite ones, M at least 2."""
        moments = Moments.of(features)
        reference = cls.of_gaussian(extractor, FrechetReference(moments.mean, moments.covariance), moments.count)
        return dataclasses.replace(reference, features=np.asarray(features, dtype=np.float32))

    @property
    def frechet(self) -> FrechetReference:
        """Distances to the mean and covariance. Raises MetricError without real images."""
        if self.gaussian is None:
            raise MetricError("needs a reference; only the Inception Score (is) does without")
        return self.gaussian

    @property
    def known_features(self) -> npt.NDArray[np.float32]:
        """``[M, D]`` float32. Raises MetricError if only mean and covariance are known."""
        if self.features is None:
            _ = self.frechet  # raises that there is no reference, where there is none
            raise MetricError(NO_FEATURES)
        return self.features

    def with_unseen(self, unseen: Reference, *, choosing: npt.NDArray[np.bool_] | None = None) -> Reference:
        """This reference with images that no loss sees.

        One half chooses the answer, and is in :attr:`selection`; the other one decides nothing, and is in
        :attr:`held_out`. If they are too few for both, reports have all of them.

        Args:
            unseen: those images, with their features.
            choosing: ``[M]``, which of them are in the first half; ``None`` for every other one.
        """
        if choosing is None:
            choosing = np.arange(len(unseen.known_features)) % 2 == 0
        if min(choosing.sum(), (~choosing).sum()) < FEWEST_UNSEEN:
            return dataclasses.replace(self, held_out=unseen)
        return dataclasses.replace(self, selection=unseen._part(choosing), held_out=unseen._part(~choosing))

    def shrunk(self, shrinkage: Shrinkage) -> Reference:
        """The target of a loss: these real images, moved towards an average of the checkpoints."""
        gaussian = FrechetReference(*shrinkage.gaussian(self.frechet.mean, self.frechet.cov))
        return dataclasses.replace(self, gaussian=gaussian, shrinkage=shrinkage)

    @functools.cached_property
    def of_choice(self) -> Reference:
        """The same for whatever is no report: held out are those images that choose the answer, if there are any."""
        return dataclasses.replace(self, held_out=self.selection, selection=None)

    def _part(self, chosen: npt.NDArray[np.bool_]) -> Reference:
        """The reference of some of the real images: ``chosen`` ``[M]`` says which."""
        part = self.of_features(self.extractor, self.known_features[chosen])
        digest = hashlib.sha256(f"{self.identity} ".encode() + np.packbits(chosen).tobytes())
        return dataclasses.replace(part, identity=digest.hexdigest(), size=self.size)

    def check_size(self, samples: Tensor) -> None:
        """Raise ObjectiveError if ``samples`` ``[B, C, H, W]`` are of another size than the real images.

        The extractor would scale both to its own size, and a distance would then measure the scaling.
        """
        height, width = samples.shape[-2:]
        for reference in (self, self.held_out, self.selection):
            if reference is None or reference.size in (None, (height, width)):
                continue
            real_height, real_width = reference.size
            raise ObjectiveError(
                f"samples are {height}x{width} and the images of the reference {real_height}x{real_width}; "
                "the distance between them would measure how they are scaled. Give a reference of "
                f"{height}x{width}, made as the training images were, or sample {real_height}x{real_width}"
            )

    @property
    def unseen(self) -> Reference:
        """:attr:`held_out`. Raises MetricError if there is none."""
        if self.held_out is None:
            raise MetricError(
                "this metric compares with real images that the loss does not see, and none are held out; "
                "give reference: {train: FOLDER, held_out: FOLDER}, or {train: FOLDER, held_out_fraction: 0.2}"
            )
        return self.held_out

    def features_on(self, device: torch.device | str) -> Tensor:
        """``[M, D]`` float32, kept on ``device``. Raises MetricError if only mean and covariance are known."""
        key = ("features", str(device))
        if key not in self._computed:
            self._computed[key] = torch.from_numpy(self.known_features).to(device)
        return cast("Tensor", self._computed[key])

    @torch.no_grad()
    def once(self, name: str, device: torch.device | str, compute: Callable[[Tensor], T]) -> T:
        """The result of ``compute`` for the features ``[M, D]`` on ``device``; computed once, then kept by its name."""
        key = (name, str(device))
        if key not in self._computed:
            self._computed[key] = compute(self.features_on(device))
        return cast("T", self._computed[key])


NO_FEATURES = (
    "this metric compares features, and the reference holds mean and covariance only; "
    "give the images themselves (a folder, a .zip, ADM's .npz)"
)
