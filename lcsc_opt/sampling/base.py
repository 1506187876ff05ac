"""The contract of samplers, and sampling with a graph: the weights to differentiate in, and repeated network calls.

A repeated call keeps only its arguments, so memory grows with the images, not with activations.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, ParamSpec, Protocol, TypeVar, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from lcsc_opt.base.records import Noise

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Sampler(Protocol):
    """A model, and a way to sample images from it."""

    @property
    def nfe(self) -> int:
        """Number of function evaluations: model calls per image."""

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Put merged weights, name → tensor, into the model; names and shapes must match it."""

    def sample(self, noise: Noise, start: int, stop: int) -> Tensor:
        """Images ``start`` to ``stop`` of a group of noise: ``[stop - start, C, H, W]``, in [-1, 1].

        An image depends only on its index, the group and the weights, not on the other images of a call.
        """

    def describe(self) -> dict[str, object]:
        """Every setting that changes the images, for the study's fingerprint."""


def prompts_of(sampler: Sampler, noise: Noise, start: int, stop: int) -> list[str] | None:
    """The prompts of the images that ``sampler.sample`` gives for these arguments; ``None`` if it has none."""
    own: Callable[[Noise, int, int], list[str]] | None = getattr(sampler, "prompts_of", None)
    return None if own is None else own(noise, start, stop)


@runtime_checkable
class DifferentiableSampler(Sampler, Protocol):
    """A sampler whose images have a graph while grad mode is on."""

    @property
    def weights(self) -> ModuleWeights:
        """What merged weights are copied into."""

    @property
    def recomputed(self) -> int:
        """How many of an image's :attr:`nfe` model calls a backward pass makes again."""


def recomputed(
    function: Callable[Arguments, Result], *arguments: Arguments.args, **keywords: Arguments.kwargs
) -> Result:
    """Call ``function``. In grad mode its activations are not kept: a backward pass calls it again.

    It must be deterministic: a network in evaluation mode is.
    """
    if not torch.is_grad_enabled():
        return function(*arguments, **keywords)
    again: Any = checkpoint
    result = again(function, *arguments, use_reentrant=False, preserve_rng_state=False, **keywords)
    return cast("Result", result)


@contextlib.contextmanager
def recomputed_calls(module: nn.Module) -> Iterator[None]:
    """While this is open, every call of ``module`` is :func:`recomputed`, also calls from other code."""
    forward, own = module.forward, "forward" in vars(module)

    @functools.wraps(forward)
    def again(*arguments: Any, **keywords: Any) -> Any:
        return recomputed(forward, *arguments, **keywords)

    module.forward = again
    try:
        yield
    finally:
        if own:
            module.forward = forward
        else:
            del module.forward


class ModuleWeights:
    """The weights of a module, by their names in its state dict.

    Args:
        trained: what merged weights are copied into.
        whole: everything that samples; weights outside ``trained`` get no gradient.
        lora: name → parameter of a LoRA in these modules, if that is merged and not the state dict of ``trained``.
    """

    def __init__(self, trained: nn.Module, *whole: nn.Module, lora: Mapping[str, Tensor] | None = None) -> None:
        self.trained = trained
        self._whole, self._lora = (trained, *whole), lora

    def why_no_gradient(self, names: Collection[str]) -> str | None:
        """A reason for running statistics, and alphas of a LoRA."""
        if self._lora is not None:
            alpha = next((name for name in names if name.endswith(".alpha")), None)
            return alpha and f"{alpha}, which scales a LoRA, differs between checkpoints"
        for path, module in self.trained.named_modules():
            if isinstance(module, _NormBase):
                running = [f"{path}.{name}".lstrip(".") for name in ("running_mean", "running_var")]
                if varying := [name for name in running if name in names]:
                    return f"torch has no gradient in a batch normalization's {varying[0]}, which is merged, too"
        return None

    @contextlib.contextmanager
    def differentiable(self, names: Collection[str]) -> Iterator[Mapping[str, Tensor]]:
        """Floating-point parameters and buffers of these names. A tensor with two names has the last, as in loading.

        Afterwards every tensor's ``requires_grad`` is as before.
        """
        state = {name: one for name, one in self._state().items() if name in names and one.is_floating_point()}
        last = {id(tensor): name for name, tensor in state.items()}
        leaves = {name: tensor for name, tensor in state.items() if last[id(tensor)] == name}
        tensors = [tensor for part in self._whole for tensor in (*part.parameters(), *part.buffers())]
        asked = [(tensor, tensor.requires_grad) for tensor in tensors]
        try:
            for tensor, before in asked:
                if before != (id(tensor) in last):
                    tensor.requires_grad_(not before)
            yield leaves
        finally:
            for tensor, before in asked:
                tensor.requires_grad_(before)

    def _state(self) -> Mapping[str, Tensor]:
        state = self.trained.state_dict(keep_vars=True) if self._lora is None else self._lora
        return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
