"""Any network of torch, and any way to sample from it.

    objective:
      file: torch_module.py
      settings:
        checkpoints: runs/3/ckpt_*.pt
        model: my_package.models:build_unet         # called with model_settings; returns a torch.nn.Module
        model_settings: {width: 128}
        sampler: my_package.sampling:sample         # called as sample(model, noise, **sampler_settings)
        sampler_settings: {steps: 4}
        image_shape: [3, 32, 32]
        nfe: 4
        reference: cifar10-train.npz

Both modules are imported like any other; they may also be in the working directory or next to the study file.
``sample`` gets standard normal noise ``[N, *image_shape]`` and returns images ``[N, C, H, W]``, nominally in [-1, 1],
not clipped. If it has parameters of these names, it also gets

* ``labels``: the classes ``[N]`` (``labels: balanced``, ``random``, one class, or a number for each, of ``classes``);
* ``nfe``: the number of model calls per image; counted if it is not given;
* ``draw``: ``draw(1)``, ``draw(2)``, … return more noise of the same shape, for samplers that add noise in every step.
  A sampler's own ``torch.randn`` is seeded, too, but its numbers depend on the batch size.

``also: {sampler_settings: {steps: 50}, nfe: 50}`` is a second way to sample, in which reports measure the answer once
more.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field, JsonValue
from torch import nn

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.imports import has_parameter, import_dotted
from lcsc_opt.base.paths import BuildContext
from lcsc_opt.base.settings import AlsoSettings, Count, parse_settings, second_of
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.settings import ImageObjectiveSettings
from lcsc_opt.sampling import ClassLabels, FunctionSampler, Labels
from lcsc_opt.sampling.network import unshared


class Settings(ImageObjectiveSettings, AlsoSettings):
    """The settings of all objectives over images, and the two functions with their arguments."""

    model: str
    model_settings: dict[str, JsonValue] = Field(default={})
    sampler: str
    sampler_settings: dict[str, JsonValue] = Field(default={})
    image_shape: Annotated[list[Count], Field(min_length=1)]
    nfe: Count | None = None
    classes: Count | None = None
    labels: Labels | None = None

    def function_sampler(self, context: BuildContext, network: nn.Module | None = None) -> FunctionSampler:
        """The sampler of a network; without one, of a new one, with the weights that it begins with.

        Raises:
            ObjectiveError: a function cannot be imported, or the first one makes no network.
        """
        function = import_dotted(self.sampler, setting="sampler", functions=context.functions)
        needs_labels = has_parameter(function, "labels", required=True) and "labels" not in self.sampler_settings
        if self.classes is None and (needs_labels or self.labels is not None):
            raise ObjectiveError(
                f"sampler: two settings say what the parameter labels of {self.sampler} gets: classes, how many there "
                "are, and labels: balanced, random, one of them, or how many images each has"
            )
        labels = ClassLabels.choose(self.labels, classes=self.classes)
        if labels is not None and not _takes_labels(function):
            raise ObjectiveError(
                f"sampler: {self.sampler} has no parameter labels, which would get the classes of the images: add it, "
                "or leave out classes"
            )
        if network is None:
            network = _network(self, context)
        return FunctionSampler(
            network,
            function,
            nfe=self.nfe,
            noise=self.noise(self.image_shape, labels),
            options=self.sampler_settings,
            settings=self,
            name=f"{self.model}, {self.sampler}",  # without their settings, which may name places and secrets
        )


def _takes_labels(function: Callable[..., Any]) -> bool:
    """Whether a function can be called with ``labels``."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # of one that is built in, Python does not know
        return True
    return any(parameter.name == "labels" or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def build(settings: dict[str, Any], context: BuildContext) -> Objective:
    """Import the functions and build the network; every candidate's weights come from the checkpoints."""
    checked = parse_settings(Settings, settings, source="objective.settings")
    checked.check(context)
    sampler = checked.function_sampler(context)
    second = second_of(checked)
    also = None if second is None else second.function_sampler(context, sampler.network)
    return checked.objective(sampler, checked.trajectory(context), context, also=also)


def _network(checked: Settings, context: BuildContext) -> nn.Module:
    """What the function ``model`` makes. Raises ObjectiveError if it refuses its arguments, or makes no network."""
    factory = import_dotted(checked.model, setting="model", functions=context.functions)
    try:
        network = factory(**checked.model_settings)
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ObjectiveError(f"model_settings: {checked.model} refuses {checked.model_settings}: {reason}") from error
    if not isinstance(network, nn.Module):
        raise ObjectiveError(f"model: {checked.model} returned a {type(network).__name__}; expected a torch.nn.Module")
    return unshared(network)
