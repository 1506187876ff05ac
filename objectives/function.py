"""Any Python callable over coefficients as an objective.

    objective:
      file: function.py
      settings: {callable: "my_module:my_function", steps: [100, 200, 300]}

``my_function(coefficients)`` gets a float64 array ``[K]`` that sums to one and returns a number, lower is better.
With ``gradient: "my_module:my_gradient"``, which returns ``[K]`` numbers, gradients can be followed, too.
With ``held_out: "my_module:my_function_on_other_data"`` the answer has a held-out loss; without it there is none.
``my_module`` is imported like any module; it may also be in the working directory or next to the study file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lcsc_opt.base.imports import import_dotted
from lcsc_opt.base.settings import FrozenModel, parse_settings
from lcsc_opt.objective.contract import CoefficientFunction, Objective


class Settings(FrozenModel):
    """``callable``, ``gradient`` and ``held_out`` are ``module:function``; ``steps`` are those of the checkpoints."""

    callable: str
    steps: list[int]
    gradient: str | None = None
    held_out: str | None = None


def build(settings: dict[str, Any]) -> Objective:
    """Import the function and wrap it."""
    checked = parse_settings(Settings, settings, source="objective.settings")
    return CoefficientFunction(
        import_dotted(checked.callable, setting="callable"),
        checked.steps,
        name=checked.callable,
        gradient=_optional(checked.gradient, setting="gradient"),
        held_out=_optional(checked.held_out, setting="held_out"),
        held_out_name=checked.held_out,
    )


def _optional(name: str | None, *, setting: str) -> Callable[..., Any] | None:
    """The function of that name, ``module:function``; ``None`` without a name."""
    if name is None:
        return None
    return import_dotted(name, setting=setting)
