"""How checks report a broken contract."""

from __future__ import annotations


def require(kept: bool, broken: str) -> None:
    """Raise a :class:`AssertionError` that says what is ``broken``, unless it is ``kept``."""
    if not kept:
        raise AssertionError(broken)
