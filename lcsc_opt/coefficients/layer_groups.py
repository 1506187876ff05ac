"""Which parts of a model's tensors are merged with which row of coefficients ``[S, K]``: layers, or output channels."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lcsc_opt.base.paths import natural_order
from lcsc_opt.base.records import Coefficients
from lcsc_opt.base.study_spec import LAYERS, Rule

MOST_ROWS = 32_768
"""Of ``rows: channels``; in a model with more channels, neighbours share a row."""

LORA_FACTORS = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),  # …attn1.processor.to_q_lora.down.weight, as diffusers converts kohya's
    (".lora_down.weight", ".lora_up.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),  # of PEFT's state dict, as DiffSynth-Studio saves it
)
"""How the names of a LoRA's two factors end, after the name of their module: down and up, by flavour."""

# the end of a factor's name: of a LoRA in PEFT, each adapter may have a name of its own in place of "default"
_FACTOR = re.compile(
    rf"({'|'.join(re.escape(end) for pair in LORA_FACTORS for end in pair)}|\.lora_[AB]\.\w+\.weight)$"
)


class TensorRows(NamedTuple):
    """The rows of coefficients of one tensor.

    Attributes:
        first: its first row.
        axis: the axis along which rows differ.
        channels: the length of that axis; 1 where the whole tensor has one row.
        size: how many neighbouring channels share a row.
    """

    first: int
    axis: int = 0
    channels: int = 1
    size: int = 1

    @property
    def row_count(self) -> int:
        """How many rows the tensor has."""
        return math.ceil(self.channels / self.size)

    def of_channels(self) -> npt.NDArray[np.int64]:
        """``[channels]``: the row of each channel."""
        return self.first + np.arange(self.channels) // self.size


@dataclasses.dataclass(frozen=True, eq=False)
class LayerGroups:
    """A division of a model's tensors into S rows of coefficients. The rows of a layer follow each other.

    Attributes:
        names: the names of the layers, ``[L]``.
        counts: how many rows each layer has, ``[L]``; their sum is S.
        rows_of: name of a tensor → its rows. Tensors that are the same in all checkpoints may be missing.
        rule: what they were divided by.
    """

    names: tuple[str, ...]
    counts: tuple[int, ...]
    rows_of: Mapping[str, TensorRows]
    rule: Rule

    def __len__(self) -> int:
        return sum(self.counts)

    @classmethod
    def by(
        cls, rule: Rule, shapes: Mapping[str, tuple[int, ...]], tied: Mapping[str, str] | None = None
    ) -> LayerGroups:
        """Divide tensors by a rule, into layers in the natural order of their names.

        A layer is the name up to the last dot, so a weight and its bias are one layer; of a LoRA both factors are.
        Output channels lie along the first axis of a tensor, so each number of a bias or of a normalization is one, and
        each row of a LoRA's factor. Of transposed convolutions they lie along the second, and files tell them by their
        bias, which is as long as the second axis and not as the first.

        Args:
            rule: ``layers``, a row for each; or ``channels``, a row for each output channel of each tensor, of which
                ``{channels: n}`` joins n.
            shapes: of the tensors, by name.
            tied: a further name of a tensor → its first name. The same weights have the same rows.
        """
        tied = tied or {}
        distinct = sorted((name for name in shapes if name not in tied), key=natural_order)
        tensors_of: dict[str, list[str]] = {}
        for name in distinct:
            tensors_of.setdefault(_layer(name), []).append(name)
        layers = tuple(sorted(tensors_of, key=natural_order))
        if rule == LAYERS:
            rows_of = {name: TensorRows(row) for row, layer in enumerate(layers) for name in tensors_of[layer]}
            counts = [1] * len(layers)
        else:
            axes = {name: _channel_axis(name, shapes) for name in distinct}
            channels = {name: (*shapes[name], 1)[axes[name]] for name in distinct}  # a number alone is one channel
            size = rule["channels"] if isinstance(rule, Mapping) else _shared_by(channels.values())
            rows_of, counts = {}, []
            for layer in layers:
                begin = sum(counts)
                end = begin
                for name in tensors_of[layer]:
                    rows_of[name] = TensorRows(end, axes[name], channels[name], size)
                    end += rows_of[name].row_count
                counts.append(end - begin)
        rows_of |= {name: rows_of[first_name] for name, first_name in tied.items()}
        return cls(layers, tuple(counts), rows_of, rule)

    def in_rows(self, coefficients: Coefficients) -> Coefficients:
        """``[S, K]`` of coefficients ``[K]``, which all rows share; ``[S, K]`` as they are."""
        return np.asarray(np.broadcast_to(coefficients, (len(self), coefficients.shape[-1])).copy())


def of_layers(coefficients: Coefficients, counts: Collection[int]) -> tuple[Coefficients, Coefficients]:
    """Mean and standard deviation over the rows of each layer, ``[L, K]`` both, of ``[S, K]``.

    Args:
        coefficients: a row for each layer, or several, which follow each other.
        counts: how many rows each layer has, ``[L]``.
    """
    ends = list(itertools.accumulate(counts))
    parts = np.split(coefficients, ends[:-1])
    return np.stack([part.mean(axis=0) for part in parts]), np.stack([part.std(axis=0) for part in parts])


def mean_of_rows(coefficients: Coefficients) -> Coefficients:
    """``[K]``: the mean of the rows of coefficients ``[S, K]``; ``[K]`` as they are."""
    return np.asarray(np.atleast_2d(coefficients).mean(axis=0))


def _layer(tensor: str) -> str:
    """The layer that a tensor belongs to: its module. A tensor that is in none is a layer by itself."""
    module = _FACTOR.sub("", tensor)
    if module == tensor:  # no factor of a LoRA
        module, _, _ = tensor.rpartition(".")
    return module or tensor


def _channel_axis(name: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The axis of a tensor's output channels: the second one of a transposed convolution, else the first."""
    shape = shapes[name]
    bias = shapes.get(f"{name.removesuffix('weight')}bias", ())
    is_convolution = name.endswith(".weight") and len(shape) > 2
    return int(is_convolution and bias == shape[1:2] and bias != shape[:1])


def _shared_by(channels: Collection[int]) -> int:
    """How many neighbouring channels share a row, a power of two, so that there are at most :data:`MOST_ROWS` rows.

    Args:
        channels: of each tensor.
    """
    size = 1
    while size < max(channels, default=1) and sum(math.ceil(count / size) for count in channels) > MOST_ROWS:
        size *= 2
    return size
