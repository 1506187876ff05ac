"""From the setting ``reference`` to the real images in an extractor's features, computed once and kept by content."""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from lcsc_opt.base.errors import MetricError
from lcsc_opt.base.files import write_atomically
from lcsc_opt.base.progress import notice, progress
from lcsc_opt.metrics.extractors.base import FeatureExtractor, checked_features
from lcsc_opt.metrics.extractors.by_name import OwnExtractor
from lcsc_opt.metrics.frechet import FrechetReference
from lcsc_opt.metrics.moments import Moments
from lcsc_opt.metrics.reference.files import load_statistics, read_reference_file, save_statistics
from lcsc_opt.metrics.reference.images import ImageSet, image_files, shared_images
from lcsc_opt.metrics.reference.reference import NO_FEATURES, Reference
from lcsc_opt.metrics.reference.setting import (
    ReferenceSetting,
    SplitSettings,
    check_reference,
    dataset_images,
    dataset_settings,
    reference_path,
    split_settings,
)

ROWS = 4096  # features whose moments are merged at once
MOST_SHARED = 0.01  # of the held-out images; data sets may have a few in both parts
DEFAULT_FRACTION = 0.2
LARGE_ENOUGH = 10_000  # images of a folder or .zip; of at least so many, a part is held out by default

Rows = npt.NDArray[np.float32]


def build_reference(
    setting: ReferenceSetting,
    alias: str,
    extractor: FeatureExtractor,
    *,
    features: bool,
    held_out: bool = False,
    batch_size: int,
    cache: Path,
) -> Reference:
    """The reference that ``setting`` describes, in the features of ``extractor``.

    Args:
        setting: a folder, a file or a dataset; or ``train`` and what is held out.
        alias: the extractor's name in metrics.
        extractor: the network.
        features: whether a metric needs the features, and not only their mean and covariance.
        held_out: whether the held-out images, if there are any, are wanted, too.
        batch_size: images through the network at once.
        cache: a folder for what was computed.

    Raises:
        MetricError: there is no such reference, it cannot be read, or it does not hold what is needed.
    """
    check_reference(setting)
    builder = _Builder(alias, extractor, batch_size, cache / "references")
    split = split_settings(setting)
    images = builder.image_set(split.train)
    fraction = _fraction(split, images)
    if images is not None and fraction:
        seen = builder.of_images(images.part(fraction, held_out=False), features=features)
        if not held_out:
            return seen
        unseen = builder.of_images(images.part(fraction, held_out=True), features=True)
    else:
        seen = builder.of(split.train, images, features=features)
        if not held_out or split.held_out is None:
            return seen
        other = builder.image_set(split.held_out)
        unseen = builder.of(split.held_out, other, features=True)
        if images is not None and other is not None:
            shared = shared_images(images, other)
            if shared > MOST_SHARED * other.count:
                notice(
                    f"reference: {shared:,} of the {other.count:,} images of held_out are in train, too, so that "
                    "fid_held_out, nearer_train and authenticity mean nothing; leave them out of one of the two"
                )
    if unseen.identity == seen.identity:
        raise MetricError("reference: held_out is train; give other real images, or held_out_fraction in its place")
    if None not in (seen.size, unseen.size) and seen.size != unseen.size:
        raise MetricError("reference: held_out has images of another size than train; bring both to one size first")
    return dataclasses.replace(seen, held_out=unseen)


def _fraction(split: SplitSettings, images: ImageSet | None) -> float:
    """The fraction of images that is held out: the setting, else a fifth of a large folder or .zip."""
    if split.held_out_fraction is not None:
        if images is None and split.held_out_fraction:
            raise MetricError(
                f"reference: {split.train} is no folder, .zip or dataset of which a fraction could be held out; "
                "give train: and held_out:"
            )
        return split.held_out_fraction
    if split.held_out is not None or images is None or not images.on_disk or images.count < LARGE_ENOUGH:
        return 0.0
    notice(
        f"reference: a fifth of the {images.count:,} images of {split.train} is held out from the loss, for reports; "
        "{train: ..., held_out_fraction: 0} takes all into the loss, as published FIDs do"
    )
    return DEFAULT_FRACTION


