"""The environment of a search: versions, BLAS and threads. They decide whether a sequence of candidates repeats."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import random
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController, threadpool_info

_PACKAGES = (
    "lcsc-opt",
    "torch",
    "numpy",
    "scipy",
    "nevergrad",
    "cma",
    "optuna",
    "torch-fidelity",
    "torchvision",
    "diffusers",
    "transformers",
    "peft",
)


def environment() -> dict[str, Any]:
    """JSON-able: Python, the packages that matter, the BLAS libraries, the number of cores."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "blas": _blas_libraries(),
    }


@functools.cache
def _version(package: str) -> str | None:
    """The installed version, or ``None``; cached, since a process keeps what it has imported, whatever is installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _blas_libraries() -> list[str]:
    """The name, version and kernel of each BLAS that is loaded, such as ``openblas 0.3.30 Haswell``."""
    libraries = set()
    for info in threadpool_info():
        if info["user_api"] == "blas":
            kernel = info.get("architecture", "")
            libraries.add(f"{info['internal_api']} {info.get('version')} {kernel}".strip())
    return sorted(libraries)


def derive_seed(seed: int, *name: str | int, bits: int = 63) -> int:
    """A seed for the random stream ``name``, derived from ``seed``: the first ``bits`` (1 to 256) of a SHA-256.

    ``torch.Generator.manual_seed`` accepts 63 bits, ``numpy.random.RandomState`` 32.
    """
    text = json.dumps([seed, *name], separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest, "big") >> (256 - bits)


@contextlib.contextmanager
def seeded_generators(seed: int, *stream: str | int) -> Iterator[None]:
    """While this is open, numpy's and Python's global generators are those of a stream of the seed.

    What is drawn meanwhile does not count for the caller's code.
    """
    of_numpy = np.random.get_state()  # noqa: NPY002 - what others draw from
    of_python = random.getstate()
    np.random.seed(derive_seed(seed, "generators", *stream, bits=32))  # noqa: NPY002
    random.seed(derive_seed(seed, "generators", *stream))
    try:
        yield
    finally:
        np.random.set_state(of_numpy)  # noqa: NPY002
        random.setstate(of_python)


_lock = threading.RLock()


@contextlib.contextmanager
def blas_threads(count: int | None) -> Iterator[None]:
    """While this is open, numpy's BLAS has ``count`` threads, and no other caller of this function changes that.

    ``None`` leaves the number as it is.
    """
    with _lock:
        if count is None:
            yield
        else:
            with _blas().limit(limits=count):
                yield


@functools.cache
def _blas() -> ThreadpoolController:
    """The libraries of :func:`blas_threads`; finding them takes milliseconds."""
    return ThreadpoolController().select(user_api="blas")
