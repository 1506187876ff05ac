"""Weights in memory: writing them as safetensors, their digest, and how two models differ."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError


def write_safetensors(tensors: dict[str, Tensor], path: Path, texts: Mapping[str, str]) -> None:
    """Write tensors, with texts in the header.

    The bytes are the same each time: the texts are sorted, since safetensors leaves their order open.

    Raises:
        TrajectoryError: a tensor has a dtype that safetensors does not know.
        OSError, safetensors.SafetensorError: the disk refuses.
    """
    try:
        save_file(tensors, path, metadata=dict(texts))
    except KeyError as error:  # of its table of dtypes
        unknown = next((name for name, tensor in tensors.items() if tensor.dtype in error.args), "")
        raise TrajectoryError(
            f"Tensor {unknown!r} is {error.args[0]}, which safetensors cannot hold: write a .pt file (--as pt)."
        ) from error
    with path.open("r+b") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(size))
        ordered = {**header, "__metadata__": dict(sorted(texts.items()))}
        content = json.dumps(ordered, ensure_ascii=False, separators=(",", ":")).encode().ljust(size)
        if len(content) == size:  # else the header is written in another way, and is left as it is
            file.seek(8)
            file.write(content)


def weights_sha256(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of all names, dtypes, shapes and values, whatever their order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def difference(given: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    """How names and shapes differ from those that are expected, in words, or ``None`` if they are the same.

    Args:
        given: name → tensor or shape.
        expected: name → tensor or shape.

    Returns:
        The rest of a sentence after "it": ``lacks 'a' and 3 more, has also 'b', has 'c' as [2] and not [3]``.
    """
    lacks, adds = sorted(expected.keys() - given), sorted(given.keys() - expected)
    both = [
        (name, *(list(getattr(one[name], "shape", one[name])) for one in (given, expected)))
        for name in given.keys() & expected
    ]
    kinds = (
        [f"lacks {name!r}" for name in lacks],
        [f"has also {name!r}" for name in adds],
        [f"has {name!r} as {own} and not {wanted}" for name, own, wanted in sorted(both) if own != wanted],
    )
    parts = [found[0] + (f" and {len(found) - 1} more" if len(found) > 1 else "") for found in kinds if found]
    return ", ".join(parts) or None