@dataclasses.dataclass(frozen=True)
class _Builder:
    """Makes references in the features of one extractor."""

    alias: str
    extractor: FeatureExtractor
    batch_size: int
    cache: Path

    def image_set(self, setting: ReferenceSetting) -> ImageSet | None:
        """The images of a folder, a zip file or a dataset; ``None`` for a file that holds something else."""
        path = reference_path(setting)
        if path is None:
            dataset = dataset_settings(setting)
            assert dataset is not None  # it is no path
            return dataset_images(dataset, root=self.cache.parent / "datasets")
        return image_files(path, cache=self.cache) if path.is_dir() or path.suffix.lower() == ".zip" else None

    def of(self, setting: ReferenceSetting, images: ImageSet | None, *, features: bool) -> Reference:
        """The reference of images, or of the file that the setting names."""
        if images is not None:
            return self.of_images(images, features=features)
        path = Path(str(setting)).expanduser()
        read = read_reference_file(path, self.alias, images=features)
        extractor = self.extractor
        names = (extractor.name, extractor.made.name) if isinstance(extractor, OwnExtractor) else (extractor.name,)
        if read.extractor not in (None, *names):
            raise MetricError(
                f"{path}: was computed with {read.extractor} and not with {extractor.name}; "
                "give the images, or statistics of the same extractor"
            )
        if read.images is not None:
            seen = self.of_images(read.images, features=features)
            if read.mean is None or read.cov is None:
                return seen
            found = Reference.of_statistics(extractor, read.mean, read.cov, read.count)
            identity = _digest(str(found.identity), str(seen.identity))
            return dataclasses.replace(found, identity=identity, features=seen.features, size=seen.size)
        if read.features is not None:
            return self._of_features(read.features, path)
        if read.mean is None or read.cov is None or features:
            raise MetricError(f"{path}: {NO_FEATURES}")
        return Reference.of_statistics(extractor, read.mean, read.cov, read.count)

    def _of_features(self, features: Rows, path: Path) -> Reference:
        if features.shape[1] != self.extractor.dimension:
            raise MetricError(
                f"{path}: has {features.shape[1]} features and the extractor {self.extractor.name} "
                f"{self.extractor.dimension}; compute them with the same extractor"
            )
        moments = _moments(features[first : first + ROWS] for first in range(0, len(features), ROWS))
        identity = _digest(hashlib.sha256(features.tobytes()).hexdigest(), self.extractor.name)
        gaussian = FrechetReference(moments.mean, moments.covariance)
        return Reference(self.extractor, gaussian, moments.count, identity, features)

    def of_images(self, images: ImageSet, *, features: bool) -> Reference:
        """The reference of images, whose statistics and features are kept in the cache."""
        if images.count < 2:
            raise MetricError("reference: one image is no distribution; give at least two")
        identity = _digest(images.content, self.extractor.name)
        statistics_file, features_file = (self.cache / f"{identity[:32]}{suffix}" for suffix in (".npz", ".npy"))
        if not statistics_file.exists() or (features and not features_file.exists()):
            kept: Rows = np.empty((images.count if features else 0, self.extractor.dimension), dtype=np.float32)
            moments = _moments(self._extracted(images, kept))
            if features:
                _save_features(features_file, kept)
            if not statistics_file.exists():  # FID stays what it was, to the last bit
                save_statistics(statistics_file, moments.mean, moments.covariance, moments.count, self.extractor.name)
        rows = _mapped(features_file, images.count, self.extractor.dimension) if features else None
        mean, cov, count, _ = load_statistics(statistics_file)
        return Reference(self.extractor, FrechetReference(mean, cov), count, identity, rows, images.size)

    def _extracted(self, images: ImageSet, kept: Rows) -> Iterable[Rows]:
        """Features of all images, batch by batch; also written into ``kept``, unless that is empty."""
        done = 0
        with progress(f"features of the reference ({self.extractor.name})", images.count) as advance:
            for batch in images.batches(self.batch_size):
                with torch.no_grad():
                    answered = checked_features(self.extractor, self.extractor(batch), len(batch))
                rows: Rows = answered.float().cpu().numpy()
                if len(kept):
                    kept[done : done + len(rows)] = rows
                done += len(rows)
                advance(len(rows))
                yield rows


def _moments(batches: Iterable[Rows]) -> Moments:
    """The moments of all batches, merged a few thousand rows at a time."""
    merged, waiting, count = Moments(), list[Rows](), 0
    for batch in batches:
        waiting.append(batch)
        count += len(batch)
        if count >= ROWS:
            merged, waiting, count = merged.merge(Moments.of(np.concatenate(waiting))), [], 0
    return merged.merge(Moments.of(np.concatenate(waiting))) if waiting else merged


def _save_features(path: Path, features: Rows) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(features))
    write_atomically(path, header.getvalue(), features.data.cast("B"), error=MetricError)


def _mapped(path: Path, count: int, dimension: int) -> Rows:
    """Features from the cache, mapped: the workers of one machine share the memory."""
    try:
        features: Rows = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise MetricError(f"{path}: is broken ({error}); remove it, and the features are extracted again") from error
    if features.shape != (count, dimension) or features.dtype != np.float32:
        raise MetricError(f"{path}: holds something else; remove it, and the features are extracted again")
    return features


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
