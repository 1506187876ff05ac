"""Tensors that lie in one piece of a device's memory, so that one copy takes them there and one makes them anew."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lcsc_opt.trajectory.layout import aligned


class OnePiece:
    """Tensors of any dtypes, copied to a device together.

    Args:
        tensors: name → tensor of the CPU.
        device: where they go.
    """

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        self._places: dict[str, tuple[int, Tensor]] = {}  # name → first byte, and a tensor like it without content
        end = 0
        for name, tensor in tensors.items():
            self._places[name] = end, tensor.to("meta")
            end = aligned(end + tensor.nbytes)  # so that the bytes of the next can be seen as its dtype
        content = torch.empty(end, dtype=torch.uint8, device="cpu")
        for name, tensor in tensors.items():
            first, _ = self._places[name]
            content[first : first + tensor.nbytes] = tensor.reshape(-1).view(torch.uint8)
        self._content = content
        if tensors:  # else a merge would pay for a copy of nothing
            self._content = content.to(device)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors on the device, not copied again."""
        return self._views(self._content)

    def copies(self) -> dict[str, Tensor]:
        """A copy of each on the device, which may be changed; all are copied at once."""
        return self._views(self._content.clone())

    def _views(self, content: Tensor) -> dict[str, Tensor]:
        """The tensors inside of this content, ``[bytes]`` uint8."""
        views: dict[str, Tensor] = {}
        for name, (first, like) in self._places.items():
            views[name] = content[first : first + like.nbytes].view(like.dtype).view(like.shape)
        return views
