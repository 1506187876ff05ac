"""Layer groups: which tensors of a model are merged with which row of coefficients ``[S, K]``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping

import numpy as np

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.paths import natural_order
from lcsc_opt.base.records import Coefficients
from lcsc_opt.base.study_spec import LAYERS

Rule = str
"""How tensors are divided: ``layers``, the only rule so far; the texts of studies and recipes are checked here."""

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
        """Divide tensors by a rule, into groups in the natural order of their names.

        A layer is the name up to the last dot, so a weight and its bias are one group; of a LoRA both factors are.

        Args:
            rule: ``layers``.
            tensors: their names.
            tied: a further name of a tensor → its first name. The same weights have one row.

        Raises:
            StudySpecError: an unknown rule.
        """
        tied = tied or {}
        if rule != LAYERS:
            raise StudySpecError(f"space.rows: expected {LAYERS}, got {rule!r}")
        group_of = {name: _layer(name) for name in tensors if name not in tied}
        group_of |= {name: group_of[first_name] for name, first_name in tied.items()}
        names = tuple(sorted(set(group_of.values()), key=natural_order))
        rows = {name: row for row, name in enumerate(names)}
        return cls(names, {tensor: rows[group] for tensor, group in group_of.items()}, rule)

    def in_rows(self, coefficients: Coefficients) -> Coefficients:
        """``[S, K]`` of coefficients ``[K]``, which all layers share; ``[S, K]`` as they are."""
        return np.asarray(np.broadcast_to(coefficients, (len(self), coefficients.shape[-1])).copy())


def mean_of_rows(coefficients: Coefficients) -> Coefficients:
    """``[K]``: the mean of the rows of coefficients ``[S, K]``; ``[K]`` as they are."""
    return np.asarray(np.atleast_2d(coefficients).mean(axis=0))


def _layer(tensor: str) -> str:
    """The layer that a tensor belongs to: its module. A tensor that is in none is a layer by itself."""
    module = _FACTOR.sub("", tensor)
    if module == tensor:  # no factor of a LoRA
        module, _, _ = tensor.rpartition(".")
    return module or tensor
