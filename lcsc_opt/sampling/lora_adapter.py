"""Putting one merged LoRA after the other into a pipeline, without making its adapter again."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lcsc_opt.base.errors import ObjectiveError

ADAPTER = "merged"
FACTORS = {  # suffixes of a LoRA under the names that ``load_lora_weights`` takes → the parameter of PEFT's layer
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_linear_layer.down.weight": "lora_A",
    ".lora_linear_layer.up.weight": "lora_B",
}


@dataclasses.dataclass(frozen=True, eq=False)
class LoraConversion:
    """What merged weights become before a pipeline takes them.

    Attributes:
        convert: merged weights → a LoRA under the names that ``load_lora_weights`` takes, with alpha = rank.
        description: what of it changes the images, for the study's fingerprint.
    """

    convert: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict
    description: Mapping[str, object] = dataclasses.field(default_factory=dict)


class LoraAdapter:
    """The adapter of a pipeline that merged LoRAs are copied into, one after the other.

    Raises:
        ObjectiveError: the pipeline takes no LoRA.
    """

    def __init__(self, pipeline: Any, conversion: LoraConversion) -> None:
        if not hasattr(pipeline, "load_lora_weights"):
            raise ObjectiveError(f"component: {type(pipeline).__name__} takes no LoRA; merge its transformer or unet")
        self._pipeline, self._convert = pipeline, conversion.convert
        self._parameters: dict[str, nn.Parameter] = {}

    def load(self, weights: Mapping[str, Tensor]) -> bool:
        """Copy a merged LoRA into the adapter, which the first one makes.

        Returns:
            Whether it is one of a text encoder, too.

        Raises:
            ObjectiveError: it does not fit the pipeline, or has other names or shapes than the first one.
        """
        factors = self._convert(weights)
        if not self._parameters:
            self._parameters = self._create(factors)
        self._check(factors)
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(factors[name])
        return any(name.startswith("text_encoder") for name in factors)

    def _create(self, factors: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
        """Let the pipeline load it as it loads a file, and find the parameters that it went to."""
        in_dtype = {name: factor.to(self._part(name).dtype) for name, factor in factors.items()}
        try:
            with _quiet():
                self._pipeline.load_lora_weights(in_dtype, adapter_name=ADAPTER)
        except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ObjectiveError(f"the LoRA does not fit {type(self._pipeline).__name__}: {reason}") from error
        parameters = {}
        for name in factors:
            layer, parameters[name] = self._place(name)
            layer.scaling[ADAPTER] = 1.0  # alpha = rank; diffusers before 0.39 takes another where ranks differ
        return parameters

    def _part(self, name: str) -> Any:
        part = getattr(self._pipeline, name.partition(".")[0], None)
        if not isinstance(part, nn.Module):
            raise ObjectiveError(f"the LoRA's {name} belongs to a part that {type(self._pipeline).__name__} lacks")
        return part

    def _place(self, name: str) -> tuple[Any, nn.Parameter]:
        """PEFT's layer of a factor, and the parameter in it."""
        suffix = next((suffix for suffix in FACTORS if name.endswith(suffix)), "")
        path = name.removesuffix(suffix).partition(".")[2]
        part = self._part(name)
        for place in (path, path.removeprefix("text_model.")):  # which transformers 5 has no more
            try:
                layer: Any = part.get_submodule(place)
                parameter: nn.Parameter = getattr(layer, FACTORS[suffix])[ADAPTER].weight
            except (AttributeError, KeyError):
                continue
            return layer, parameter
        raise ObjectiveError(f"the LoRA's {name} has no place in the pipeline's {type(part).__name__}")

    def _check(self, factors: Mapping[str, Tensor]) -> None:
        for name in sorted(factors.keys() | self._parameters.keys()):
            if name not in factors or name not in self._parameters:
                raise ObjectiveError(f"the LoRA has {name} where the first one had not, or lacks it")
            given, expected = list(factors[name].shape), list(self._parameters[name].shape)
            if given != expected:
                raise ObjectiveError(f"the LoRA's {name} is {given}, and in the pipeline it is {expected}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """While this is open: diffusers warns of every part that a LoRA is not of; what has no place is found here."""
    from diffusers.utils import logging

    asked = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(asked)
