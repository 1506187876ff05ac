"""Numbers of diffusers' schedulers that a study may search: of their configuration, and of each step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lcsc_opt.sampling.base import Tunable

_CHURNING = ("EulerDiscreteScheduler", "EDMEulerScheduler", "FlowMatchHeunDiscreteScheduler")  # others ignore it
_LEAST = 1e-6  # of a noise level, or of a shift


def config_numbers(config: Mapping[str, Any], class_name: str) -> dict[str, Tunable]:
    """Name → number of a scheduler's configuration.

    They are ``shift`` and ``flow_shift`` of flow matching (Esser et al. 2024, Eq. 23), unless the scheduler computes
    its shift from the size of the images; and ``sigma_min``, the last noise level of EDM's schedulers.
    """
    names = []
    if not config.get("use_dynamic_shifting", False):
        names.append("shift")
        if config.get("use_flow_sigmas", False):
            names.append("flow_shift")
    if class_name.startswith("EDM"):
        names.append("sigma_min")
    numbers = {}
    for name in names:
        value = config.get(name)
        if isinstance(value, (int, float)):
            numbers[name] = Tunable(float(value), low=_LEAST)
    return numbers


def step_numbers(options: Mapping[str, Any], class_name: str) -> dict[str, Tunable]:
    """Name → further argument of each step: ``s_churn`` of Karras et al. 2022, Algorithm 2, and ``eta`` of DDIM.

    Args:
        options: the arguments of the settings.
        class_name: of the scheduler.
    """
    numbers = {}
    if class_name in _CHURNING:
        numbers["s_churn"] = Tunable(float(options.get("s_churn", 0.0)), low=0.0)
    if class_name == "DDIMScheduler":
        numbers["eta"] = Tunable(float(options.get("eta", 0.0)), low=0.0, high=1.0)
    return numbers


def with_config(scheduler: Any, changes: Mapping[str, float]) -> Any:
    """The scheduler with other numbers in its configuration; itself if there are none."""
    if not changes:
        return scheduler
    return type(scheduler).from_config(scheduler.config, **changes)
