"""A profile with numbers that are easy to check."""

from __future__ import annotations

from typing import Any

from lcsc_opt.diagnostics.profiling.parts import Part, Profile


def profile(parts: tuple[Part, ...] = (), **changes: Any) -> Profile:
    """One of these parts, half a second a trial."""
    known: dict[str, Any] = {
        "study": "tiny/LCSC/0",
        "trials": 5,
        "failed": 0,
        "seconds": 0.5,
        "images": 100.0,
        "memory_bytes": 10**9,
        "device_bytes": None,
        "evaluations": 300,
        "studies": 2,
        "device": "cpu",
    }
    return Profile(parts=parts, **{**known, **changes})
