"""The setting ``reference`` of a study file: which real images the loss sees, and which are held out for reports."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from lcsc_opt.base.errors import MetricError
from lcsc_opt.base.settings import FrozenModel, near_miss, parse_settings
from lcsc_opt.metrics.reference.files import SUFFIXES, has_images
from lcsc_opt.metrics.reference.images import ImageSet, image_array

ReferenceSetting = str | Mapping[str, Any]

Split = Literal["train", "test", "val", "unlabeled"]
# Name → split → arguments of torchvision's constructor. All keep their images in one array, and check their files' MD5.
DATASETS: dict[str, Mapping[str, Mapping[str, Any]]] = {
    **{
        name: {"train": {"train": True}, "test": {"train": False}}
        for name in ("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "KMNIST")
    },
    "STL10": {split: {"split": split} for split in ("train", "test", "unlabeled")},
}


class SplitSettings(FrozenModel):
    """Real images that the loss compares with, and others that only reports look at.

    Attributes:
        train: the images that the loss sees: a folder, a file or a dataset.
        held_out: the images for reports, given in the same way; without it, a fraction of ``train``.
        held_out_fraction: the fraction of ``train`` that is held out, chosen by the hash of each image's content. The
            default is 0.2 for a folder or .zip of at least 10,000 images, else 0.
    """

    train: str | dict[str, Any]
    held_out: str | dict[str, Any] | None = None
    held_out_fraction: Annotated[float, Field(ge=0, lt=1)] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> SplitSettings:
        if self.held_out is not None and self.held_out_fraction is not None:
            raise ValueError("held_out and held_out_fraction exclude each other")
        if self.held_out == self.train:
            raise ValueError("held_out is train; give other real images, or held_out_fraction in its place")
        for part in (self.train, self.held_out):
            if isinstance(part, dict) and "torchvision" not in part:
                raise ValueError("expected a path, a dataset's name or {torchvision: ...} for train and held_out")
        return self


class _DatasetSettings(FrozenModel):
    """``root`` is where torchvision keeps its files; nothing is downloaded unless ``download`` says so."""

    torchvision: str
    split: Split = "train"
    root: str | None = None
    download: bool = False


def is_split(setting: ReferenceSetting) -> bool:
    """Whether a reference is written as :class:`SplitSettings`."""
    return isinstance(setting, Mapping) and bool({"train", "held_out", "held_out_fraction"} & set(setting))


def split_settings(setting: ReferenceSetting) -> SplitSettings:
    """A reference as settings.

    Raises:
        StudySpecError: for settings that do not exist.
    """
    given = dict(setting) if isinstance(setting, Mapping) and is_split(setting) else {"train": setting}
    return parse_settings(SplitSettings, given, source="reference")


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


def reference_path(setting: ReferenceSetting) -> Path | None:
    """The folder or file that a reference names; ``None`` for a dataset.

    Raises:
        MetricError: there is no such path, or a file of no known kind.
    """
    path = Path(str(setting)).expanduser()
    if dataset_settings(setting) is not None and not (isinstance(setting, str) and path.exists()):
        return None
    if not path.exists():
        known = ", ".join(f"{name.lower()}-train" for name in DATASETS)
        raise MetricError(f"reference: {path} does not exist, and no dataset is called so; known: {known}")
    if not (path.is_dir() or path.suffix.lower() in (".zip", *SUFFIXES)):
        raise MetricError(f"{path}: is no reference; expected a folder of images, .zip, {', '.join(SUFFIXES)}")
    return path


def check_reference(setting: ReferenceSetting) -> None:
    """Refuse a reference that no extractor could use, without reading it.

    Raises:
        MetricError: for a path that does not exist, or a file of no known kind.
    """
    split = split_settings(setting)
    for part in (split.train, split.held_out):
        if part is not None:
            reference_path(part)


def holds_images(setting: ReferenceSetting) -> bool:
    """Whether a reference consists of images, which any extractor can use, and not of numbers from one extractor.

    Raises:
        MetricError: for a file that cannot be read.
    """
    path = reference_path(split_settings(setting).train)
    if path is None or path.is_dir():
        return True
    return path.suffix.lower() == ".zip" or (path.suffix.lower() == ".npz" and has_images(path))


def dataset_settings(reference: ReferenceSetting) -> _DatasetSettings | None:
    """The settings of a dataset that is named as ``<name>-<split>``, or by a mapping with ``torchvision``.

    Returns ``None`` for anything else.

    Raises:
        StudySpecError: for settings that do not exist.
    """
    if isinstance(reference, Mapping):
        if "torchvision" not in reference:
            return None
        return parse_settings(_DatasetSettings, dict(reference), source="reference")
    name, dash, split = reference.rpartition("-")
    known = {known.lower(): known for known in DATASETS}
    if not dash or name.lower() not in known or split not in ("train", "test", "val", "unlabeled"):
        return None
    return parse_settings(_DatasetSettings, {"torchvision": known[name.lower()], "split": split}, source="reference")


def dataset_images(settings: _DatasetSettings, *, root: Path) -> ImageSet:
    """The images of a dataset.

    Args:
        settings: which, and where.
        root: the folder where ``settings`` name none.

    Raises:
        MetricError: for a dataset or split that is not known, or whose files are not there or broken.
    """
    name = settings.torchvision
    if name not in DATASETS:
        raise MetricError(
            f"reference: {name!r} is no dataset{near_miss(name, list(DATASETS))}; known: {', '.join(DATASETS)}; write "
            "the images of others into a folder"
        )
    split = "test" if settings.split == "val" else settings.split
    if split not in DATASETS[name]:
        raise MetricError(f"reference: {name} has no split {split}, only {', '.join(DATASETS[name])}")
    folder = Path(settings.root) if settings.root else root
    try:
        from torchvision import datasets

        dataset = getattr(datasets, name)(str(folder), download=settings.download, **DATASETS[name][split])
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: not there, or with another MD5
        raise MetricError(
            f"reference: {name} cannot be read from {folder} ({error}); give root: where torchvision's files are, or "
            f"{{torchvision: {name}, split: {settings.split}, download: true}} to fetch them"
        ) from error
    pixels = np.asarray(dataset.data)
    if pixels.ndim == 3:  # the MNIST family
        pixels = pixels[..., None]
    elif name == "STL10":
        pixels = pixels.transpose(0, 2, 3, 1)
    return image_array(pixels, source=f"{name}-{settings.split}")
