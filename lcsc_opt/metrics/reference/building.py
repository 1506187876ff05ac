"""From the setting ``reference`` to the real images in an extractor's features, computed once and kept by content."""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from lcsc_opt.base.errors import MetricError
from lcsc_opt.base.files import write_atomically
from lcsc_opt.base.progress import notice, progress
from lcsc_opt.base.settings import FrozenModel, near_miss, parse_settings
from lcsc_opt.metrics.extractors.base import FeatureExtractor, checked_features
from lcsc_opt.metrics.extractors.own import OwnExtractor
from lcsc_opt.metrics.reference.files import SUFFIXES, has_images, read_reference_file
from lcsc_opt.metrics.reference.images import ImageArray, ImageFiles, ImageSet, shared_images
from lcsc_opt.metrics.reference.reference import NO_FEATURES, Reference
from lcsc_opt.metrics.reference.split import ReferenceSetting, fraction_of, is_split, split_settings
from lcsc_opt.metrics.statistics import FeatureStatistics, ReferenceStatistics

ROWS = 4096  # features whose statistics are merged at once
MOST_SHARED = 0.01  # of the held-out images; data sets may have a few in both parts


def references_by_extractor(reference: ReferenceSetting | None, extractors: list[str]) -> dict[str, ReferenceSetting]:
    """Extractor → its setting, from one setting for all or a mapping from extractors to settings.

    Raises:
        MetricError: for an unknown extractor in a mapping, or an entry that is not a setting.
    """
    if reference is None:
        return {}
    if isinstance(reference, str) or dataset_settings(reference) is not None or is_split(reference):
        return dict.fromkeys(extractors, reference)
    for name, setting in reference.items():
        if name not in extractors:
            hint = near_miss(name, extractors)
            raise MetricError(f"reference: no metric uses an extractor {name!r}{hint}; used: {', '.join(extractors)}")
        if not isinstance(setting, str) and not (
            isinstance(setting, Mapping) and ("torchvision" in setting or is_split(setting))
        ):
            raise MetricError(
                f"reference.{name}: expected a path, a dataset's name, {{torchvision: ...}} or "
                "{train: ..., held_out: ...}"
            )
    return dict(reference)


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
    split, cache = split_settings(setting), cache / "references"
    how: dict[str, Any] = {"batch_size": batch_size, "cache": cache}
    images = _image_set(split.train, cache)
    fraction = fraction_of(split, images)
    if images is None:
        seen = _from_file(_path(split.train), alias, extractor, features=features, **how)
    else:
        part = images.part(fraction, held_out=False) if fraction else images
        seen = _from_images(part, extractor, features=features, **how)
    if not held_out:
        return seen
    if images is not None and fraction:
        unseen = _from_images(images.part(fraction, held_out=True), extractor, features=True, **how)
    elif split.held_out is not None:
        other = _image_set(split.held_out, cache)
        unseen = (
            _from_file(_path(split.held_out), alias, extractor, features=True, **how)
            if other is None
            else _from_images(other, extractor, features=True, **how)
        )
        if images is not None and other is not None:
            _notice_shared(images, other)
    else:
        return seen
    _check_apart(seen, unseen)
    return dataclasses.replace(seen, held_out=unseen)


def _notice_shared(images: ImageSet, other: ImageSet) -> None:
    """Say that held-out images are among those that the loss sees; of a few, as data sets have them, nothing."""
    shared = shared_images(images, other)
    if shared > MOST_SHARED * other.count:
        notice(
            f"reference: {shared:,} of the {other.count:,} images of held_out are in train, too, so that fid_held_out, "
            "nearer_train and authenticity mean nothing; leave them out of one of the two"
        )


def _check_apart(seen: Reference, unseen: Reference) -> None:
    """Raise MetricError where the held-out images are those that the loss sees, or of another size."""
    if unseen.identity == seen.identity:
        raise MetricError("reference: held_out is train; give other real images, or held_out_fraction in its place")
    if None not in (seen.size, unseen.size) and seen.size != unseen.size:
        raise MetricError("reference: held_out has images of another size than train; bring both to one size first")


def _image_set(setting: ReferenceSetting, cache: Path) -> ImageSet | None:
    """The images of a folder, a zip file or a dataset; None for a file that holds something else."""
    dataset = dataset_settings(setting)
    if dataset is not None and not (isinstance(setting, str) and Path(setting).exists()):
        return dataset_images(dataset, root=cache.parent / "datasets")
    path = _path(setting)
    return ImageFiles(path, cache=cache) if path.is_dir() or path.suffix.lower() == ".zip" else None


def _path(setting: ReferenceSetting) -> Path:
    return Path(str(setting)).expanduser()


