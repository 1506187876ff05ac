"""The setting ``reference`` of a study file: which real images the loss sees, which are held out for reports, and both
in an extractor's features, computed once and kept by content.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from lcsc_opt.base.errors import MetricError, raised_as
from lcsc_opt.base.files import write_atomically
from lcsc_opt.base.paths import expanded_path
from lcsc_opt.base.progress import notice, progress
from lcsc_opt.base.settings import FrozenModel, near_miss, parse_settings
from lcsc_opt.metrics.extractors.base import FeatureExtractor, features_in_parts
from lcsc_opt.metrics.frechet import Moments
from lcsc_opt.metrics.reference.files import CONTENT, SUFFIX, has_images, read_reference_file
from lcsc_opt.metrics.reference.images import DATASETS, ImageSet
from lcsc_opt.metrics.reference.reference import NO_FEATURES, Reference

DEFAULT_FRACTION = 0.2
LARGE_ENOUGH = 1_000  # images, of which a part is held out by default

ReferenceSetting = str | Mapping[str, Any]
Rows = npt.NDArray[np.float32]


class ImageSets:
    """The sets of real images that an objective names. Each is looked at once, whatever sees its images.

    Args:
        folder: keeps what is found in their files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._sets: dict[str, ImageSet | None] = {}

    def of(self, source: str) -> ImageSet | None:
        """The images of a folder, a zip file or a data set; ``None`` for an ``.npz``, also for one that holds images.

        Raises:
            MetricError: there is no such place, or they cannot be read.
        """
        if source not in self._sets:
            path = _path(source)
            if path is None:
                self._sets[source] = ImageSet.of_dataset(source, root=self.folder / "datasets")
            elif _is_set(path):
                self._sets[source] = ImageSet.of_files(path, folder=self.folder)
            else:
                self._sets[source] = None
        return self._sets[source]


