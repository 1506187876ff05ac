"""The classes and calls that torch writes into pickles: what each stands for, without making it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lcsc_opt.checkpoints.contents import Name, StorageRef, TensorRef

MAX_ARGUMENTS = 8  # of the calls that rebuild a tensor
MAX_DIMENSIONS = 64  # which is torch's own limit
STORAGE_TYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
    "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8,
    "QInt32Storage": torch.qint32,
}


def _size(args: tuple[Any, ...]) -> Any:
    return args[0] if len(args) == 1 and type(args[0]) is tuple else None


def _members(args: tuple[Any, ...]) -> Any:
    """A set, as a list, so that nothing is hashed."""
    return args[0] if args and type(args[0]) is list else []


def _tensor(args: tuple[Any, ...]) -> TensorRef | None:
    """``torch._utils._rebuild_tensor`` and ``_rebuild_tensor_v2``."""
    if not 4 <= len(args) <= MAX_ARGUMENTS or type(args[0]) is not StorageRef or any(args[6:]):
        return None
    return _reference(args, args[0].dtype)


def _typed_tensor(args: tuple[Any, ...]) -> TensorRef | None:
    """``torch._utils._rebuild_tensor_v3``: the storage is bytes, the dtype stands beside it."""
    if not 7 <= len(args) <= MAX_ARGUMENTS or type(args[0]) is not StorageRef or any(args[7:]):
        return None
    dtype = getattr(torch, args[6].name, None) if type(args[6]) is Name and args[6].module == "torch" else None
    return _reference(args, dtype) if isinstance(dtype, torch.dtype) else None


def _reference(args: tuple[Any, ...], dtype: torch.dtype) -> TensorRef | None:
    storage, offset, shape, stride = args[:4]
    if not _are_numbers(shape) or not _are_numbers(stride):
        return None
    return TensorRef(storage, dtype, offset, shape, stride)


def _are_numbers(value: Any) -> bool:
    return type(value) is tuple and len(value) <= MAX_DIMENSIONS and all(type(number) is int for number in value)


def _parameter(args: tuple[Any, ...]) -> Any:
    return args[0]


_SETS = ("builtins.set", "__builtin__.set", "builtins.frozenset", "__builtin__.frozenset")
MAKERS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "torch.Size": _size,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    **dict.fromkeys(_SETS, _members),
}
