"""Layer groups: which tensors of a model are merged with which row of coefficients ``[S, K]``."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Mapping, Sequence

import numpy as np

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.progress import notice
from lcsc_opt.base.records import Coefficients
from lcsc_opt.base.settings import near_miss
from lcsc_opt.base.study_file import ROWS

OTHER = "other"
"""The group of the tensors that no pattern matches."""

Rule = str | Mapping[str, str | Sequence[str]]
"""``layers``, ``blocks``, ``kinds``; or a group's name → a pattern, or several, of tensor names, as in ``down.*``."""

LORA_FACTORS = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),  # …attn1.processor.to_q_lora.down.weight, as diffusers converts kohya's
    (".lora_down.weight", ".lora_up.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),  # of PEFT's state dict, as DiffSynth-Studio saves it
)
"""How the names of a LoRA's two factors end, after the name of their module: down and up, by flavour."""

_FACTOR = re.compile(
    rf"({'|'.join(re.escape(end) for pair in LORA_FACTORS for end in pair)}|\.lora_[AB]\.\w+\.weight)$"
)
_MANY_CHECKPOINTS = 64
_KINDS = ("norms", "norms", "linear", "convolutions")  # by axes of a weight: 0, 1, 2, more
_MOST_NAMED = 3


@dataclasses.dataclass(frozen=True, eq=False)
class LayerGroups:
    """A division of a model's tensors into S groups, one for each row of coefficients.

    Attributes:
        names: the names of the groups, ``[S]``.
        row_of: name of a tensor → its row. Tensors that are the same in all checkpoints may be missing.
        rule: what they were divided by.
    """

    names: tuple[str, ...]
    row_of: Mapping[str, int]
    rule: Rule

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def by(cls, rule: Rule, shapes: Mapping[str, Sequence[int]]) -> LayerGroups:
        """Divide tensors, name → shape, by a rule.

        * ``layers``: the name up to the last dot, so a weight and its bias are one group; of a LoRA both factors.
        * ``blocks``: the name up to its first part with a digit, as ``down_blocks.0``; else the layer. In kohya's
          names, which have no dots, the parts are between underscores.
        * ``kinds``: layers with convolutions, with other matrices, and with vectors only.
        * a mapping: the tensors whose names match a pattern, with ``*`` and ``?`` as in file names. All other tensors
          are the group ``other``, with a notice.

        Raises:
            StudySpecError: an unknown rule; or a pattern that matches no tensor, or one of another group.
        """
        group_of = _named_groups(rule, shapes) if isinstance(rule, str) else _matched_groups(rule, shapes)
        names = tuple(sorted(set(group_of.values()), key=_natural))
        rows = {name: row for row, name in enumerate(names)}
        return cls(names, {tensor: rows[group] for tensor, group in group_of.items()}, rule)

    def in_rows(self, coefficients: Coefficients) -> Coefficients:
        """``[S, K]`` of coefficients ``[K]``, which all layers share."""
        rows: Coefficients = np.broadcast_to(coefficients, (len(self), coefficients.shape[-1])).copy()
        return rows


def mean_of_rows(coefficients: Coefficients) -> Coefficients:
    """``[K]``: the mean of the rows of coefficients ``[S, K]``; ``[K]`` as they are."""
    mean: Coefficients = np.atleast_2d(coefficients).mean(axis=0)
    return mean


def _named_groups(rule: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Name of a tensor → its group, by ``layers``, ``blocks`` or ``kinds``."""
    if rule not in ROWS:
        expected = f"{', '.join(ROWS)} or a mapping from names to patterns"
        raise StudySpecError(f"space.rows: expected {expected}, got {rule!r}{near_miss(rule, ROWS)}")
    layers = {name: _layer(name) for name in shapes}
    if rule == "layers":
        return layers
    if rule == "blocks":
        return {name: _block(layer) for name, layer in layers.items()}
    axes = dict.fromkeys(layers.values(), 0)  # the most that a tensor of the layer has
    for name, layer in layers.items():
        axes[layer] = max(axes[layer], len(shapes[name]))
    return {name: _KINDS[min(axes[layer], 3)] for name, layer in layers.items()}


def _layer(tensor: str) -> str:
    """The layer that a tensor belongs to; the module of a LoRA's factor."""
    module = _FACTOR.sub("", tensor)
    if module != tensor:
        return module or tensor
    layer, _, _ = tensor.rpartition(".")
    return layer or tensor


def _block(layer: str) -> str:
    kohya_block = re.match(r"lora_[^.]*?_\d+(?=_)", layer)
    if kohya_block:
        return kohya_block[0]
    parts = layer.split(".")
    for index, part in enumerate(parts):
        if re.search(r"\d", part):
            return ".".join(parts[: index + 1])
    return layer


def _natural(name: str) -> list[object]:
    """A key that sorts layer.9 before layer.10."""
    texts_and_numbers = re.split("([0-9]+)", name)
    return [int(part) if index % 2 else part for index, part in enumerate(texts_and_numbers)]


def _matched_groups(rule: Mapping[str, str | Sequence[str]], shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Name of a tensor → the group whose pattern it matches, or :data:`OTHER`, with a notice."""
    group_of: dict[str, str] = {}
    for group, patterns in rule.items():
        if isinstance(patterns, str):
            patterns = [patterns]
        for pattern in patterns:
            matches = fnmatch.filter(shapes, pattern)
            if not matches:
                guess = near_miss(pattern, list(shapes)) or f", as in {next(iter(shapes), '')!r}"
                raise StudySpecError(f"space.rows.{group}: {pattern!r} matches no tensor that varies{guess}")
            for name in matches:
                if group_of.setdefault(name, group) != group:
                    raise StudySpecError(f"space.rows: {name} matches {group_of[name]} and {group}; it needs one row")
    unmatched = sorted(set(shapes) - set(group_of))
    if unmatched:
        shown = ", ".join(unmatched[:_MOST_NAMED])
        if len(unmatched) > _MOST_NAMED:
            shown += f" and {len(unmatched) - _MOST_NAMED} more"
        notice(f"space.rows: no pattern matches {shown}; they are merged with the row {OTHER!r}")
    return group_of | dict.fromkeys(unmatched, OTHER)


def advice_on_checkpoints(count: int) -> str | None:
    """What to say to a user who keeps ``count`` checkpoints of a training; ``None`` if there is nothing to say.

    The numbers are those of ``benchmarks/means.py``.
    """
    if count <= _MANY_CHECKPOINTS:
        return None
    return (
        f"{count} checkpoints: with a row of coefficients for each layer (space: {{rows: layers}}, LCSCGradient) 16 to "
        "32 evenly spaced ones are nearly as good; keep more for one row, without a gradient, or with few real images"
    )
