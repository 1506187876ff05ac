"""Which class each image is sampled from, and classifier-free guidance towards it."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor, nn

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.records import Noise
from lcsc_opt.sampling.noise import ImageNoise

Labels = Literal["balanced", "random"] | int
"""``balanced``: image i is of class i mod C; ``random``: drawn for each image; a number: all of that class."""
LABEL_TABLES = ("class_embedding", "class_embedder.embedding_table")  # names in diffusers' UNet2DModel, and in its DiT


class ClassLabels:
    """The class of every image, decided by its index alone.

    Args:
        classes: C; labels are 0 to C − 1.
        labels: how they are chosen.
        noise: random labels come from its seed.

    Raises:
        ObjectiveError: the label is none of the classes.
    """

    def __init__(self, classes: int, labels: Labels, *, noise: ImageNoise) -> None:
        if isinstance(labels, int) and not 0 <= labels < classes:
            raise ObjectiveError(f"labels: the model has the classes 0 to {classes - 1}, got {labels}")
        self.classes, self.labels = classes, labels
        self._noise = noise

    def batch(self, noise: Noise, start: int, stop: int) -> Tensor:
        """Classes of the images ``start`` to ``stop``: ``[stop - start]`` int64."""
        if isinstance(self.labels, int):
            return torch.full((stop - start,), self.labels)
        if self.labels == "balanced":
            return torch.arange(start, stop) % self.classes
        return self._noise.integers(noise, start, stop, below=self.classes)

    def describe(self) -> dict[str, object]:
        """What decides the classes."""
        return {"classes": self.classes, "labels": self.labels}


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (Ho and Salimans 2022): null + scale (conditional − null).

    Attributes:
        scale: 1 is the conditional model alone; every step calls the model twice per image.
        null_label: the class that stood for a dropped label when the model was trained.
    """

    scale: float
    null_label: int

    def mix(self, conditional: Tensor, null: Tensor) -> Tensor:
        """Both outputs ``[N, C, H, W]`` → the guided one."""
        return null + self.scale * (conditional - null)


def embedded_labels(network: nn.Module) -> int | None:
    """How many labels a diffusers network embeds, the null label among them; ``None`` where it has no such table.

    ``UNet2DModel`` has as many as classes; ``DiTTransformer2DModel`` one more, where it was trained with dropout.
    """
    sizes = [
        module.num_embeddings
        for name, module in network.named_modules()
        if isinstance(module, nn.Embedding) and name.endswith(LABEL_TABLES)
    ]
    return min(sizes, default=None)


def choose_labels(
    labels: Labels | None,
    guidance: Guidance | None,
    *,
    classes: int | None,
    noise: ImageNoise,
    embedded: int | None = None,
) -> ClassLabels | None:
    """Settings of a model with ``classes`` classes (``None`` for an unconditional one) → its labels.

    If the null label is the last of the model's classes, that class is not sampled.

    Args:
        labels: how classes are chosen.
        guidance: classifier-free guidance.
        classes: C.
        noise: random labels come from its seed.
        embedded: how many labels the model can embed, the null label among them; ``None`` when that is not known.

    Raises:
        ObjectiveError: labels for a model without classes, none for a model with classes, or a null label that the
            model does not embed.
    """
    if classes is None:
        if labels is not None or guidance is not None:
            raise ObjectiveError(
                f"{'guidance' if labels is None else 'labels'}: the model has no classes; leave it out"
            )
        return None
    if labels is None:
        raise ObjectiveError(f"labels: the model has {classes} classes; give balanced, random, or one of them")
    if guidance is not None and embedded is not None and not 0 <= guidance.null_label < embedded:
        raise ObjectiveError(
            f"guidance.null_label: the model embeds the labels 0 to {embedded - 1}, got {guidance.null_label}; "
            "give the one that stood for no class in training, or leave guidance out"
        )
    null_is_last = guidance is not None and guidance.null_label == classes - 1
    return ClassLabels(classes - 1 if null_is_last else classes, labels, noise=noise)
