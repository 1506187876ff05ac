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
from lcsc_opt.sampling.base import recomputed_calls
from lcsc_opt.sampling.network import NetworkSampler, NetworkSettings
from lcsc_opt.sampling.noise import ClassLabels, ImageNoise

HIGHEST = 2.0  # images without a negative value are taken for bytes if they reach this


class FunctionSampler(NetworkSampler):
    """Images from ``function(model, noise, **options)``: any network, and any way to sample from it.

    The function gets the network with the merged weights in it and standard normal noise ``[N, *image_shape]``, both
    on the device, and returns images ``[N, C, H, W]``; they are clipped to [-1, 1]. If there are labels, it
    also gets ``labels``, the classes ``[N]``; if it has parameters of these names, ``nfe`` and ``draw``. ``draw(1)``,
    ``draw(2)``, … give more noise of the same shape, for samplers that add noise in every step. It must draw no other
    random numbers and remember nothing: images would no longer depend only on their index.

    Args:
        model: gets the merged weights.
        function: samples.
        nfe: model calls per image, for the cost that is reported.
        options: further arguments of the function.
        name: of model and function in the study's fingerprint.
        image_shape, noise, labels, settings: as of :class:`NetworkSampler`.
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
        super().__init__(model, settings, image_shape=image_shape, noise=noise, labels=labels)
        self.function, self.options, self.nfe = function, dict(options or {}), nfe
        self.recomputed = 0 if nfe == 1 or self._network.settings.compile else nfe  # not where a compiler would see it
        self.name = name or f"{type(model).__name__}, {function.__name__}"
        parameters = inspect.signature(function).parameters
        self._draws = "draw" in parameters
        self._looked = False  # at the range of the first images
        if "nfe" in parameters:
            self.options = {"nfe": nfe, **self.options}

    def sample(self, noise: Noise, start: int, stop: int) -> Tensor:
        """``[stop - start, C, H, W]`` images in [-1, 1].

        Raises:
            ObjectiveError: the function returned something else.
        """
        device, dtype = self._network.device, self._network.dtype

        def draw(index: int) -> Tensor:  # a copy: the function may write to it, and other candidates need the original
            return self.noise.batch(noise, start, stop, self.image_shape, draw=index).to(device, dtype, copy=True)

        options = dict(self.options)
        if self.labels is not None:
            options["labels"] = self.labels.batch(noise, start, stop).to(device, copy=True)
        if self._draws:
            options["draw"] = draw
        again = recomputed_calls(self._network.module) if self.recomputed else contextlib.nullcontext()
        with self._network.arithmetic(), again, torch.set_grad_enabled(torch.is_grad_enabled()):
            images: Any = self.function(self._network.module, draw(0), **options)
        if not isinstance(images, Tensor):
            raise ObjectiveError(f"the sampler {self.name} returned a {type(images).__name__}; expected a tensor")
        if images.ndim != 4 or len(images) != stop - start or not images.is_floating_point():
            raise ObjectiveError(
                f"the sampler {self.name} returned {images.dtype} {list(images.shape)}; "
                f"expected floating point images [{stop - start}, C, H, W] in [-1, 1]"
            )
        if not self._looked:
            self._looked = True
            self._look_at(images.detach())
        kept: Tensor = images if torch.is_grad_enabled() else images.detach()
        return kept.to(torch.promote_types(kept.dtype, torch.float32)).clamp(-1, 1)

    def describe(self) -> dict[str, object]:
        """Settings that change the images. The code is in :attr:`lcsc_opt.objective.contract.Objective.code`."""
        return {**super().describe(), "sampler": self.name, "options": self.options}

    def _look_at(self, images: Tensor) -> None:
        """Warn if the first images are not in [-1, 1]."""
        low, high = (float(value) for value in images.aminmax())
        if 0 <= low < high:  # clipped to [-1, 1], they would be too bright
            most, instead = ("1", "2 * images - 1") if high < HIGHEST else ("255", "images / 127.5 - 1")
            notice(
                f"the sampler {self.name} returned no value below 0, as if black were 0 and white {most}; expected "
                f"images in [-1, 1]: let it return {instead}"
            )
