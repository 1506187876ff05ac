"""Sampling by a function of the user's own."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lcsc_opt.base import accelerator
from lcsc_opt.base.errors import RAISED_BY_USERS, LcscError, ObjectiveError, one_line
from lcsc_opt.base.imports import has_parameter
from lcsc_opt.base.progress import without_bars
from lcsc_opt.base.records import SEARCH, Noise
from lcsc_opt.base.reproducibility import derive_seed
from lcsc_opt.checkpoints.weights import running_statistics
from lcsc_opt.sampling.base import compiled_as_eager, recomputed_calls
from lcsc_opt.sampling.network import NetworkSampler, NetworkSettings
from lcsc_opt.sampling.noise import ImageNoise


class FunctionSampler(NetworkSampler):
    """Images from ``function(model, noise, **options)``: any network, and any way to sample from it.

    The function gets the network with the merged weights in it and standard normal noise ``[N, *shape]``, both
    on the device, and returns images ``[N, C, H, W]``, nominally in [-1, 1] and best not clipped: networks of metrics
    see them clipped, and reports say how much that changes. If there are labels, it
    also gets ``labels``, the classes ``[N]``; if it has parameters of these names, ``nfe`` and ``draw``. ``draw(1)``,
    ``draw(2)``, … give more noise of the same shape, for samplers that add noise in every step. It must remember
    nothing. Torch's own random numbers are seeded before each call, so the same images come again; but unlike those of
    ``draw`` they depend on the batch size, too.

    Args:
        model: gets the merged weights.
        function: samples.
        nfe: model calls per image; ``None`` counts them while one image is sampled.
        options: further arguments of the function.
        name: the name of model and function in the study's fingerprint.
        noise, settings: as of :class:`NetworkSampler`.
    """

    def __init__(
        self,
        model: nn.Module,
        function: Callable[..., Tensor],
        *,
        nfe: int | None = None,
        noise: ImageNoise,
        options: Mapping[str, Any] | None = None,
        settings: NetworkSettings | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(model, settings, noise=noise)
        self.function = function
        self._nfe = nfe
        self.name = name or f"{type(model).__name__}, {function.__name__}"
        self.options: dict[str, Any] = {}
        if nfe is not None and has_parameter(function, "nfe"):
            self.options["nfe"] = nfe
        self.options |= options or {}
        self._takes_draw = has_parameter(function, "draw")

    @property
    def nfe(self) -> int:  # type: ignore[override]
        """Model calls per image.

        Raises:
            ObjectiveError: they have to be counted, and the function raised an error.
        """
        if self._nfe is None:
            self._nfe = self._counted_calls()
        return self._nfe

    @property
    def recomputed(self) -> int:  # type: ignore[override]
        """How many of these calls a backward pass makes again: all, or none of one, where that saves no memory."""
        return self.nfe if self.nfe > 1 else 0

    def sample(self, noise: Noise, start: int, stop: int) -> Tensor:
        """``[stop - start, C, H, W]`` images, nominally in [-1, 1], in float32 or wider.

        Raises:
            ObjectiveError: the function returned something else.
        """
        with contextlib.ExitStack() as stack:
            if self.recomputed:
                stack.enter_context(recomputed_calls(self._network.module))
            images = self._checked(self._returned(noise, start, stop), stop - start)
        if not torch.is_grad_enabled():
            images = images.detach()  # a function may turn gradients on for itself, and its graph would hold memory
        return images.to(torch.promote_types(images.dtype, torch.float32))

    def _returned(self, noise: Noise, start: int, stop: int) -> Any:
        """What the function returns for these images."""
        device = self._network.device
        dtype = self._network.dtype

        def draw(index: int) -> Tensor:
            z = self.noise.batch(noise, start, stop, draw=index)
            return z.to(device, dtype, copy=True)  # the function may write to it; other candidates need the original

        options = dict(self.options)
        classes = self.noise.classes(noise, start, stop)
        if classes is not None:
            options["labels"] = classes.to(device, copy=True)
        if self._takes_draw:
            options["draw"] = draw
        with contextlib.ExitStack() as stack:
            own_seed = derive_seed(self.noise.seed, "own", noise.group, noise.seed, start)
            stack.enter_context(accelerator.seeded(own_seed, device))
            stack.enter_context(self._network.arithmetic())
            stack.enter_context(without_bars())
            # restores grad mode, if the function changes it
            stack.enter_context(torch.set_grad_enabled(torch.is_grad_enabled()))
            return self.function(self._network.module, draw(0), **options)

    def why_no_graph(self) -> str | None:
        """Why images have no graph, or ``None``. This samples two images, with the weights that are in the network."""
        state = self.weights.state  # of an adapter, if that is what is merged
        # torch has no gradient in the statistics of normalizations
        names = state.keys() - {name for statistics in running_statistics(state) for name in statistics}
        try:
            with torch.enable_grad(), self.weights.differentiable(names):
                images = self.sample(SEARCH, 0, 2)
        except (LcscError, torch.OutOfMemoryError):  # the second says nothing about the function
            raise
        except RAISED_BY_USERS as error:  # such as of numpy(), which refuses tensors with a graph
            return f"with an autograd graph, {self.name} raised {one_line(error)}"
        if images.requires_grad:
            return None
        return f"the images of {self.name} have no autograd graph; let it sample without no_grad and inference_mode"

    def describe(self) -> dict[str, object]:
        """Settings that change the images. The code is in :attr:`lcsc_opt.objective.contract.Objective.code`."""
        return {**super().describe(), "sampler": self.name, "options": self.options}

    @torch.no_grad()
    def _counted_calls(self) -> int:
        """How often one image calls the network: the calls of its largest part that is called.

        A wrapper around the network may never be called itself. Where no part is, it counts as one call.
        """
        modules = self._network.module.modules()
        # one that was compiled to TorchScript takes no hooks
        calls = dict.fromkeys((module for module in modules if not isinstance(module, torch.jit.ScriptModule)), 0)

        def count(module: nn.Module, _: Any) -> None:
            calls[module] += 1

        hooks = [module.register_forward_pre_hook(count) for module in calls]
        try:
            with compiled_as_eager():  # a compiled network would compile the hooks, too
                self._returned(SEARCH, 0, 1)
        except RAISED_BY_USERS as error:
            place = traceback.extract_tb(error.__traceback__)[-1]  # where it was raised
            raise ObjectiveError(
                f"the sampler {self.name} raised {one_line(error)} ({place.filename}, line {place.lineno})"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        called = [module for module in calls if calls[module]]
        if not called:
            return 1
        largest = max(called, key=lambda module: sum(parameter.numel() for parameter in module.parameters()))
        return calls[largest]

    def _checked(self, images: Any, count: int) -> Tensor:
        """What the function returned, if it can be ``count`` images."""
        if not isinstance(images, Tensor):
            raise ObjectiveError(f"the sampler {self.name} returned a {type(images).__name__}; expected a tensor")
        if images.ndim != 4 or len(images) != count or not images.is_floating_point():
            raise ObjectiveError(
                f"the sampler {self.name} returned {images.dtype} {list(images.shape)}; "
                f"expected floating point images [{count}, C, H, W] in [-1, 1]; of volumes, return slices"
            )
        return images
