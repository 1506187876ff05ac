"""What a search ran on: versions, BLAS and threads, which decide whether a sequence of candidates comes again."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from typing import Any

import numpy as np  # noqa: F401 - loads the BLAS that is described
from threadpoolctl import threadpool_info

PACKAGES = ("lcsc-opt", "torch", "numpy", "scipy", "nevergrad", "cma", "optuna", "torch-fidelity", "diffusers")


def environment() -> dict[str, Any]:
    """JSON-able: Python, the packages that matter, the BLAS libraries, the number of cores."""
    blas = [info for info in threadpool_info() if info["user_api"] == "blas"]
    described = sorted(f"{b['internal_api']} {b.get('version')} {b.get('architecture', '')}".strip() for b in blas)
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "packages": {name: _version(name) for name in PACKAGES},
        "blas": sorted(set(described)),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def decisive(described: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an environment that decides results; Python's version and the number of cores do not."""
    return {key: described.get(key) for key in ("packages", "blas", "machine")}


def describe_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """``torch 2.13.0 → 2.14.0, cores 2 → 8``, or nothing where they are the same."""
    flat_before, flat_now = _flat(before), _flat(now)
    changed = [key for key in sorted({*flat_before, *flat_now}) if flat_before.get(key) != flat_now.get(key)]
    return ", ".join(f"{key} {flat_before.get(key)} → {flat_now.get(key)}" for key in changed)


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    return {**{key: value for key, value in values.items() if key != "packages"}, **values.get("packages", {})}
