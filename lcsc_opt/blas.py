"""How many threads numpy's BLAS has, which is one setting for the whole process.

Optimizers compute with one, since another number changes CMA-ES's sequence and makes it ten times slower; metrics of
few features do so, too, and others take all. Where a metric is computed beside an optimizer, in another thread, neither
may change the number under the other, so one waits for the other.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator

from threadpoolctl import ThreadpoolController

_lock = threading.RLock()


@contextlib.contextmanager
def blas_threads(count: int | None) -> Iterator[None]:
    """While this is open, numpy's BLAS has ``count`` threads, or as many as before, and nobody else changes that."""
    with _lock:
        if count is None:
            yield
        else:
            with _controller().limit(limits=count, user_api="blas"):
                yield


@functools.cache
def _controller() -> ThreadpoolController:
    """Made once: looking for the libraries takes milliseconds."""
    import numpy as np  # noqa: F401 - loads the BLAS that is to be found

    return ThreadpoolController()
