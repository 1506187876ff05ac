"""Layer groups: which tensors of a model are merged with which row of coefficients ``[S, K]``."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.progress import notice
from lcsc_opt.base.records import Coefficients
from lcsc_opt.base.settings import near_miss
from lcsc_opt.base.study_spec import LAYERS

OTHER = "other"
"""The group of the tensors that no pattern matches."""

Rule = str | Mapping[str, str | Sequence[str]]
"""``layers``; or a group's name → a pattern, or several, of tensor names, as in ``down.*``."""

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
    def by(cls, rule: Rule, tensors: Collection[str], tied: Mapping[str, str] | None = None) -> LayerGroups:
        """Divide tensors by a rule.

        * ``layers``: the name up to the last dot, so a weight and its bias are one group; of a LoRA both factors.
        * a mapping: the tensors whose names match a pattern, with ``*`` and ``?`` as in file names. All other tensors
          are the group ``other``, with a notice.

        Args:
            rule: one of these.
            tensors: their names.
            tied: a further name of a tensor → its first name. A tensor has one group: that of its first name, or that
                of the pattern which matches any of its names.

        Raises:
            StudySpecError: an unknown rule; or a pattern that matches no tensor, or one of another group.
        """
        tied = tied or {}
        if rule == LAYERS:
            group_of = {name: _layer(name) for name in tensors if name not in tied}
        elif isinstance(rule, str):
            raise StudySpecError(f"space.rows: expected {LAYERS} or a mapping from names to patterns, got {rule!r}")
        else:
            group_of = _matched_groups(rule, tensors, tied)
        group_of |= {name: group_of[first_name] for name, first_name in tied.items()}
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


def _layer(tensor: str) -> str:
    """The layer that a tensor belongs to; the module of a LoRA's factor."""
    module = _FACTOR.sub("", tensor)
    if module != tensor:
        return module or tensor
    layer, _, _ = tensor.rpartition(".")
    return layer or tensor


def _natural(name: str) -> list[object]:
    """A key that sorts layer.9 before layer.10."""
    texts_and_numbers = re.split("([0-9]+)", name)
    return [int(part) if index % 2 else part for index, part in enumerate(texts_and_numbers)]


def _matched_groups(
    rule: Mapping[str, str | Sequence[str]], tensors: Collection[str], tied: Mapping[str, str]
) -> dict[str, str]:
    """First name of a tensor → the group whose pattern matches one of its names, or :data:`OTHER`, with a notice."""
    group_of: dict[str, str] = {}
    for group, patterns in rule.items():
        if isinstance(patterns, str):
            patterns = [patterns]
        for pattern in patterns:
            matches = fnmatch.filter(tensors, pattern)
            if not matches:
                guess = near_miss(pattern, list(tensors)) or f", as in {next(iter(tensors), '')!r}"
                raise StudySpecError(f"space.rows.{group}: {pattern!r} matches no tensor that varies{guess}")
            for name in matches:
                first_name = tied.get(name, name)
                other_group = group_of.setdefault(first_name, group)
                if other_group != group:
                    if first_name != name:
                        name = f"{name}, which is tied to {first_name},"
                    raise StudySpecError(f"space.rows: {name} matches {other_group} and {group}; it needs one row")
    unmatched = sorted(set(tensors) - set(tied) - set(group_of))
    if unmatched:
        shown = ", ".join(unmatched[:_MOST_NAMED])
        if len(unmatched) > _MOST_NAMED:
            shown += f" and {len(unmatched) - _MOST_NAMED} more"
        notice(f"space.rows: no pattern matches {shown}; they are merged with the row {OTHER!r}")
    return group_of | dict.fromkeys(unmatched, OTHER)


def advice_on_checkpoints(count: int) -> str | None:
    """What to say to a user who keeps ``count`` checkpoints of a training run; ``None`` if there is nothing to say.

    The numbers are those of ``docs/training.md``.
    """
    if count <= _MANY_CHECKPOINTS:
        return None
    return (
        f"{count} checkpoints: with a row of coefficients for each layer (space: {{rows: layers}}, LCSCGradient) 16 to "
        "32 evenly spaced ones are nearly as good; keep more for one row, or without a gradient"
    )
