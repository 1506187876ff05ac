"""What lies beside the weights of checkpoints and belongs to all of them: headers, and alphas of a LoRA."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.lora import PACKED_ALPHAS, LoraAlphas, lora_flavour
from lcsc_opt.checkpoints.reading import Checkpoint, read_metadata
from lcsc_opt.trajectory.manifest import HEADER

_ADVICE = "leave one part of the run out (first_step, last_step)"


def side_data(paths: Sequence[Path], first: Checkpoint) -> dict[str, str]:
    """What a trajectory keeps of it: the texts that all headers have, and the alphas.

    Raises:
        TrajectoryError: alphas differ, by which weights mean something else.
    """
    texts: dict[str, str] = {}
    shared = set.intersection(*(set(read_metadata(path).items()) for path in paths))
    if shared:
        texts[HEADER] = json.dumps(dict(sorted(shared)))
    if lora_flavour(first.tensors) is not None:
        alphas = _alphas(paths, first.key)
        if alphas:
            texts[PACKED_ALPHAS] = alphas
    return texts


def _alphas(paths: Sequence[Path], key: str) -> str:
    """The alphas of a LoRA as JSON, which are the same in all checkpoints; empty if its tensors hold them."""
    found: dict[str, Path] = {}
    for path in paths:
        alphas = LoraAlphas.read(path, key=key)
        text = "" if alphas is None else alphas.model_dump_json(exclude_unset=True)
        found.setdefault(text, path)
    if len(found) > 1:
        one, other = [*found.values()][:2]
        raise TrajectoryError(
            f"{other}: its LoRA has other alphas than {one}, so their weights cannot be combined: {_ADVICE}."
        )
    return next(iter(found), "")
