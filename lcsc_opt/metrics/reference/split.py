"""Which real images the loss sees, and which are held out for reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator

from lcsc_opt.base.errors import MetricError
from lcsc_opt.base.progress import notice
from lcsc_opt.base.settings import FrozenModel, parse_settings
from lcsc_opt.metrics.reference.images import ImageFiles, ImageSet

ReferenceSetting = str | Mapping[str, Any]

DEFAULT_FRACTION = 0.2
LARGE_ENOUGH = 10_000  # images of a folder or .zip; of at least so many, a part is held out by default


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


def fraction_of(split: SplitSettings, images: ImageSet | None) -> float:
    """The fraction of images that is held out: the setting, else a fifth of a large folder or .zip.

    Raises:
        MetricError: the setting wants a fraction of a file, which is no set of images.
    """
    if split.held_out_fraction is not None:
        if images is None and split.held_out_fraction:
            raise MetricError(
                f"reference: {split.train} is no folder, .zip or dataset of which a fraction could be held out; "
                "give held_out: beside train:"
            )
        return split.held_out_fraction
    if split.held_out is not None or not isinstance(images, ImageFiles) or images.count < LARGE_ENOUGH:
        return 0.0
    notice(
        f"reference: a fifth of the {images.count:,} images of {split.train} is held out from the loss, for reports; "
        "{train: ..., held_out_fraction: 0} takes all into the loss, as published FIDs do"
    )
    return DEFAULT_FRACTION
