"""What files hold beside weights and a trajectory keeps once for all of them: texts in headers, alphas of a LoRA."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.folders import file_of_weights
from lcsc_opt.checkpoints.lora import PACKED_ALPHAS, LoraAlphas, lora_flavour
from lcsc_opt.checkpoints.reading import Checkpoint, read_metadata
from lcsc_opt.trajectory.layout import Layout
from lcsc_opt.trajectory.manifest import HEADER

_ADVICE = "leave one part of the run out (first_step, last_step)"


def side_data(paths: Sequence[Path], first: Checkpoint) -> dict[str, str]:
    """The metadata of a trajectory that comes from its files: the texts that all headers have, and the alphas as JSON.

    Args:
        paths: of all checkpoints.
        first: the first of them, which tells whether it is a LoRA.

    Raises:
        TrajectoryError: alphas differ: they scale the weights, which then cannot be combined.
    """
    texts: dict[str, str] = {}
    headers = [read_metadata(file_of_weights(path, first.key)) for path in paths]
    shared = set.intersection(*(set(header.items()) for header in headers))
    if shared:
        texts[HEADER] = json.dumps(dict(sorted(shared)))
    if lora_flavour(first.tensors) is not None:
        alphas = _alphas(paths, first.key)
        if alphas:
            texts[PACKED_ALPHAS] = alphas
    return texts


def _alphas(paths: Sequence[Path], key: str) -> str:
    """The alphas of a LoRA as JSON; empty if its tensors hold them.

    Raises:
        TrajectoryError: two checkpoints have other alphas.
    """
    path_of: dict[str, Path] = {}
    for path in paths:
        alphas = LoraAlphas.read(path, key=key)
        text = ""
        if alphas is not None:
            text = alphas.model_dump_json(exclude_unset=True)
        path_of.setdefault(text, path)
    if len(path_of) > 1:
        first, second = [*path_of.values()][:2]
        raise TrajectoryError(
            f"{second}: its LoRA has other alphas than {first}, so their weights cannot be combined: {_ADVICE}."
        )
    return next(iter(path_of), "")


def check_alphas(layout: Layout, varying: Collection[str]) -> None:
    """Refuse a LoRA whose tensors ``.alpha`` differ between checkpoints: each scales the tensors beside it.

    Raises:
        TrajectoryError: naming one.
    """
    if lora_flavour(layout.shapes) is None:
        return
    name = next((name for name in sorted(varying) if name.endswith(".alpha")), None)
    if name is not None:
        raise TrajectoryError(
            f"{name}: its alpha differs between checkpoints, so their weights cannot be combined: {_ADVICE}."
        )
