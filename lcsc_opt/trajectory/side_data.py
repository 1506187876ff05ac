"""What lies beside the weights of checkpoints and belongs to all of them: headers, alphas of a LoRA, configurations."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.folders import find_weights
from lcsc_opt.checkpoints.lora import PACKED_ALPHAS, LoraAlphas, lora_flavour
from lcsc_opt.checkpoints.reading import Checkpoint, read_metadata
from lcsc_opt.trajectory.manifest import HEADER

_CONFIG = "config.json"  # of diffusers and transformers
_NOT_OF_THE_MODEL = ("_name_or_path", "_diffusers_version", "transformers_version", "use_cache")
_ADVICE = "leave one part of the run out (first_step, last_step)"


def side_data(paths: Sequence[Path], first: Checkpoint) -> dict[str, str]:
    """What a trajectory keeps of it: the texts that all headers have, and the alphas.

    Raises:
        TrajectoryError: alphas or configurations differ, by which weights mean something else.
    """
    _check_configurations(paths, first.key)
    headers = [set(read_metadata(path).items()) for path in paths]
    shared = dict(sorted(set.intersection(*headers)))
    header = {HEADER: json.dumps(shared)} if shared else {}
    alphas = "" if lora_flavour(first.tensors) is None else _alphas(paths, first.key)
    return {**header, PACKED_ALPHAS: alphas} if alphas else header


def _alphas(paths: Sequence[Path], key: str) -> str:
    """The alphas of a LoRA as JSON, which are the same in all checkpoints; empty if its tensors hold them."""
    found: dict[str, Path] = {}
    for path in paths:
        with contextlib.suppress(TrajectoryError):  # the error comes when the alphas are needed
            alphas = LoraAlphas.read(path, key=key)
            text = "" if alphas is None else alphas.model_dump_json(exclude_unset=True)
            found.setdefault(text, path)
    if len(found) > 1:
        one, other = [*found.values()][:2]
        raise TrajectoryError(
            f"{other}: its LoRA has other alphas than {one}, so their weights cannot be combined: {_ADVICE}."
        )
    return next(iter(found), "")


def _check_configurations(paths: Sequence[Path], key: str) -> None:
    """Refuse checkpoints whose models were configured differently, as with another ``prediction_type``."""
    first: dict[str, Any] | None = None
    for path in paths:
        config = _configuration(path, key)
        first = config if first is None else first
        if config is None or first is None:
            continue
        differing = [name for name in sorted(first.keys() | config.keys()) if first.get(name) != config.get(name)]
        if differing:
            name = differing[0]
            raise TrajectoryError(
                f"{path}: its {_CONFIG} has {name} {config.get(name)!r}, and that of {paths[0]} {first.get(name)!r}, "
                f"so their weights cannot be combined: {_ADVICE}."
            )


def _configuration(path: Path, key: str) -> dict[str, Any] | None:
    """The settings of the model beside the weights of a checkpoint's folder; ``None`` without any."""
    try:
        folder = find_weights(path, key or None).file.parent
        settings = json.loads((folder / _CONFIG).read_bytes())
    except (TrajectoryError, OSError, ValueError, RecursionError):  # a file, or a folder without one
        return None
    if not isinstance(settings, dict):
        return None
    return {name: value for name, value in settings.items() if name not in _NOT_OF_THE_MODEL}
