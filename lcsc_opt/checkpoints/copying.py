"""Copies of what a file holds beside its weights: plain data, without any record of a pickle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lcsc_opt.checkpoints.pickles import FloatKey, Record, shown

_MAX_DEPTH = 64  # of containers in one another: a hostile file would exceed the depth of recursion
_PLAIN = (str, int, float, bool, type(None))
_NOT_PLAIN = object()  # stands for what cannot be copied, since ``None`` is plain data


class PlainCopier:
    """Copies plain data, with ``tensors`` for references by their identity. What it cannot copy, it leaves out.

    Each part is copied once, however often a hostile file names it.

    Attributes:
        left_out: the places of what was left out.
    """

    def __init__(self, tensors: Mapping[int, Tensor]) -> None:
        self._tensors = tensors
        self._copies: dict[int, Any] = {}
        self.left_out: list[str] = []

    def copy(self, value: Any, place: str, depth: int = 0) -> Any:
        """A copy, in which dicts lack their entries that are not plain data; ``_NOT_PLAIN`` for anything else.

        ``place`` is where in the file the value is, such as ``hyper_parameters.lr``; ``depth``, in how many containers.
        """
        if type(value) in _PLAIN:
            return value
        if id(value) in self._tensors:
            return self._tensors[id(value)]
        # NVlabs' dict whose entries are attributes, too
        if isinstance(value, Record) and value.name.endswith(".EasyDict") and not value.args:
            value = value.items or {}
        if not isinstance(value, (dict, list, tuple)) or depth > _MAX_DEPTH:
            return _NOT_PLAIN
        if id(value) not in self._copies:
            self._copies[id(value)] = _NOT_PLAIN  # until it is copied, since it may contain itself
            if isinstance(value, dict):
                self._copies[id(value)] = self._copy_entries(value, place, depth)
            else:
                copies = [self.copy(element, f"{place}.{index}", depth + 1) for index, element in enumerate(value)]
                # a list without one of its elements would have the next one in its place
                if not any(copied is _NOT_PLAIN for copied in copies):
                    self._copies[id(value)] = type(value)(copies)
        return self._copies[id(value)]

    def _copy_entries(self, entries: Mapping[Any, Any], place: str, depth: int) -> dict[Any, Any]:
        """The entries that are plain data; what has another key than text or a number is left out."""
        copies = {}
        for name, value in entries.items():
            inner_place = f"{place}.{shown(name)}".lstrip(".")
            copied = self.copy(value, inner_place, depth + 1)
            if copied is _NOT_PLAIN or type(name) not in (str, int, FloatKey):
                self.left_out.append(inner_place)
            elif type(name) is FloatKey:
                copies[float(name)] = copied
            else:
                copies[name] = copied
        return copies
