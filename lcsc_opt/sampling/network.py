"""How a network is run (device, arithmetic), how it gets merged weights, and what samplers share."""

from __future__ import annotations

import collections
import contextlib
import copy
import gc
import re
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lcsc_opt.base import accelerator
from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.imports import import_extra
from lcsc_opt.base.records import Noise
from lcsc_opt.base.settings import FrozenModel
from lcsc_opt.checkpoints.weights import difference
from lcsc_opt.sampling.base import ModuleWeights, network_output, recomputed
from lcsc_opt.sampling.latents import LatentDecoder
from lcsc_opt.sampling.layout import has_layouts
from lcsc_opt.sampling.noise import ImageNoise

Dtype = Literal["fp32", "bf16", "fp16"]

DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class NetworkSettings(FrozenModel):
    """How a network is run. Only ``dtype`` changes its results; the others change at most their rounding.

    Attributes:
        device: ``auto`` (the accelerator, else the CPU), or torch's name of one, such as ``cpu``, ``cuda:1``, ``xpu``.
        dtype: the dtype of matrix products and convolutions; weights, and what a sampler computes, stay in float32.
    """

    device: str = "auto"
    dtype: Dtype = "fp32"

    def torch_device(self) -> torch.device:
        """The device itself.

        Raises:
            ObjectiveError: torch or this machine has no such device.
        """
        return accelerator.find(self.device)


def unshared(network: nn.Module) -> nn.Module:
    """A network that a function of the user's has returned; a copy of it if somebody else holds it or a part of it.

    Its weights and its mode will change, and whoever holds them would find them changed. One that cannot be copied is
    returned itself.
    """
    # what runs now refers to it, too: the frames of this function and its callers
    holders = [referrer for referrer in gc.get_referrers(network) if not isinstance(referrer, types.FrameType)]
    if holders or _has_held_parts(network):
        with contextlib.suppress(Exception):  # whatever copying a user's network runs into
            return _copied(network)
    return network


def _copied(network: nn.Module) -> nn.Module:
    """A copy. Parameters of TorchScript are copied as results of the old ones, if gradients are recorded then."""
    with torch.no_grad():
        copied = copy.deepcopy(network)
    for parameter, original in zip(copied.parameters(), network.parameters(), strict=True):
        parameter.requires_grad_(original.requires_grad)
    return copied


def _has_held_parts(network: nn.Module) -> bool:
    """Whether something beside a network refers to one of its modules, parameters or buffers.

    References are counted: to look for those who hold them would go through all objects for each part. A part that the
    network itself holds in two ways, such as in a list of its own, counts as held, too.
    """
    parts, in_network = _parts_of(network)
    alone = object()  # which shows how many references are those of this function
    parts[id(alone)] = alone
    identity_of_alone = id(alone)
    del alone
    held = {identity: sys.getrefcount(part) - in_network[identity] for identity, part in parts.items()}
    return max(held.values()) > held[identity_of_alone]


def _parts_of(network: nn.Module) -> tuple[dict[int, object], collections.Counter[int]]:
    """The modules, parameters and buffers in a network by their identity, and how often it holds each."""
    parts: dict[int, object] = {}
    held: collections.Counter[int] = collections.Counter()
    for module in network.modules():
        for part in (*module._modules.values(), *module._parameters.values(), *module._buffers.values()):
            if part is not None:
                parts[id(part)] = part
                held[id(part)] += 1
    return parts, held


