"""Reading pickles without executing them: every name in them means one of a few harmless stand-ins.

A pickle builds objects by naming functions and classes. Here the reader gives the names that it wants to
understand; any other name is an error, nothing is imported, and what the stand-ins return is plain data.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable
from typing import Any

from lcsc_opt.base.errors import MetricError

MAX_BYTES = 2**30
Find = Callable[[str, str], Any]
Fetch = Callable[[Any], Any]


def read_pickle(content: bytes, find: Find, fetch: Fetch | None = None) -> Any:
    """What ``content`` describes.

    Args:
        content: the pickle.
        find: module, name → what the name stands for; raises MetricError for names that it does not know.
        fetch: a persistent id → what it stands for, where the format has them.

    Raises MetricError for a pickle that is broken, too large, or wants anything else.
    """
    if len(content) > MAX_BYTES:
        raise MetricError(f"is a pickle of {len(content)} bytes, more than such a file has")
    try:
        _check_memo(content)
        return _Reader(io.BytesIO(content), find, fetch).load()
    except MetricError:
        raise
    except Exception as error:  # a broken pickle raises anything
        raise MetricError(f"is a broken pickle ({type(error).__name__})") from error


def _check_memo(content: bytes) -> None:
    """Refuse an index that would make the reader allocate a table far larger than the file."""
    for code, argument, _ in pickletools.genops(content):
        if code.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(str(argument)) > len(content):
            raise MetricError("is a broken pickle (memo)")


class _Reader(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, find: Find, fetch: Fetch | None) -> None:
        super().__init__(stream, encoding="latin1")
        self._find, self._fetch = find, fetch

    def find_class(self, module: str, name: str) -> Any:
        return self._find(module, name)

    def persistent_load(self, pid: Any) -> Any:
        if self._fetch is None:
            raise MetricError("is a pickle with references to other files")
        return self._fetch(pid)
