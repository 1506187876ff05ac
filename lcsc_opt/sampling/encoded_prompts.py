"""Prompts that are encoded once in a process, and not again for each batch of images.

The text encoders of a pipeline take seconds (a T5 has billions of parameters), and their outputs depend on the prompt
alone. Each prompt is encoded by itself, so its embeddings do not depend on the batch, the worker or the run in which it
comes first.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lcsc_opt.base.progress import notice

HOST_BYTES = 4 * 10**9  # of embeddings; those of Stable Diffusion 3 take 5 MB a prompt in half precision

_Encode = Callable[..., tuple[Tensor | None, ...]]
_Embeddings = tuple[Tensor | None, ...]
"""What ``encode_prompt`` returns: embeddings, their pooled ones, those of negative prompts, or attention masks."""


class EncodedPrompts:
    """Embeddings of the prompts of one pipeline, in the memory of the host.

    Once that is full, further prompts are encoded whenever they are sampled, with the same bits.

    Args:
        most_bytes: of all embeddings together.

    Attributes:
        used_bytes: of the embeddings that are kept.
    """

    def __init__(self, most_bytes: int = HOST_BYTES) -> None:
        self.used_bytes = 0
        self._most_bytes = most_bytes
        self._embeddings: dict[tuple[Any, ...], _Embeddings] = {}
        self._is_full = False

    @contextlib.contextmanager
    def answering(self, pipeline: Any) -> Iterator[None]:
        """While this is open, the pipeline's ``encode_prompt`` encodes only prompts whose embeddings are not kept."""
        encode: _Encode = pipeline.encode_prompt
        signature = inspect.signature(encode)

        def encode_prompt(*positional: Any, **keywords: Any) -> _Embeddings:
            arguments = signature.bind(*positional, **keywords).arguments
            return self._batch(encode, arguments)

        pipeline.encode_prompt = encode_prompt
        try:
            yield
        finally:
            del pipeline.encode_prompt

    def _batch(self, encode: _Encode, arguments: Mapping[str, Any]) -> _Embeddings:
        """The embeddings of a batch of prompts, on the device of the arguments; ``None`` where a pipeline has none."""
        count = len(arguments["prompt"])
        rows = [self._row(encode, _of_one_prompt(arguments, index, count)) for index in range(count)]
        batch: list[Tensor | None] = []
        for column in zip(*rows, strict=True):
            tensors = [tensor for tensor in column if tensor is not None]
            batch.append(torch.cat(tensors).to(arguments["device"]) if tensors else None)
        return tuple(batch)

    def _row(self, encode: _Encode, arguments: Mapping[str, Any]) -> _Embeddings:
        """The embeddings of one prompt, ``[1, …]`` each, on the host."""
        key = tuple(str(value) for value in arguments.values())  # as text, since lists cannot be keys
        if key in self._embeddings:
            return self._embeddings[key]
        with torch.no_grad():
            embeddings = tuple(None if tensor is None else tensor.cpu() for tensor in encode(**arguments))
        self._keep(key, embeddings)
        return embeddings

    def _keep(self, key: tuple[Any, ...], embeddings: _Embeddings) -> None:
        """Keep them while there is room.

        No kept prompt gives way to another: prompts come in turn, so the one that went would soon be needed.
        """
        further_bytes = sum(tensor.nbytes for tensor in embeddings if tensor is not None)
        if self.used_bytes + further_bytes <= self._most_bytes:
            self._embeddings[key] = embeddings
            self.used_bytes += further_bytes
        elif not self._is_full:
            self._is_full = True
            notice(
                f"prompts: the embeddings of {len(self._embeddings):,} of them fill {self._most_bytes / 1e9:.3g} "
                "GB; the others are encoded again with each batch"
            )


def _of_one_prompt(arguments: Mapping[str, Any], index: int, count: int) -> dict[str, Any]:
    """The arguments of ``encode_prompt`` for one of ``count`` prompts.

    A list of ``count`` texts, such as negative prompts, has one for each prompt. All other arguments stay as they are.
    """
    chosen: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, list) and len(value) == count:
            value = [value[index]]
        chosen[name] = value
    return chosen
