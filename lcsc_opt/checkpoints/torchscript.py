"""The tensors of a TorchScript archive, without loading the program that it holds.

OpenAI publishes CLIP as such an archive: a zip file with source code, a pickle that describes the module tree, and
one member for each storage. Only the tree and the storages are read.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcsc_opt.base.errors import MetricError
from lcsc_opt.checkpoints.feature_pickles import read_pickle

DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
MAX_DEPTH = 64


def is_torchscript(path: Path) -> bool:
    """Whether ``path`` is a zip file with a program and constants in it, as ``torch.jit.save`` writes."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.partition("/")[2] == "constants.pkl" for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Parameters and buffers by their dotted names, on the CPU.

    Raises MetricError when the archive is broken, compressed, or holds anything but a tree of modules.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _Archive(archive).state_dict()
    except MetricError as error:
        raise MetricError(f"{path}: {error}") from error


class _Archive:
    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        self._root = archive.namelist()[0].partition("/")[0]
        self._storages: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Tensor]:
        return dict(_tensors(read_pickle(self._member("data.pkl"), _stand_ins(), self._storage), "", 0))

    def _member(self, name: str) -> bytes:
        try:
            info = self._archive.getinfo(f"{self._root}/{name}")
        except KeyError as error:
            raise MetricError(f"is a TorchScript archive without {name}") from error
        if info.compress_type != zipfile.ZIP_STORED:
            raise MetricError("is a compressed TorchScript archive; torch.jit.save writes no such file")
        return self._archive.read(info)

    def _storage(self, pid: Any) -> Tensor:
        """A persistent id ``("storage", type, key, location, numel)`` → the storage as a flat tensor."""
        kind, dtype, key = pid[:3]
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not str(key).isdigit():
            raise MetricError("is a TorchScript archive with unknown references")
        if key not in self._storages:
            content = bytearray(self._member(f"data/{key}"))
            self._storages[key] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return self._storages[key]


def _stand_ins() -> Any:
    """Names in the archive → what they stand for; made anew for each file, since a pickle can change attributes."""

    class Module:
        """A module of the tree: nothing but its attributes."""

        attributes: dict[str, Any]

        def __setstate__(self, state: Any) -> None:
            self.attributes = dict(state) if isinstance(state, dict) else {}

    def rebuild(storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
        tensor = torch.as_strided(storage, tuple(size), tuple(stride), offset)
        if tensor.numel() > storage.numel():
            raise MetricError("is a TorchScript archive with a tensor larger than its storage")
        return tensor

    def find(module: str, name: str) -> Any:
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return rebuild
        if module == "torch.jit._pickle":
            return lambda values, *_: values
        if module == "collections" and name == "OrderedDict":
            return lambda *_: {}
        if module.startswith("__torch__"):
            return Module
        raise MetricError(f"is a TorchScript archive that wants {module}.{name}; only weights are read")

    return find


def _tensors(module: Any, prefix: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    if depth > MAX_DEPTH:
        raise MetricError("is a TorchScript archive whose modules hold each other")
    for name, value in getattr(module, "attributes", {}).items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif hasattr(value, "attributes"):
            yield from _tensors(value, f"{prefix}{name}.", depth + 1)