class PreparedNetwork:
    """A network that gets the weights of one candidate after the other. It is called like the network itself.

    Weights are copied into the parameters that are there, so that a user's compiled graph stays valid. A network with a
    ``train`` of its own is told to train before, and to evaluate after: it may put averages in, as in its training.

    Args:
        module: the network; it is moved to the device and put into evaluation mode.
        settings: how it is run.
        trained: the part of it that the checkpoints hold; all of it by default, and of a network with an adapter of
            PEFT, the adapter.

    Attributes:
        dtype: the dtype of images in and out: float64 if the network's weights are float64, else float32.
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
        self._adapter = _adapter_in(self.trained)
        # a wrapper with averages may put them in by eval(), so that comes after the weights
        self._puts_averages_in = any(type(part).train is not nn.Module.train for part in module.modules())
        self.weights = ModuleWeights(self.trained, module, lora=self._adapter)
        self.dtype = torch.float32
        if any(parameter.dtype == torch.float64 for parameter in module.parameters()):
            self.dtype = torch.float64
        self._as_prepared = {name: _kind(tensor) for name, tensor in _tensors(self.module)}

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Copy merged weights into the part that the checkpoints hold, and put the network into evaluation mode.

        Whatever the user's code has changed since the last call is as before: mode, dtypes, devices, and what requires
        a gradient. The mode comes last, whatever kind of network it is.

        Raises:
            ObjectiveError: they do not fit it, or weights that they do not replace have lost digits.
        """
        self._restore(weights)
        if self._puts_averages_in:
            self.module.train()
        if self._adapter is None:
            load_weights(self.trained, weights)
        else:
            _check_fit(weights, self._adapter)
            with torch.no_grad():
                for name, parameter in self._adapter.items():
                    parameter.copy_(weights[name])
        if any(module.training for module in self.module.modules()):
            self.module.eval()
        if self._puts_averages_in:
            state = self.weights.state
            self.weights.replaced = next(
                (name for name in weights if _is_replaced(weights[name], state.get(name))), None
            )

    def _restore(self, weights: Mapping[str, Tensor]) -> None:
        """Undo what the user's code did to tensors, such as ``model.half()``; ``weights`` are about to be loaded."""
        replaced = {id(tensor) for name, tensor in self.weights.state.items() if name in weights}
        for name, tensor in list(_tensors(self.module)):
            kind = self._as_prepared.get(name, _kind(tensor))  # the user's code may have added it
            if _kind(tensor) == kind:
                continue
            device, dtype, requires_grad = kind
            has_lost_digits = torch.promote_types(tensor.dtype, dtype) != tensor.dtype
            if has_lost_digits and id(tensor) not in replaced:
                raise ObjectiveError(
                    f"your function has left the network in {tensor.dtype}, and its {name} is in no checkpoint, so "
                    "its digits are lost; let the function work on a copy (copy.deepcopy), or leave the dtype as it is"
                )
            tensor.data = tensor.data.to(device, dtype)
            tensor.requires_grad_(requires_grad)

    def __call__(
        self,
        images: Tensor,
        *arguments: Any,
        recompute: bool = False,
        **keywords: Any,
    ) -> Tensor:
        """The network's output for ``images`` ``[N, C, H, W]``, in :attr:`dtype`.

        With ``recompute``, a backward pass repeats this call instead of keeping its activations; worth it for all
        calls but the last of a batch.
        """
        with self.arithmetic():
            if recompute:
                output = recomputed(network_output, self.module, images, *arguments, **keywords)
            else:
                output = network_output(self.module, images, *arguments, **keywords)
        return output.to(torch.promote_types(output.dtype, torch.float32))

    def arithmetic(self) -> contextlib.AbstractContextManager[None]:
        """While this is open, the network computes in the dtype of the settings, on tensors of any dtype."""
        dtype = DTYPES[self.settings.dtype]
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of all parameters and buffers, also those that a state dict leaves out."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def _kind(tensor: Tensor) -> tuple[torch.device, torch.dtype, bool]:
    """What a function may change of a tensor without giving it other values."""
    return tensor.device, tensor.dtype, tensor.requires_grad