def check_reference(setting: ReferenceSetting) -> None:
    """Refuse a reference that no extractor could use, without reading it.

    Raises:
        MetricError: for a path that does not exist, or a file of no known kind.
    """
    split = split_settings(setting)
    for part in (split.train, split.held_out):
        if part is not None:
            _check_part(part)


def _check_part(setting: ReferenceSetting) -> None:
    path = _path(setting)
    if dataset_settings(setting) is not None and not (isinstance(setting, str) and path.exists()):
        return
    _check_exists(path)
    if not (path.is_dir() or path.suffix.lower() in (".zip", *SUFFIXES)):
        raise MetricError(f"{path}: is no reference; expected a folder of images, .zip, {', '.join(SUFFIXES)}")


def holds_images(setting: ReferenceSetting) -> bool:
    """Whether a reference consists of images, which any extractor can use, and not of numbers from one extractor.

    Raises:
        MetricError: for a file that cannot be read.
    """
    train = split_settings(setting).train
    if dataset_settings(train) is not None:
        return True
    path = _path(train)
    return path.is_dir() or path.suffix.lower() == ".zip" or (path.suffix.lower() == ".npz" and has_images(path))


def _check_exists(path: Path) -> None:
    if not path.exists():
        known = ", ".join(f"{name.lower()}-train" for name in DATASETS)
        raise MetricError(f"reference: {path} does not exist, and no dataset is called so; known: {known}")


def _from_file(
    path: Path, alias: str, extractor: FeatureExtractor, *, features: bool, batch_size: int, cache: Path
) -> Reference:
    read = read_reference_file(path, alias, images=features)
    names = (extractor.name, extractor.made.name) if isinstance(extractor, OwnExtractor) else (extractor.name,)
    if read.statistics is not None and read.statistics.extractor not in (None, *names):
        raise MetricError(
            f"{path}: was computed with {read.statistics.extractor} and not with {extractor.name}; "
            "give the images, or statistics of the same extractor"
        )
    if read.images is not None:
        seen = _from_images(read.images, extractor, features=features, batch_size=batch_size, cache=cache)
        if read.statistics is None:
            return seen
        return Reference(read.statistics, _digest(read.statistics.sha256, seen.identity), seen.all_features, seen.size)
    if read.features is not None:
        return _from_features(read.features, extractor, str(path))
    if read.statistics is None or features:
        raise MetricError(f"{path}: {NO_FEATURES}")
    return Reference.from_statistics(read.statistics)


def _from_features(features: npt.NDArray[np.float32], extractor: FeatureExtractor, source: str) -> Reference:
    if features.shape[1] != extractor.dimension:
        raise MetricError(
            f"{source}: has {features.shape[1]} features and the extractor {extractor.name} {extractor.dimension}; "
            "compute them with the same extractor"
        )
    collected = _Collected(extractor, keep=0)
    for first in range(0, len(features), ROWS):
        collected.add(features[first : first + ROWS])
    identity = _digest(hashlib.sha256(features.tobytes()).hexdigest(), extractor.name)
    return Reference(collected.statistics(), identity, features)


def _from_images(
    images: ImageSet, extractor: FeatureExtractor, *, features: bool, batch_size: int, cache: Path
) -> Reference:
    if images.count < 2:
        raise MetricError("reference: one image is no distribution; give at least two")
    identity = _digest(images.content, extractor.name)
    statistics_file, features_file = (cache / f"{identity[:32]}{suffix}" for suffix in (".npz", ".npy"))
    if not statistics_file.exists() or (features and not features_file.exists()):
        collected = _extract(images, extractor, keep=features, batch_size=batch_size)
        if features:
            _save_features(features_file, collected.features)
        if not statistics_file.exists():  # FID stays what it was, to the last bit
            collected.statistics().save(statistics_file)
    kept = _mapped(features_file, images.count, extractor.dimension) if features else None
    return Reference(ReferenceStatistics.load(statistics_file), identity, kept, images.size)


def _extract(images: ImageSet, extractor: FeatureExtractor, *, keep: bool, batch_size: int) -> _Collected:
    collected = _Collected(extractor, keep=images.count if keep else 0)
    with progress(f"features of the reference ({extractor.name})", images.count) as advance, torch.no_grad():
        for batch in images.batches(batch_size):
            answered = checked_features(extractor, extractor(batch), len(batch))
            collected.add(answered.float().cpu().numpy())
            advance(len(batch))
    return collected