class ReferenceSettings(FrozenModel):
    """Real images that the loss compares with, and further ones for reports only.

    Attributes:
        train: the images that the loss sees: a folder, a file or a data set's name.
        held_out: the images for reports, given in the same way; without it, a fraction of ``train``.
        held_out_fraction: the fraction of ``train`` that is held out, chosen by the hash of each image's content. The
            default is 0.2 for a folder, .zip or data set of at least 1,000 images, else 0.

    Every other held-out image is for reports only; the rest choose the answer.
    """

    train: str
    held_out: str | None = None
    held_out_fraction: Annotated[float, Field(ge=0, lt=1)] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> ReferenceSettings:
        if self.held_out is not None and self.held_out_fraction is not None:
            raise ValueError("held_out and held_out_fraction exclude each other")
        if self.held_out == self.train:
            raise ValueError("held_out is train; give other real images, or held_out_fraction in its place")
        return self

    @classmethod
    def parse(cls, setting: ReferenceSetting) -> ReferenceSettings:
        """The settings of a path, a data set's name, or ``{train: …, held_out: …}``.

        Raises:
            StudySpecError: for settings that do not exist.
        """
        if isinstance(setting, str):
            setting = {"train": setting}
        return parse_settings(cls, setting, source="reference")

    @classmethod
    def by_extractor(cls, reference: ReferenceSetting | None, extractors: list[str]) -> dict[str, ReferenceSettings]:
        """Extractor → its settings, from one setting for all or a mapping from extractors to settings.

        Raises:
            MetricError: for an unknown extractor in a mapping.
            StudySpecError: for settings that do not exist.
        """
        if reference is None:
            return {}
        if isinstance(reference, str) or set(cls.model_fields) & set(reference):
            return dict.fromkeys(extractors, cls.parse(reference))
        for name in reference:
            if name not in extractors:
                hint = near_miss(name, extractors)
                used = ", ".join(extractors)
                raise MetricError(f"reference: no metric uses an extractor {name!r}{hint}; used: {used}")
        return {name: cls.parse(setting) for name, setting in reference.items()}

    def check(self) -> None:
        """Raise MetricError for a path that does not exist or a file of no known kind; nothing is read."""
        _path(self.train)
        if self.held_out is not None:
            _path(self.held_out)

    @property
    def holds_images(self) -> bool:
        """Whether these are images, which any extractor can use, and not numbers from one extractor.

        Raises:
            MetricError: the file cannot be read.
        """
        path = _path(self.train)
        return path is None or _is_set(path) or has_images(path)

    def is_set_of_images(self, most: int, sets: ImageSets) -> bool:
        """Whether ``train`` is at most so many images, and no ``.npz``."""
        images = sets.of(self.train)
        return images is not None and images.count <= most

    def images(self, sets: ImageSets) -> ImageSet:
        """The images that a search sees, and those that are held out of them by a fraction.

        Raises:
            MetricError: they are no images, or cannot be read.
        """
        image_set = sets.of(self.train)
        if image_set is None:  # an .npz may hold images, as ADM's do
            _, image_set = read_reference_file(expanded_path(self.train, error=MetricError), "", images=True)
        if image_set is None:
            raise MetricError(f"reference: {self.train} holds no images")
        return image_set

    def build(
        self,
        alias: str,
        extractor: FeatureExtractor,
        *,
        features: bool,
        held_out: bool,
        batch_size: int,
        sets: ImageSets,
    ) -> Reference:
        """The reference in the features of ``extractor``; that of held-out images always has their features.

        Args:
            alias: the extractor's name in metrics.
            extractor: the network.
            features: whether the features of ``train`` are needed, and not only their mean and covariance.
            held_out: whether the held-out images are needed, if there are any.
            batch_size: images through the network at once.
            sets: of the objective; their folder keeps statistics and features.

        Raises:
            MetricError: there is no such reference, it cannot be read, or it does not hold what is needed.
        """
        self.check()
        builder = _Builder(alias, extractor, batch_size, sets.folder)
        images = sets.of(self.train)
        unseen_images = None
        fraction = self._fraction(images)
        if fraction:
            if images is None:
                raise MetricError(
                    f"reference: {self.train} is not a folder, .zip or data set, so no fraction of it can be held out; "
                    "give train: and held_out:"
                )
            unseen_images = images.part(fraction, held_out=True)
            images = images.part(fraction, held_out=False)
        seen = builder.of(self.train, images, features=features)
        if held_out and self.held_out is not None:
            unseen_images = sets.of(self.held_out)
            if unseen_images is None:  # an .npz
                return seen.with_unseen(builder.of(self.held_out, None, features=True))
            if images is not None:
                unseen_images = self._not_seen(unseen_images, images)
        if not held_out or unseen_images is None:
            return seen
        return builder.with_unseen(seen, unseen_images)

    def _not_seen(self, held_out: ImageSet, train: ImageSet) -> ImageSet:
        """The held-out images without those that the loss sees, too; a notice says how many these are.

        Raises:
            MetricError: it sees all.
        """
        rest = held_out.without(train)
        shared = held_out.count - rest.count
        if shared == held_out.count:
            raise MetricError(
                f"reference: train has all images of held_out ({self.held_out}), so searches would see them; give "
                "other real images, or held_out_fraction in its place"
            )
        if shared:
            notice(
                f"reference: {shared:,} of the {held_out.count:,} images of {self.held_out} are in {self.train}, too, "
                "and are left out of those that are held out"
            )
        return rest

    def _fraction(self, images: ImageSet | None) -> float:
        """The fraction of ``train`` that is held out: the setting, else a fifth of many images; none of an ``.npz``."""
        if self.held_out_fraction is not None:
            return self.held_out_fraction
        if self.held_out is not None:
            return 0.0
        if images is None or images.count < LARGE_ENOUGH:
            notice(
                f"reference: none of the images of {self.train} is held out, so the search and its report see the same "
                "ones. If you can spare a hundred or more, {train: ..., held_out: ...} holds others out, and "
                "held_out_fraction: 0.2 a fifth of a folder"
            )
            return 0.0
        notice(
            f"reference: a fifth of the {images.count:,} images of {self.train} is held out from the loss, half of it "
            "to choose the answer and half for its report; {train: ..., held_out_fraction: 0} uses all of them in the "
            "loss, as published FIDs do"
        )
        return DEFAULT_FRACTION


def _path(source: str) -> Path | None:
    """The folder or file of a source, checked; ``None`` for a data set."""
    path = expanded_path(source, error=MetricError)
    if not path.exists():
        if source.lower() in DATASETS:
            return None
        raise MetricError(f"reference: {path} does not exist, and is not a data set; known: {', '.join(DATASETS)}")
    if not _is_set(path) and path.suffix.lower() != SUFFIX:
        raise MetricError(f"{path}: is not a reference; expected a folder or .zip of images, or {CONTENT}")
    return path


def _is_set(path: Path) -> bool:
    """Whether this is a folder or a zip file, whose images are files."""
    return path.is_dir() or path.suffix.lower() == ".zip"


