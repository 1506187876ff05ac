"""torchvision's datasets as reference images: ``cifar10-train``, or ``{torchvision: CIFAR10, split: train}``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lcsc_opt.base.errors import MetricError
from lcsc_opt.base.imports import prepare_torchvision
from lcsc_opt.base.settings import FrozenModel, near_miss, parse_settings
from lcsc_opt.metrics.images import ImageArray

Split = Literal["train", "test", "val", "unlabeled"]
# Name → how its constructor is told the split. All keep their images in one array, and check their files' MD5 first.
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
    """What names a dataset, as settings: ``<name>-<split>`` in any case, or a mapping with ``torchvision``.

    Returns None for anything else. Raises StudySpecError for settings that do not exist.
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

    Raises MetricError for a dataset or split that is not known, or whose files are not there or broken.
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
        prepare_torchvision()
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
