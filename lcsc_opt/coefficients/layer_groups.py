"""Layer groups: which tensors of a model are merged with which row of coefficients ``[S, K]``."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Mapping, Sequence

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.progress import notice
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
)
"""How the names of a LoRA's two factors end, after the name of their module: down and up, by flavour."""

_FACTOR = re.compile(
    rf"({'|'.join(re.escape(end) for pair in LORA_FACTORS for end in pair)}|\.lora_[AB]\.\w+\.weight)$"
)
_KINDS = ("norms", "norms", "linear", "convolutions")  # by axes of a weight: 0, 1, 2, more
_MOST_NAMED = 3


@dataclasses.dataclass(frozen=True, eq=False)
class LayerGroups:
    """A division of a model's tensors into S groups, one for each row of coefficients.

    Attributes:
        names: of the groups, ``[S]``.
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
        * a mapping: the tensors whose names match a pattern, with ``*`` and ``?`` as in file names. What is left is the
          group ``other``, with a notice.

        Raises:
            StudySpecError: an unknown rule; or a pattern that matches no tensor, or one of another group.
        """
        if isinstance(rule, str):
            if rule not in ROWS:
                wanted = f"{', '.join(ROWS)} or a mapping from names to patterns"
                raise StudySpecError(f"space.rows: expected {wanted}, got {rule!r}{near_miss(rule, ROWS)}")
            factors = {name: _FACTOR.sub("", name) for name in shapes}
            layers = {n: (stem if stem != n else n.rpartition(".")[0]) or n for n, stem in factors.items()}
            if rule == "kinds":
                axes = dict.fromkeys(layers.values(), 0)
                for name, layer in layers.items():
                    axes[layer] = max(axes[layer], len(shapes[name]))
                groups = {name: _KINDS[min(axes[layer], 3)] for name, layer in layers.items()}
            else:
                groups = layers if rule == "layers" else {name: _block(layer) for name, layer in layers.items()}
        else:
            groups = _matched(rule, shapes)

        def natural(name: str) -> list[object]:  # layer.9 before layer.10
            return [int(part) if place % 2 else part for place, part in enumerate(re.split("([0-9]+)", name))]

        names = tuple(sorted(set(groups.values()), key=natural))
        rows = {name: row for row, name in enumerate(names)}
        return cls(names, {name: rows[group] for name, group in groups.items()}, rule)


def _block(layer: str) -> str:
    if found := re.match(r"lora_[^.]*?_\d+(?=_)", layer):
        return found[0]
    parts = layer.split(".")
    first = next((i for i, part in enumerate(parts) if re.search(r"\d", part)), len(parts) - 1)
    return ".".join(parts[: first + 1])


def _matched(rule: Mapping[str, str | Sequence[str]], shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    groups: dict[str, str] = {}
    for group, patterns in rule.items():
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            found = fnmatch.filter(shapes, pattern)
            if not found:
                guess = near_miss(pattern, list(shapes)) or f", as in {next(iter(shapes), '')!r}"
                raise StudySpecError(f"space.rows.{group}: {pattern!r} matches no tensor that varies{guess}")
            for name in found:
                if groups.setdefault(name, group) != group:
                    raise StudySpecError(f"space.rows: {name} matches {groups[name]} and {group}; it needs one row")
    if left := sorted(set(shapes) - set(groups)):
        shown = ", ".join(left[:_MOST_NAMED]) + (f" and {len(left) - _MOST_NAMED} more" if left[_MOST_NAMED:] else "")
        notice(f"space.rows: no pattern matches {shown}; they are merged with the row {OTHER!r}")
    return groups | dict.fromkeys(left, OTHER)
