"""A copy of a checkpoint, so that training may change its weights while they are saved."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.trajectory.disk.layout import Layout, WholeRow, flat_bytes


@dataclasses.dataclass(frozen=True)
class Staged:
    """A checkpoint that is being copied.

    Attributes:
        content: all there after :meth:`wait`.
        events: of the devices that it comes from.
    """

    content: WholeRow
    events: Sequence[torch.cuda.Event]

    def wait(self) -> WholeRow:
        """The content, when all of it is there."""
        for event in self.events:
            event.synchronize()
        return self.content


class Staging:
    """Memory for one checkpoint, which is used again for the next one.

    From a GPU the copy goes into pinned memory, in the order of the stream that trains: it has ended before a later
    kernel of that stream changes a weight, and the caller waits for none of it. From the CPU it is copied at once.
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def release(self) -> None:
        """Give the memory back."""
        self._buffer = None

    @torch.inference_mode(mode=False)  # a buffer made in it could not be written to outside
    @torch.no_grad()
    def take(self, layout: Layout, tensors: Mapping[str, Tensor]) -> Staged:
        """Begin to copy a checkpoint over the one before, which is lost.

        Args:
            layout: of its exact row.
            tensors: on any devices.

        Raises:
            TrajectoryError: there is no memory for the copy.
        """
        buffer = self._room(layout.row_bytes, pinned=any(tensor.is_cuda for tensor in tensors.values()))
        content = WholeRow(layout, buffer)
        for name, place in content.items():
            tensor = tensors[name]
            place.copy_(flat_bytes(tensor), non_blocking=tensor.is_cuda)
        return Staged(content, _events({tensor.device for tensor in tensors.values() if tensor.is_cuda}))

    def _room(self, size: int, *, pinned: bool) -> Tensor:
        buffer = self._buffer
        if buffer is None or len(buffer) != size or (pinned and not buffer.is_pinned()):
            self._buffer = None  # not beside the new one
            try:
                buffer = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned)
            except (RuntimeError, MemoryError) as error:
                raise TrajectoryError(
                    f"No memory for a copy of a checkpoint, {size / 1e9:.1f} GB: append with wait=True, without one."
                ) from error
            self._buffer = buffer
        return buffer


def _events(devices: set[torch.device]) -> list[torch.cuda.Event]:
    """One for each GPU, which has passed when all that was asked of its current stream is done."""
    events = []
    for device in devices:
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # who waits for it sleeps
        event.record(torch.cuda.current_stream(device))
        events.append(event)
    return events