class _Collected:
    """Collects features: their statistics, merged a few thousand at a time, and the first ``keep`` features."""

    def __init__(self, extractor: FeatureExtractor, *, keep: int) -> None:
        self._extractor = extractor
        self._waiting: list[npt.NDArray[np.float32]] = []
        self.features = np.empty((keep, extractor.dimension), dtype=np.float32)
        self._added = 0
        self._merged: FeatureStatistics | None = None

    def add(self, features: npt.NDArray[np.float32]) -> None:
        self._waiting.append(features)
        if len(self.features):
            self.features[self._added : self._added + len(features)] = features
        self._added += len(features)
        if sum(map(len, self._waiting)) >= ROWS:
            self._merge()

    def statistics(self) -> ReferenceStatistics:
        self._merge()
        if self._merged is None:
            raise MetricError("reference: there are no images")
        return ReferenceStatistics.from_statistics(self._merged, self._extractor.name)

    def _merge(self) -> None:
        if self._waiting:
            part = FeatureStatistics.from_features(np.concatenate(self._waiting))
            self._merged = part if self._merged is None else self._merged.merge(part)
            self._waiting = []


def _save_features(path: Path, features: npt.NDArray[np.float32]) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(features))
    write_atomically(path, header.getvalue(), features.data.cast("B"), error=MetricError)


def _mapped(path: Path, count: int, dimension: int) -> npt.NDArray[np.float32]:
    """Features from the cache, mapped: the workers of one machine share the memory."""
    try:
        features: npt.NDArray[np.float32] = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise MetricError(f"{path}: is broken ({error}); remove it, and the features are extracted again") from error
    if features.shape != (count, dimension) or features.dtype != np.float32:
        raise MetricError(f"{path}: holds something else; remove it, and the features are extracted again")
    return features


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


Split = Literal["train", "test", "val", "unlabeled"]
# Name → split → arguments of the constructor. All keep their images in one array, and check their files' MD5 first.
DATASETS: dict[str, Mapping[str, Mapping[str, Any]]] = {
    **{
        name: {"train": {"train": True}, "test": {"train": False}}
        for name in ("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "KMNIST")
    },
    "STL10": {split: {"split": split} for split in ("train", "test", "unlabeled")},
}


class DatasetSettings(FrozenModel):
    """``root`` is where torchvision keeps its files; nothing is downloaded unless ``download`` says so."""

    torchvision: str
    split: Split = "train"
    root: str | None = None
    download: bool = False


def dataset_settings(reference: str | Mapping[str, Any]) -> DatasetSettings | None:
    """The settings of a dataset that is named as ``<name>-<split>``, or by a mapping with ``torchvision``.

    Returns None for anything else.

    Raises:
        StudySpecError: for settings that do not exist.
    """
    if isinstance(reference, Mapping):
        if "torchvision" not in reference:
            return None
        return parse_settings(DatasetSettings, dict(reference), source="reference")
    name, dash, split = reference.rpartition("-")
    known = {known.lower(): known for known in DATASETS}
    if not dash or name.lower() not in known or split not in ("train", "test", "val", "unlabeled"):
        return None
    return parse_settings(DatasetSettings, {"torchvision": known[name.lower()], "split": split}, source="reference")


def dataset_images(settings: DatasetSettings, *, root: Path) -> ImageArray:
    """The images of a dataset.

    Args:
        settings: which, and where.
        root: the folder where ``settings`` name none.

    Raises:
        MetricError: for a dataset or split that is not known, or whose files are not there or broken.
    """
    if settings.torchvision not in DATASETS:
        raise MetricError(
            f"reference: {settings.torchvision!r} is no dataset{near_miss(settings.torchvision, list(DATASETS))}; "
            f"known: {', '.join(DATASETS)}; write the images of others into a folder"
        )
    split = "test" if settings.split == "val" else settings.split
    splits = DATASETS[settings.torchvision]
    if split not in splits:
        raise MetricError(f"reference: {settings.torchvision} has no split {split}, only {', '.join(splits)}")
    folder = Path(settings.root) if settings.root else root
    return ImageArray(_pixels(settings, folder, splits[split]), source=f"{settings.torchvision}-{split}")


def _pixels(settings: DatasetSettings, folder: Path, split: Mapping[str, Any]) -> Any:
    """``[N, H, W, C]`` uint8."""
    try:
        from torchvision import datasets
    except ImportError as error:
        raise MetricError(f"reference: {settings.torchvision} needs torchvision: {error}") from error
    try:
        dataset = getattr(datasets, settings.torchvision)(str(folder), download=settings.download, **split)
    except (OSError, RuntimeError) as error:  # RuntimeError: not there, or with another MD5
        name, split_name = settings.torchvision, settings.split
        raise MetricError(
            f"reference: {name} cannot be read from {folder} ({error}); give root: where torchvision's files are, or "
            f"{{torchvision: {name}, split: {split_name}, download: true}} to fetch them"
        ) from error
    pixels = np.asarray(dataset.data)
    if pixels.ndim == 3:  # the MNIST family
        return pixels[..., None]
    return pixels.transpose(0, 2, 3, 1) if settings.torchvision == "STL10" else pixels
