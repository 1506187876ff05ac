"""Sampling by a function of the user's own."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.progress import notice
from lcsc_opt.base.records import Noise
from lcsc_opt.sampling.differentiation import recomputed_calls
from lcsc_opt.sampling.labels import ClassLabels
from lcsc_opt.sampling.network import NetworkSampler, NetworkSettings, PreparedNetwork, raised
from lcsc_opt.sampling.noise import ImageNoise

HIGHEST = 2.0  # images without a negative value are taken for bytes if they reach this


class FunctionSampler(NetworkSampler):
    """Images from ``function(model, noise, **options)``: any network, and any way to sample from it.

    The function gets the network with the merged weights in it and standard normal noise ``[N, *image_shape]``, both
    on the device, and returns images ``[N, C, H, W]``; they are clipped to [-1, 1]. If it has parameters of these
    names, it also gets ``labels``, the classes ``[N]``; ``nfe``; and ``draw``. ``draw(1)``, ``draw(2)``, … give more
    noise of the same shape, for samplers that add noise in every step. It must draw no other random numbers:
    images would no longer depend only on their index.

    Args:
        model: gets the merged weights.
        function: samples.
        image_shape: of the noise of one image.
        nfe: model calls per image, for the cost that is reported.
        noise: where all noise comes from.
        labels: the classes of a class-conditional model.
        options: further arguments of the function.
        settings: how the network is run.
        name: of model and function in the study's fingerprint.

    Raises:
        ObjectiveError: there are labels and the function has no parameter for them; an option that it does not have.
    """

    def __init__(
        self,
        model: nn.Module,
        function: Callable[..., Tensor],
        *,
        image_shape: Sequence[int],
        nfe: int,
        noise: ImageNoise,
        labels: ClassLabels | None = None,
        options: Mapping[str, Any] | None = None,
        settings: NetworkSettings | None = None,
        name: str | None = None,
    ) -> None:
        self.function, self.options = function, dict(options or {})
        self.image_shape, self.noise, self.labels = tuple(image_shape), noise, labels
        self.name = name or f"{type(model).__name__}, {function.__name__}"
        self._parameters = _parameters(function)
        self._nfe, self._looked_at = nfe, False
        self._told = {"nfe": nfe} if self._parameters is not None and "nfe" in self._parameters else {}
        self._network = PreparedNetwork(model, settings)
        if labels is not None and not self._has("labels"):
            raise ObjectiveError(f"labels: the sampler {self.name} has no parameter 'labels' to take them")
        if unknown := [option for option in self.options if not self._has(option)]:
            raise ObjectiveError(f"sampler_settings: the sampler {self.name} has no parameter {unknown[0]!r}")

    @property
    def nfe(self) -> int:
        """Model calls per image."""
        return self._nfe

    @property
    def recomputed(self) -> int:
        """Model calls per image that a backward pass makes again: all if there are several and no compiler, else 0."""
        return 0 if self._nfe == 1 or self._network.settings.compile else self._nfe

    def sample(self, noise: Noise, start: int, stop: int) -> Tensor:
        """``[stop - start, C, H, W]`` images in [-1, 1].

        Raises:
            ObjectiveError: the function returned something else.
        """

        def draw(index: int) -> Tensor:
            return self._own(self.noise.batch(noise, start, stop, self.image_shape, draw=index).to(self._network.dtype))

        options = {**self._told, **self.options}
        if self.labels is not None:
            options["labels"] = self._own(self.labels.batch(noise, start, stop))
        if self._parameters is not None and "draw" in self._parameters:
            options["draw"] = draw
        before = None if self._looked_at else _state_of(self._network.module)
        again = recomputed_calls(self._network.module) if self.recomputed else contextlib.nullcontext()
        with self._network.arithmetic(), again, torch.set_grad_enabled(torch.is_grad_enabled()):
            images = self.function(self._network.callable, draw(0), **options)
        images = self._checked(images, stop - start)
        if before is not None:
            self._compare(before, _state_of(self._network.module))
            self._look_at(images)
            self._looked_at = True
        return raised(images if torch.is_grad_enabled() else images.detach()).clamp(-1, 1)

    def describe(self) -> dict[str, object]:
        """Settings that change the images. The code is in :attr:`lcsc_opt.objective.contract.Objective.code`."""
        return {
            "sampler": self.name,
            "options": {**self._told, **self.options},
            "image_shape": list(self.image_shape),
            "labels": None if self.labels is None else self.labels.describe(),
            "noise_seed": self.noise.seed,
            "dtype": self._network.settings.dtype,
        }

    def _own(self, kept: Tensor) -> Tensor:
        """A copy on the device. The function may write to it, and other candidates need the original."""
        return kept.to(self._network.device, copy=True)

    def _has(self, parameter: str) -> bool:
        return self._parameters is None or parameter in self._parameters

    def _checked(self, images: Any, count: int) -> Tensor:
        if not isinstance(images, Tensor):
            raise ObjectiveError(f"the sampler {self.name} returned a {type(images).__name__}; expected a tensor")
        if images.ndim != 4 or len(images) != count or not images.is_floating_point():
            raise ObjectiveError(
                f"the sampler {self.name} returned {images.dtype} {list(images.shape)}; "
                f"expected floating point images [{count}, C, H, W] in [-1, 1]"
            )
        return images

    def _compare(self, before: Mapping[str, str], after: Mapping[str, str]) -> None:
        """Refuse a function that changes the model: later images would depend on how many were sampled before."""
        if changed := [name for name in {**before, **after} if before.get(name) != after.get(name)]:
            raise ObjectiveError(
                f"the sampler {self.name} changes the model's {changed[0]}, so images would depend on what was sampled "
                "before: let it leave the model as it was, or change a copy"
            )

    def _look_at(self, images: Tensor) -> None:
        """Warn if the first images seem to have another range. Clipped to [-1, 1], they would be too bright."""
        low, high = (float(value) for value in images.detach().aminmax())
        if 0 <= low < high:
            most, instead = ("1", "2 * images - 1") if high < HIGHEST else ("255", "images / 127.5 - 1")
            notice(
                f"the sampler {self.name} returned no value below 0, as if black were 0 and white {most}; expected "
                f"images in [-1, 1]: let it return {instead}"
            )


def _state_of(model: nn.Module) -> dict[str, str]:
    """What a sampler must leave as it is: whether the model trains, and each parameter, by its sum."""
    sums = {name: str(float(parameter.detach().sum())) for name, parameter in model.named_parameters()}
    return {"training": str(model.training), **sums}


def _parameters(function: Callable[..., Any]) -> set[str] | None:
    """Names that the function takes; ``None`` when it takes any."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return {parameter.name for parameter in parameters}
