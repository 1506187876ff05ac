"""Checks of the optimizers' options; an error is one line that names the option and says what it takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

from lcsc_opt.base.errors import StudySpecError


def check(valid: bool, name: str, expected: str, value: object) -> None:
    """Raise an error unless an option is valid.

    Raises:
        StudySpecError: ``name: expected …, got …``.
    """
    if not valid:
        raise StudySpecError(f"{name}: expected {expected}, got {value!r}")


def check_count(name: str, value: object, *, least: int = 1) -> None:
    """Check that an option is a whole number from ``least``.

    Raises:
        StudySpecError: it is anything else.
    """
    check(is_whole(value) and cast("int", value) >= least, name, f"a whole number from {least}", value)


def check_positive(name: str, value: object) -> None:
    """Check that an option is a finite number above 0.

    Raises:
        StudySpecError: it is anything else.
    """
    check(is_number(value) and cast("float", value) > 0, name, "a number above 0", value)


def check_numbers(name: str, values: object) -> None:
    """Check that an option is a list of numbers, or ``None`` for the default.

    Raises:
        StudySpecError: it is anything else, or empty.
    """
    if values is None:
        return
    listed = isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0
    valid = listed and all(is_number(value) for value in cast("Sequence[object]", values))
    check(valid, name, "a list of numbers", values)


def is_number(value: object) -> bool:
    """Whether a value is a finite number; ``True`` is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: object) -> bool:
    """Whether a value is a whole number; ``True`` is none."""
    return isinstance(value, int) and not isinstance(value, bool)
