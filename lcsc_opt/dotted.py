"""Functions and classes of the user's own code, by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from lcsc_opt.errors import LcscError, ObjectiveError


def import_dotted(name: str, *, setting: str, error: type[LcscError] = ObjectiveError) -> Callable[..., Any]:
    """Import ``"package.module:function"``, from wherever Python finds it, also beside the study file.

    Args:
        name: what to import.
        setting: where the study file says it, for errors.
        error: what is raised.

    Raises:
        LcscError: of the kind ``error``; it is not of that form, cannot be imported, or cannot be called.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise error(f"{setting}: expected 'module:function', got {name!r}")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as reason:
        raise error(f"{setting}: {name!r} cannot be imported: {reason}") from reason
    if not callable(found):
        raise error(f"{setting}: {name!r} is a {type(found).__name__}; expected a function or a class")
    function: Callable[..., Any] = found
    return function