@dataclasses.dataclass(frozen=True)
class _Builder:
    """Makes references in the features of one extractor, of ``batch_size`` images at once, and keeps them in a folder.

    ``alias`` is the extractor's name in metrics.
    """

    alias: str
    extractor: FeatureExtractor
    batch_size: int
    folder: Path

    def of(self, source: str, images: ImageSet | None, *, features: bool) -> Reference:
        """The reference of ``images``; ``None`` stands for what the ``.npz`` at ``source`` holds."""
        if images is not None:
            return self.of_images(images, features=features)
        path = expanded_path(source, error=MetricError)
        statistics, pixels = read_reference_file(path, self.alias, images=features)
        if statistics is None:
            assert pixels is not None  # a file holds at least one of both
            return self.of_images(pixels, features=features)
        self._check_extractor(path, statistics.extractor)
        reference = Reference.of_gaussian(self.extractor, statistics.gaussian, statistics.count)
        if not features:
            return reference
        if pixels is None:
            raise MetricError(f"{path}: {NO_FEATURES}")
        # ADM's files hold both: FID compares with their statistics, and other metrics with their images.
        of_pixels = self.of_images(pixels, features=True)
        identity = _digest(str(reference.identity), str(of_pixels.identity))
        return dataclasses.replace(reference, identity=identity, features=of_pixels.features, size=of_pixels.size)

    def _check_extractor(self, path: Path, name: str | None) -> None:
        """Raise MetricError if a file says that its statistics are of another extractor: ``name``, or ``None``."""
        made_name = getattr(self.extractor, "made_name", None)  # that of a user's own, without our hash
        if name not in (None, self.extractor.name, made_name):
            raise MetricError(
                f"{path}: was computed with {name} and not with {self.extractor.name}; "
                "give the images, or statistics of the same extractor"
            )

    def of_images(self, images: ImageSet, *, features: bool) -> Reference:
        """The reference of as many of these images as are enough; statistics and features are kept in the folder."""
        return self._of_all(self._enough(images), features=features)

    def _of_all(self, images: ImageSet, *, features: bool) -> Reference:
        """The reference of all of these images, also where fewer would be enough."""
        if images.count < 2:
            raise MetricError(
                f"reference: a distribution needs at least 2 images, and there are {images.count} for the loss, or "
                "held out from it; give more images, or another held_out_fraction"
            )
        identity = _digest(images.content, self.extractor.name)
        statistics_file = self.folder / f"{identity[:32]}.npz"
        features_file = self.folder / f"{identity[:32]}.npy"
        # a study that needs no features may have kept the statistics alone
        if not statistics_file.exists() or (features and _mapped(features_file) is None):
            self._compute(images, statistics_file, features_file if features else None)
        rows = None
        if features:
            rows = _mapped(features_file)
        statistics, _ = read_reference_file(statistics_file, self.alias, images=False)
        assert statistics is not None  # written by _compute
        return Reference(self.extractor, statistics.gaussian, statistics.count, identity, rows, images.size)

    def with_unseen(self, seen: Reference, images: ImageSet) -> Reference:
        """The reference with further images, of which a half chooses the answer and the other half is for reports.

        The hash of an image decides, so copies of an image are never in both halves.
        """
        images = self._enough(images)  # here and not in of_images, as ``choosing`` is of the same images
        return seen.with_unseen(self._of_all(images, features=True), choosing=images.hash_prefixes >= 2**31)

    def _enough(self, images: ImageSet) -> ImageSet:
        """About as many of the images as the extractor's statistics need, chosen by their hashes."""
        enough = getattr(self.extractor, "enough_images", images.count)
        if images.count <= enough:
            return images
        return images.part(enough / images.count, held_out=True)

    def _compute(self, images: ImageSet, statistics_file: Path, features_file: Path | None) -> None:
        """Write the statistics of images, and their features if there is a file for them."""
        moments = Moments()
        blocks: list[Rows] = []
        with progress(f"features of the reference ({self.extractor.name})", images.count) as advance:
            for batch in images.batches(self.batch_size):
                size = "x".join(map(str, batch.shape[1:]))
                with raised_as(MetricError, f"reference: {self.alias}, given images of {size},"):
                    features = features_in_parts(self.extractor, batch).float().cpu()
                moments.update(features)
                if features_file is not None:
                    blocks.append(np.ascontiguousarray(features.numpy()))
                advance(len(batch))
        if features_file is not None:
            header = io.BytesIO()  # np.save would need all blocks in one array
            shape = (images.count, self.extractor.dimension)
            np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
            write_atomically(
                features_file, header.getvalue(), *(rows.data.cast("B") for rows in blocks), error=MetricError
            )
        if statistics_file.exists():  # kept earlier, perhaps with other batches: FID stays what it was, to the last bit
            return
        content = io.BytesIO()
        np.savez(
            content,
            mu=moments.mean,
            sigma=moments.covariance,
            count=np.array(moments.count),
            extractor=np.array(self.extractor.name),
        )
        write_atomically(statistics_file, content.getvalue(), error=MetricError)


def _mapped(features_file: Path) -> Rows | None:
    """Kept features, mapped so that the workers of one machine share the memory; ``None`` if missing or damaged.

    They are copied on a write, which nothing does: torch warns of arrays that cannot be written.
    """
    try:
        rows: Rows = np.load(features_file, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return rows


def _digest(*parts: str) -> str:
    """A SHA-256 of these texts, in hexadecimal."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
