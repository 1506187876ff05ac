"""Any Python callable over coefficients as an objective.

    objective:
      file: function.py
      settings: {callable: "my_module:my_function", steps: [100, 200, 300]}

``my_function(coefficients)`` gets a float64 array ``[K]`` that sums to one and returns a number, lower is better.
``my_module`` is looked for where Python looks, in the working directory, and beside the study file.
"""

from __future__ import annotations

import importlib
from typing import Any

from lcsc_opt.errors import ObjectiveError
from lcsc_opt.objective import CoefficientFunction, Objective
from lcsc_opt.study_spec import FrozenModel, parse_settings


class Settings(FrozenModel):
    """``callable`` is ``module:function``; ``steps`` are the training steps of the checkpoints."""

    callable: str
    steps: list[int]


def build(settings: dict[str, Any]) -> Objective:
    """Import the function and wrap it."""
    checked = parse_settings(Settings, settings, source="objective.settings")
    module_name, _, function_name = checked.callable.partition(":")
    if not module_name or not function_name:
        raise ObjectiveError(f"callable: expected 'module:function', got {checked.callable!r}")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ObjectiveError(f"callable: {checked.callable!r} cannot be imported: {error}") from error
    return CoefficientFunction(function, checked.steps, name=checked.callable)
