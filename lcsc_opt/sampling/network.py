"""How a network is run (device, arithmetic, compiled or not), and how merged weights get into it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.checkpoints.weights import difference, shapes_of
from lcsc_opt.sampling.base import ModuleWeights, recomputed

Dtype = Literal["fp32", "bf16", "fp16"]
Compile = Literal[False, True, "reduce-overhead", "max-autotune"]

DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class NetworkSettings:
    """How a network is run. Only ``dtype`` changes its results; the others change at most their rounding.

    Attributes:
        device: ``auto`` (the first GPU, else Apple's, else the CPU), or torch's name of one, such as ``cuda:1``.
        dtype: of matrix products and convolutions; weights, and what a sampler computes, stay in float32.
        compile: use ``torch.compile``; the first images then take minutes. ``True`` fuses kernels. ``reduce-overhead``
            also replays them as CUDA graphs, which helps small networks. ``max-autotune`` also tries several kernels
            for each operation. Without a GPU there are no CUDA graphs.
        channels_last: the memory format of images and of convolutions.
    """

    device: str = "auto"
    dtype: Dtype = "fp32"
    compile: Compile = False
    channels_last: bool = False

    def torch_device(self) -> torch.device:
        """The device itself.

        Raises:
            ObjectiveError: torch or this machine has no such device.
        """
        apple = torch.backends.mps.is_available()
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "mps" if apple else "cpu")
        counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(apple)}
        kind, _, index = self.device.partition(":")
        if kind not in counts or (index and not index.isdecimal()):
            raise ObjectiveError(f"device: expected auto, cpu, cuda, cuda:1, … or mps, got {self.device!r}")
        device, count = torch.device(self.device), counts[kind]
        if (device.index or 0) >= count:
            there = f"{count} of them" if count else "none"
            raise ObjectiveError(f"device: {self.device} is not there (torch sees {there}); 'auto' takes what is")
        return device


class PreparedNetwork:
    """A network that gets the weights of one candidate after the other. It is called like the network itself.

    Weights are copied into the parameters that are there, so that a compiled graph stays valid.

    Args:
        module: the network; it is moved to the device and put into evaluation mode.
        settings: how it is run.
        trained: the part of it that the checkpoints hold; ``None`` is all of it.

    Attributes:
        module: the network.
        callable: the same, compiled if the settings say so.
        device: where both are.
        dtype: of images in and out: float64 if the network's weights are float64, else float32.
        weights: the weights of ``trained``, for gradients.

    Raises:
        ObjectiveError: the device is not there.
    """

    def __init__(
        self, module: nn.Module, settings: NetworkSettings | None = None, *, trained: nn.Module | None = None
    ) -> None:
        self.settings = settings or NetworkSettings()
        self.device = self.settings.torch_device()
        self.module = module.eval().to(self.device)
        self.trained = trained or module
        self.weights = ModuleWeights(self.trained, module)
        doubles = any(parameter.dtype == torch.float64 for parameter in module.parameters())
        self.dtype = torch.float64 if doubles else torch.float32
        if self.settings.channels_last:
            self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
        self.callable: Any = compiled(self.module, self.settings.compile)

    def __call__(self, images: Tensor, *arguments: Any, again: bool = False, **keywords: Any) -> Tensor:
        """The network's output for ``images`` ``[N, C, H, W]``, in :attr:`dtype`.

        Tensors among the arguments are expected on :attr:`device`. If the network wraps its output, as those of
        diffusers do, the tensor inside is returned.

        Args:
            images: noisy images.
            arguments: of the network.
            again: whether a backward pass repeats this call instead of keeping its activations; worth it for all calls
                but the last of a batch.
            keywords: of the network.
        """
        if self.settings.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with self.arithmetic():
            if again:
                output = recomputed(self.callable, images, *arguments, **keywords)
            else:
                output = self.callable(images, *arguments, **keywords)
        return raised(_unwrapped(output))

    @contextlib.contextmanager
    def arithmetic(self) -> Iterator[None]:
        """While this is open, :attr:`callable` computes in the dtype of the settings, on tensors of any dtype.

        Raises:
            ObjectiveError: ``torch.compile`` failed, for want of a compiler perhaps; it does so at the first call.
        """
        dtype = DTYPES[self.settings.dtype]
        try:
            with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
                yield
        except RuntimeError as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            reason = " ".join(str(error).split())[:300]
            raise ObjectiveError(
                f"compile: torch.compile failed; set compile: false, or repair this: {reason}"
            ) from error


class NetworkSampler:
    """The common part of all samplers of one network."""

    _network: PreparedNetwork

    @property
    def network(self) -> nn.Module:
        """The module whose weights the checkpoints hold."""
        return self._network.trained

    @property
    def weights(self) -> ModuleWeights:
        """The network's weights, for gradients."""
        return self._network.weights

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Copy merged weights into the network."""
        load_weights(self._network.trained, weights)


def compiled(module: nn.Module, how: Compile) -> Any:
    """What to call in place of ``module``: compiled if the settings say so.

    The modes with CUDA graphs overwrite the last output with the next, so callers get a copy. Each batch size gets a
    graph of its own: there are few (a full batch, and the rest), and one graph for all would be slower.
    """
    if not how:
        return module
    if how is True:
        return torch.compile(module)
    graphs: Any = torch.compile(module, mode=how, dynamic=False)
    graphs.register_forward_hook(lambda _module, _inputs, output: _copied(output))
    return graphs


def compile_in_place(module: Any, how: Compile) -> None:
    """Compile a module in place, where others hold and call it, such as a pipeline; otherwise as :func:`compiled`."""
    if how is True:
        module.compile()
    elif how:
        module.compile(mode=how, dynamic=False)
        call = module._compiled_call_impl
        module._compiled_call_impl = lambda *arguments, **keywords: _copied(call(*arguments, **keywords))


def _copied(output: Any) -> Any:
    """The same structure with copies of its tensors. Gradients flow through the copies."""
    return pytree.tree_map_only(Tensor, Tensor.clone, output)


def raised(images: Tensor) -> Tensor:
    """Images of half types as float32; others as they are."""
    return images.float() if images.dtype in (torch.float16, torch.bfloat16) else images


def load_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy ``weights``, name → tensor, into the network's parameters and buffers, matched by name.

    Raises:
        ObjectiveError: a name or a shape does not fit; the message says the first.
    """
    differs = difference(shapes_of(weights), shapes_of(network.state_dict()))
    if differs is not None:
        raise ObjectiveError(
            f"the trajectory's weights do not fit the network: a checkpoint {differs}; "
            "check the model's settings, and which state dict of the checkpoints was packed"
        )
    network.load_state_dict(weights)


def _unwrapped(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    inside = output[0] if isinstance(output, tuple) else getattr(output, "sample", None)
    if not isinstance(inside, Tensor):
        raise ObjectiveError(f"the network returned a {type(output).__name__}; expected a tensor")
    return inside