class NetworkSampler:
    """The common part of all samplers of one network.

    Args:
        module: everything that is called for an image.
        settings: how it is run.
        trained: the part of it that gets the merged weights; all of it by default.
        noise: where all noise comes from, of the shape ``[C, H, W]``; and the classes of a class-conditional network.
        decoder: latents → images, if the network makes latents.

    Attributes:
        nfe: model calls per image.
        recomputed: how many of these a backward pass makes again.
        weights: the network's weights, for gradients.
        networks_to_lay_out: the network, if its layout is to be chosen.
    """

    nfe: int
    recomputed: int

    def __init__(
        self,
        module: nn.Module,
        settings: NetworkSettings | None,
        *,
        trained: nn.Module | None = None,
        noise: ImageNoise,
        decoder: LatentDecoder | None = None,
    ) -> None:
        self._network = PreparedNetwork(module, settings, trained=trained)
        self.weights = self._network.weights
        self.networks_to_lay_out = (self._network.module,) if has_layouts(self._network.module) else ()
        self.noise = noise
        self.decoder = decoder
        if decoder is not None:
            decoder.to(self._network.device)

    @property
    def network(self) -> nn.Module:
        """The module whose weights the checkpoints hold."""
        return self._network.trained

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Copy merged weights into the network."""
        self._network.load(weights)

    def describe(self) -> dict[str, object]:
        """Settings that change the images."""
        described: dict[str, object] = {
            "image_shape": list(self.noise.shape),
            "labels": None,
            "decoder": None,
            "noise_seed": self.noise.seed,
            "dtype": self._network.settings.dtype,
        }
        if self.noise.labels is not None:
            described["labels"] = self.noise.labels.describe()
        if self.decoder is not None:
            described["decoder"] = self.decoder.describe()
        return described

    def _labels(self, noise: Noise, start: int, stop: int) -> Tensor | None:
        """The classes of these images, ``[N]`` on the network's device; ``None`` for an unconditional network."""
        classes = self.noise.classes(noise, start, stop)
        if classes is None:
            return None
        return classes.to(self._network.device)

    def _decoded(self, output: Tensor) -> Tensor:
        """The network's images, or its latents decoded; as they are, not clipped."""
        if self.decoder is not None:
            output = self.decoder(output)
        return output


def load_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy ``weights``, name → tensor, into the network's parameters and buffers, matched by name.

    Of tied weights one name is enough. What transformers declares to be no longer a weight is left out.

    Raises:
        ObjectiveError: a name or a shape does not fit; the message says the first.
    """
    whole_state = network.state_dict(keep_vars=True)
    state = {name: value for name, value in whole_state.items() if isinstance(value, Tensor)}
    rest = {name: value for name, value in whole_state.items() if name not in state}  # as tianshou's optimizers
    obsolete = getattr(network, "_keys_to_ignore_on_load_unexpected", None) or ()  # patterns, of transformers

    def is_obsolete(name: str) -> bool:
        return name not in state and any(re.search(pattern, name) for pattern in obsolete)

    weights = {name: tensor for name, tensor in weights.items() if not is_obsolete(name)}
    loaded_tensors = {id(tensor) for name, tensor in state.items() if name in weights}
    expected = {name: tensor for name, tensor in state.items() if name in weights or id(tensor) not in loaded_tensors}
    _check_fit(weights, expected)
    # checked above; strict would miss second names of tied weights
    network.load_state_dict(weights | rest, strict=False)


def _is_replaced(loaded: Tensor, present: Tensor | None) -> bool:
    """Whether a network has other values in a tensor than those that were just loaded; ``None``: it has no such one."""
    return present is not None and not torch.equal(loaded.to(present.device, present.dtype), present)


def _check_fit(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise ObjectiveError if names or shapes of merged weights are not those that the network expects."""
    misfit = difference(weights, expected)
    if misfit is not None:
        raise ObjectiveError(
            f"the trajectory's weights do not fit the network: a checkpoint {misfit}; "
            "check the model's settings, and which state dict of the checkpoints was packed"
        )


def _adapter_in(network: nn.Module) -> Mapping[str, Tensor] | None:
    """The parameters of an adapter of PEFT, by their names in its files; ``None`` of another network.

    Raises:
        ObjectiveError: its files hold what is no parameter of the network, as those of prompts do.
    """
    if not hasattr(network, "peft_config"):
        return None
    state = network.state_dict(keep_vars=True)
    peft = import_extra("peft")
    name = next(iter(network.peft_config))  # type: ignore[arg-type]  # the first of its adapters
    # save_embedding_layers="auto", the default, asks the Hugging Face hub for the base model's configuration
    adapter: Mapping[str, Tensor] = peft.get_peft_model_state_dict(network, state, name, save_embedding_layers=False)
    parameters = {id(tensor) for tensor in state.values()}
    computed = [name for name, tensor in adapter.items() if id(tensor) not in parameters]
    if computed:
        raise ObjectiveError(f"{computed[0]} of the adapter is no parameter of the network, so it cannot be merged")
    return adapter
