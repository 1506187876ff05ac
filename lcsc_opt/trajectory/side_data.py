"""What lies beside the weights of checkpoints and belongs to all of them: headers, alphas of a LoRA, configurations."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.folders import folder_of_weights
from lcsc_opt.checkpoints.lora import PACKED_ALPHAS, LoraAlphas, lora_flavour
from lcsc_opt.checkpoints.reading import Checkpoint, read_metadata
from lcsc_opt.trajectory.layout import Layout
from lcsc_opt.trajectory.manifest import HEADER

_CONFIG = "config.json"  # of diffusers and transformers
_CLASS = "_class_name"  # of diffusers; its other names that begin so are the library's notes
_NOT_OF_THE_MODEL = (
    "transformers_version",
    "use_cache",
    # what diffusers' EMAModel adds to the settings of its network; some grow with the training
    "decay",
    "inv_gamma",
    "min_decay",
    "optimization_step",
    "power",
    "update_after_step",
    "use_ema_warmup",
)
_ADVICE = "leave one part of the run out (first_step, last_step)"


def side_data(paths: Sequence[Path], first: Checkpoint) -> dict[str, str]:
    """What a trajectory keeps of it: the texts that all headers have, and the alphas.

    Raises:
        TrajectoryError: alphas or configurations differ, by which weights mean something else.
    """
    _check_configurations(paths, first.key)
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
    """Refuse a LoRA whose tensors ``.alpha`` differ between checkpoints: they say what the other tensors mean.

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


def _check_configurations(paths: Sequence[Path], key: str) -> None:
    """Refuse checkpoints whose models were configured differently, as with another activation."""
    settings_of = {path: _configuration(path, key) for path in paths}
    configurations = [(path, settings) for path, settings in settings_of.items() if settings is not None]
    for path, settings in configurations:
        first_path, first = configurations[0]
        for name in sorted(first | settings):
            if first.get(name) != settings.get(name):
                raise TrajectoryError(
                    f"{path}: its {_CONFIG} has {name} {settings.get(name)!r}, and that of {first_path} "
                    f"{first.get(name)!r}, so their weights cannot be combined: {_ADVICE}."
                )


def _configuration(path: Path, key: str) -> dict[str, Any] | None:
    """The settings of the model beside the weights of a checkpoint's folder; ``None`` without any."""
    try:
        settings = json.loads((folder_of_weights(path, key) / _CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(settings, dict):
        return None
    notes = {name for name in settings if name.startswith("_") and name != _CLASS}
    return {name: value for name, value in settings.items() if name not in notes.union(_NOT_OF_THE_MODEL)}
