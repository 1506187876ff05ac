"""Sampling noise and classes, decided for each image by its index.

Each image has its own stream of a counter-based generator (Philox 4x64, Salmon et al. 2011). Its counter starts at the
image's index, so the noise depends neither on the batch size nor on how images are spread over devices.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.progress import notice
from lcsc_opt.base.records import Noise
from lcsc_opt.base.reproducibility import derive_seed

CACHE_BYTES = 256 * 2**20
_GOLDEN_SECTION = 0x9E3779B97F4A7C15  # of 2^64, odd

Labels = Literal["balanced", "random"] | int | list[float]
"""``balanced``: classes take turns; ``random``: drawn for each image; a number: all of that class.

C numbers: drawn as often as they say, such as how many of the real images are of each class.
"""


@dataclasses.dataclass(frozen=True)
class ClassLabels:
    """How the class of every image is decided, by its index alone.

    Attributes:
        labels_of_model: how many labels the model has: 0 to that − 1.
        labels: how they are chosen.
        guidance: scale and null label of classifier-free guidance (Ho and Salimans 2022): null + scale (conditional −
            null), with two model calls a step. The null label stood for a dropped label in training. It is no class,
            wherever it stands among the labels or behind them, so no image has it.

    Raises:
        ObjectiveError: the label is none of the classes, or numbers are not those of all classes.
    """

    labels_of_model: int
    labels: Labels
    guidance: tuple[float, int] | None = None

    def __post_init__(self) -> None:
        if not self.classes:
            raise ObjectiveError("guidance.null_label: 0 is the only label of the model; without classes, leave it out")
        if isinstance(self.labels, int) and self.labels not in self.classes:
            if 0 <= self.labels < self.labels_of_model:
                raise ObjectiveError(f"labels: {self.labels} stands for no class, as guidance.null_label says")
            raise ObjectiveError(f"labels: the model has the classes {self._range}, got {self.labels}")
        if isinstance(self.labels, list):
            count = len(self.classes)
            is_possible = min(self.labels, default=0) >= 0 and 0 < sum(self.labels) < math.inf
            if len(self.labels) != count or not is_possible:
                raise ObjectiveError(
                    f"labels: got {self.labels}; give {count} numbers, how many images each of the classes "
                    f"{self._range} has"
                )

    @functools.cached_property
    def classes(self) -> list[int]:
        """The labels that images may have, ascending."""
        null_label = None if self.guidance is None else self.guidance[1]
        return [label for label in range(self.labels_of_model) if label != null_label]

    @property
    def _range(self) -> str:
        """The classes, for messages."""
        return f"{self.classes[0]} to {self.classes[-1]}"

    @classmethod
    def choose(
        cls,
        labels: Labels | None,
        *,
        classes: int | None,
        null_label: int | None = None,
        guidance: tuple[float, int] | None = None,
        advice: str = "",
    ) -> ClassLabels | None:
        """The labels of a model from its settings.

        Args:
            labels: how they are chosen.
            classes: how many labels the model has; ``None`` of an unconditional one.
            null_label: what stands for no class, if the model has a label for that beside its classes.
            guidance: as of the class.
            advice: what else is said where labels are missing.

        Raises:
            ObjectiveError: labels for a model without classes, none for a model with classes, or a null label that it
                does not have.
        """
        if classes is None:
            if labels is not None:
                raise ObjectiveError("labels: the model has no classes; leave it out")
            if guidance is not None:
                raise ObjectiveError("guidance: the model has no classes; leave it out")
            return None
        if labels is None:
            raise ObjectiveError(
                f"labels: the model has {classes} classes; give balanced, random, one of them, or the list of how many "
                f"images each has{advice}"
            )
        if guidance is not None:
            _check_null_label(guidance[1], classes, null_label)
        return cls(classes, labels, guidance)

    def describe(self) -> dict[str, object]:
        """What decides the classes."""
        guidance = None
        if self.guidance is not None:
            guidance = list(self.guidance)
        return {"classes": len(self.classes), "labels": self.labels, "guidance": guidance}


def guidance_advice(classes: int, null_label: int | None) -> str:
    """What a user is told of guidance: with a null label that is the model's own, or with the last of its classes."""
    if null_label is not None:
        return f"for classifier-free guidance, add guidance: {{scale: 1.5, null_label: {null_label}}}"
    last = classes - 1
    return f"if {last} means no class, add guidance: {{scale: 1, null_label: {last}}}"


def _check_null_label(given: int, classes: int, null_label: int | None) -> None:
    """Raise ObjectiveError if a model has no such label; a notice says if it has another one for no class."""
    last = null_label or classes - 1
    if given > last:
        raise ObjectiveError(f"guidance.null_label: the model has the labels 0 to {last}, got {given}")
    if null_label is not None and given != null_label:
        notice(f"guidance.null_label: {given} is one of the model's classes; {null_label} stands for no class")


