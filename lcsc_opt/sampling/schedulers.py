"""Schedulers of diffusers by the names that papers give them, made from a pipeline's own configuration."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, model_validator

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.settings import FrozenModel, near_miss

SchedulerName = Literal[
    "ddpm",
    "ddim",
    "dpm-solver++",
    "sde-dpm-solver++",
    "unipc",
    "heun",
    "euler",
    "euler-ancestral",
    "consistency",
    "lcm",
]

SCHEDULERS: dict[SchedulerName, tuple[str, dict[str, str]]] = {
    "ddpm": ("DDPMScheduler", {}),  # Ho et al. 2020
    "ddim": ("DDIMScheduler", {}),  # Song et al. 2021
    "dpm-solver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),  # Lu et al. 2022
    "sde-dpm-solver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),  # Zhao et al. 2023
    "heun": ("HeunDiscreteScheduler", {}),  # Karras et al. 2022, Algorithm 1
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "consistency": ("CMStochasticIterativeScheduler", {}),  # Song et al. 2023, Algorithm 1
    "lcm": ("LCMScheduler", {}),  # Luo et al. 2023, latent consistency models
}
"""Name → class in diffusers, and the settings of its configuration that the name stands for."""


class SchedulerSettings(FrozenModel):
    """``sampler:`` of a study file.

    Attributes:
        name: which scheduler; without it the pipeline's own.
        steps: how many; for most samplers that is the number of model calls.
        timesteps: which ones, in place of ``steps``, if the scheduler takes them: ``[22, 0]`` for a consistency model.
        scheduler: settings that replace those of its configuration: ``{solver_order: 3, clip_sample: false}``.
        step: further arguments of each step: ``{eta: 0.5}`` for DDIM.
    """

    name: SchedulerName | None = None
    steps: Annotated[int, Field(ge=1)] | None = None
    timesteps: Annotated[list[int], Field(min_length=1)] | None = None
    scheduler: dict[str, JsonValue] = Field(default={})
    step: dict[str, JsonValue] = Field(default={})

    @model_validator(mode="after")
    def _steps_or_timesteps(self) -> SchedulerSettings:
        if (self.steps is None) == (self.timesteps is None):
            raise ValueError("expected either steps or timesteps")
        return self


def build_scheduler(
    name: SchedulerName | None, config: Mapping[str, Any] | None, options: Mapping[str, Any] | None = None
) -> Any:
    """A scheduler of diffusers, as ``Scheduler.from_config(config, **options)`` makes it.

    Args:
        name: which one; ``None`` for the one that the configuration names.
        config: a pipeline's ``scheduler_config.json``; missing keys have the scheduler's own defaults.
        options: settings that replace those of ``config``.

    Raises:
        ObjectiveError: no name and no configuration, an unknown option, or values that the scheduler refuses.
    """
    kind, fixed = _scheduler_class(name, config)
    known = [option for option in inspect.signature(kind.__init__).parameters if option != "self"]
    changes = {**fixed, **(options or {})}
    if unknown := [option for option in changes if option not in known]:
        raise ObjectiveError(
            f"sampler.scheduler: {kind.__name__} has no option {unknown[0]!r}{near_miss(unknown[0], known)}; "
            f"it has {', '.join(known)}"
        )
    try:
        with without_deprecations():
            return kind.from_config(dict(config or {}), **changes)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ObjectiveError(f"sampler.scheduler: {kind.__name__}: {' '.join(str(error).split())}") from error


@contextlib.contextmanager
def without_deprecations() -> Iterator[None]:
    """Silence a warning of numpy 2 while this is open: diffusers' schedulers turn tensors into arrays in an old way."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _scheduler_class(name: SchedulerName | None, config: Mapping[str, Any] | None) -> tuple[Any, dict[str, str]]:
    import diffusers

    if name is not None:
        class_name, fixed = SCHEDULERS[name]
        return getattr(diffusers, class_name), fixed
    class_name = str((config or {}).get("_class_name", ""))
    kind = getattr(diffusers, class_name, None) if class_name.isidentifier() else None
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        found = (
            f"the pipeline's {class_name!r} is none of diffusers'" if class_name else "there is no pipeline's to take"
        )
        raise ObjectiveError(f"sampler.name: {found}; name one of {', '.join(SCHEDULERS)}")
    return kind, {}
