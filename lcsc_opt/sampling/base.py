"""The contract of samplers, and sampling with a graph: the weights to differentiate in, and repeated network calls.

A repeated call keeps only its arguments, so memory grows with the images, not with activations.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, ParamSpec, Protocol, TypeVar, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.records import Noise, SamplerTitle
from lcsc_opt.checkpoints.weights import running_statistics

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
        """Images ``start`` to ``stop`` of a group of noise: ``[stop - start, C, H, W]``.

        They are nominally in [-1, 1] and as the model gives them: clipping is left to what sees them.
        An image depends only on its index, the group and the weights, not on the other images of a call.
        """

    def describe(self) -> dict[str, object]:
        """Every setting that changes the images, for the study's fingerprint."""


def title_of(sampler: Sampler) -> SamplerTitle:
    """What a sampler is called: as it describes itself, else by its class."""
    described = sampler.describe()
    name = described.get("sampler", type(sampler).__name__)
    calls = "1 model call" if sampler.nfe == 1 else f"{sampler.nfe} model calls"
    settings = json.dumps({**described, "nfe": sampler.nfe}, sort_keys=True, default=str)
    steps = described.get("steps")
    count = steps.get("num_inference_steps", sampler.nfe) if isinstance(steps, Mapping) else sampler.nfe
    counted = "" if count == sampler.nfe else f"{count} steps, "  # guidance, and solvers of a higher order, call twice
    text = f"{name}, {counted}{calls} an image"
    if "guidance_scale" in described:
        text += f", guidance {described['guidance_scale']}"
    return SamplerTitle(text, hashlib.sha256(settings.encode()).hexdigest())


def prompts_of(sampler: Sampler, noise: Noise, start: int, stop: int) -> list[str] | None:
    """The prompts of the images that ``sampler.sample`` gives for these arguments; ``None`` if it has none."""
    prompts: Callable[[Noise, int, int], list[str]] | None = getattr(sampler, "prompts_of", None)
    if prompts is None:
        return None
    return prompts(noise, start, stop)


def fewest_report_images(sampler: Sampler) -> int:
    """The images of a report with which each of the sampler's prompts has one; 0 if it has none."""
    return getattr(sampler, "fewest_report_images", 0)


def why_no_graph(sampler: Sampler) -> str | None:
    """Why sampled images have no graph, as the end of a sentence; ``None`` if they have one, as far as is known."""
    check: Callable[[], str | None] | None = getattr(sampler, "why_no_graph", None)
    if check is None:
        return None
    return check()


def networks_to_lay_out(sampler: Sampler) -> tuple[nn.Module, ...]:
    """A sampler's networks whose layout is to be chosen; empty if there is no choice."""
    return getattr(sampler, "networks_to_lay_out", ())


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
    untyped_checkpoint: Any = checkpoint
    result = untyped_checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False, **keywords)
    return cast("Result", result)


def network_output(network: nn.Module, *inputs: Any, **keywords: Any) -> Tensor:
    """The tensor that a network gives. Some wrap it: diffusers' as ``sample``, others in a tuple.

    Raises:
        ObjectiveError: it gives something else.
    """
    output = network(*inputs, **keywords)
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple):
        tensor = output[0]
    else:
        tensor = getattr(output, "sample", None)
    if not isinstance(tensor, Tensor):
        raise ObjectiveError(f"the network returned a {type(output).__name__}; expected a tensor")
    return tensor


def compiled_as_eager() -> contextlib.AbstractContextManager[Any]:
    """While this is open, networks that torch.compile has wrapped run as they were written, seen call by call."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes seconds
        return contextlib.nullcontext()
    stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


@contextlib.contextmanager
def recomputed_calls(module: nn.Module) -> Iterator[None]:
    """While this is open, every call of ``module`` is :func:`recomputed`, also calls from other code.

    Not of one that was compiled to TorchScript, whose method nothing can replace.
    """
    if isinstance(module, torch.jit.ScriptModule):
        yield
        return
    forward = module.forward
    replaced_by_user = "forward" in vars(module)  # on the instance, not by its class

    @functools.wraps(forward)
    def recomputed_forward(*arguments: Any, **keywords: Any) -> Any:
        return recomputed(forward, *arguments, **keywords)

    # some solvers of differential equations call a network by the names of its parameters (inspect.getfullargspec,
    # which does not look behind a decorator)
    with contextlib.suppress(ValueError):  # of a method in another language, which has none
        vars(recomputed_forward)["__signature__"] = inspect.signature(forward)
    module.forward = recomputed_forward
    try:
        yield
    finally:
        if replaced_by_user:
            module.forward = forward
        else:
            del module.forward


class ModuleWeights:
    """The weights of a module, by their names in its state dict.

    Args:
        trained: what merged weights are copied into.
        further: everything else that samples; its weights get no gradient.
        lora: name → parameter of a LoRA in these modules, if that is merged and not the state dict of ``trained``.
    """

    def __init__(self, trained: nn.Module, *further: nn.Module, lora: Mapping[str, Tensor] | None = None) -> None:
        self.trained = trained
        self._modules = (trained, *further)
        self._lora = lora
        self.replaced: str | None = None  # a weight in whose place the network's eval() puts another

    def why_no_gradient(self, names: Collection[str]) -> str | None:
        """Why merged weights of these names have no gradient; ``None`` if they have one.

        Running statistics of batch normalization and alphas of a LoRA have none.
        """
        if self.replaced is not None:
            return f"eval() of the network puts other weights in place of {self.replaced}, as averages that it keeps"
        if self._lora is not None:
            for name in names:
                if name.endswith(".alpha"):
                    return f"{name}, which scales a LoRA, differs between checkpoints"
            return None
        for statistics in running_statistics(self.state):
            for name in (statistics.mean, statistics.variance):
                if name in names and statistics.calls in self.state:  # else others than torch may read them
                    return f"torch has no gradient in a batch normalization's {name}, which differs between candidates"
        return None

    @contextlib.contextmanager
    def differentiable(self, names: Collection[str]) -> Iterator[Mapping[str, Tensor]]:
        """Floating-point parameters and buffers of these names. A tensor with two names has the last, as in loading.

        All other tensors require no gradient meanwhile, so none is computed for them. Afterwards every tensor's
        ``requires_grad`` is as before.
        """
        merged = {
            name: tensor
            for name, tensor in self.state.items()
            if name in names and isinstance(tensor, Tensor) and tensor.is_floating_point()
        }
        last_name = {id(tensor): name for name, tensor in merged.items()}
        leaves = {name: tensor for name, tensor in merged.items() if last_name[id(tensor)] == name}
        before = [(tensor, tensor.requires_grad) for tensor in self._all_tensors()]
        try:
            for tensor, required_grad in before:
                is_leaf = id(tensor) in last_name
                if required_grad != is_leaf:
                    tensor.requires_grad_(is_leaf)
            yield leaves
        finally:
            for tensor, required_grad in before:
                tensor.requires_grad_(required_grad)

    @property
    def state(self) -> Mapping[str, Any]:
        """Name → parameter or buffer, of all that merged weights are copied into; a module may add further state."""
        if self._lora is None:
            return self.trained.state_dict(keep_vars=True)
        return self._lora

    def _all_tensors(self) -> Iterator[Tensor]:
        for module in self._modules:
            yield from module.parameters()
            yield from module.buffers()