class ImageNoise:
    """Standard normal noise of one shape, below one seed; and the classes of images, where there are some.

    A search samples every candidate from the same noise, so the batches drawn are kept, up to ``cache_bytes``. What is
    drawn depends on the seed, the group of noise, the image's index and, of several draws for one image, which it is.
    """

    def __init__(self, seed: int, shape: Sequence[int], labels: ClassLabels | None = None) -> None:
        self.seed = seed
        self.shape = tuple(shape)
        self.labels = labels
        self.cache_bytes = CACHE_BYTES
        self._cache: dict[tuple[object, ...], Tensor] = {}

    @property
    def cached_bytes(self) -> int:
        """The size of the batches that are kept."""
        return sum(tensor.nbytes for tensor in self._cache.values())

    def batch(self, noise: Noise, start: int, stop: int, *, draw: int = 0) -> Tensor:
        """Noise of the images ``start`` to ``stop``: ``[stop - start, *shape]`` float32, not to be written to.

        ``draw`` is which of several independent draws for the same image, as multi-step sampling needs.
        """

        def drawn() -> Tensor:
            numbers = np.empty((stop - start, *self.shape), dtype=np.float32)
            for row, stream in enumerate(self._streams(noise, start, stop, "noise", draw)):
                numbers[row] = stream.standard_normal(self.shape, dtype=np.float32)
            return torch.from_numpy(numbers)

        return self._cached(("noise", noise, start, stop, draw), drawn)

    def classes(self, noise: Noise, start: int, stop: int) -> Tensor | None:
        """Classes of the images ``start`` to ``stop``: ``[stop - start]`` int64; ``None`` for an unconditional network.

        They are not to be written to.
        """
        if self.labels is None:
            return None
        classes = torch.tensor(self.labels.classes)
        chosen = self.labels.labels
        if isinstance(chosen, int):
            return torch.full((stop - start,), chosen)
        if chosen == "balanced":
            turns = self._first_turn(noise, len(classes)) + torch.arange(start, stop)
            return classes[turns % len(classes)]

        def drawn() -> Tensor:
            streams = self._streams(noise, start, stop, "labels", 0)
            if chosen == "random":
                return classes[[int(stream.integers(len(classes))) for stream in streams]]
            ends = np.cumsum(chosen)  # of the part of each class
            return classes[np.searchsorted(ends, [stream.random() * ends[-1] for stream in streams], "right")]

        return self._cached(("labels", noise, start, stop), drawn)

    def _first_turn(self, noise: Noise, below: int) -> int:
        """Which of so many takes the first turn in this noise.

        Where each step has other noise and fewer images than there are classes, all would begin with the same classes,
        and the others would have no image. Consecutive seeds begin a golden section of the classes apart, which spreads
        their turns more evenly than chance (Knuth 1998, Section 6.4).
        """
        begin = derive_seed(self.seed, "turns", noise.group, bits=64) + noise.seed * _GOLDEN_SECTION
        return begin % 2**64 * below // 2**64

    def generators(self, noise: Noise, start: int, stop: int) -> list[torch.Generator]:
        """A fresh generator for each of the images, for schedulers and pipelines that draw noise in every step.

        They are CPU generators: diffusers then draws on the CPU, and the numbers do not depend on the device.
        """
        seeds = [derive_seed(self.seed, "steps", noise.group, noise.seed, image) for image in range(start, stop)]
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    def _streams(
        self,
        noise: Noise,
        start: int,
        stop: int,
        purpose: str,
        draw: int,
    ) -> Iterator[np.random.Generator]:
        """A generator for each of these images. Generators of two purposes or draws share no number."""
        key = derive_seed(self.seed, purpose, noise.group, noise.seed, draw, bits=128)
        for image in range(start, stop):  # the next image's part of the stream begins 2^192 blocks later
            yield np.random.Generator(np.random.Philox(key=key, counter=image << 192))

    def _cached(self, key: tuple[object, ...], draw: Callable[[], Tensor]) -> Tensor:
        """The tensor that was drawn for this key before, or that ``draw`` gives now.

        Where there is no room all others go: steps on fresh noise leave batches that nobody asks for again.
        """
        if key in self._cache:
            return self._cache[key]
        with torch.inference_mode(mode=False):  # a cached tensor may be used in a graph later
            drawn = draw()
        if self.cached_bytes + drawn.nbytes > self.cache_bytes:
            self._cache.clear()
        if drawn.nbytes <= self.cache_bytes:
            self._cache[key] = drawn
        return drawn
