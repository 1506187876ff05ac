"""How many images at once: a number, or on a device as many as its free memory holds."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lcsc_opt.base import accelerator

Range = tuple[int, int]
"""The images ``[first, last)``."""

MOST = 1000  # more at once are not faster, and their activations would come near 2^31 numbers
_SHARE = 0.5  # of the free memory; the next merge, and what has other shapes than the first batch, needs some of it


class Batches:
    """Divides images into batches of one size. On a device the size may grow once.

    There the first batch is small, and the memory that it takes per image says how many images the free memory holds.

    Args:
        size: images in a batch; with ``grows_on``, in the first one.
        grows_on: the device whose free memory sets the final size; it must tell how much that is
            (:func:`lcsc_opt.base.accelerator.measures_memory`). ``None`` keeps ``size``.
        most: images in a batch that has grown, at most.
        inside: whether these batches divide a batch that is being measured itself. To reset the device's peak would
            spoil that measurement, so it is not reset, and an image may seem to need more than it does.

    Attributes:
        size: images in a batch from now on.
    """

    def __init__(
        self, size: int, *, grows_on: torch.device | None = None, most: int = MOST, inside: bool = False
    ) -> None:
        self.size = size
        self._inside = inside
        self._most = most
        self._grows_on = grows_on  # until a batch has been measured

    @property
    def is_measured(self) -> bool:
        """Whether the size is final, unless memory runs out."""
        return self._grows_on is None

    def ranges(self, first: int, last: int) -> Iterator[Range]:
        """The images ``[first, last)``, a batch at a time: ask for the next one when everything is done with one."""
        while first < last:
            stop = min(first + self.size, last)
            device = self._grows_on
            if device is None:
                yield first, stop
            else:
                if not self._inside:
                    torch.accelerator.reset_peak_memory_stats(device)
                before = torch.accelerator.memory_allocated(device)
                yield first, stop
                needed = torch.accelerator.max_memory_allocated(device) - before
                self._grow(device, needed / (stop - first))
            first = stop

    def halve(self) -> None:
        """Continue with half the size, since memory has run out."""
        self.size = max(self.size // 2, 1)

    def _grow(self, device: torch.device, image_bytes: float) -> None:
        """Choose the final size, from what an image of the first batch needed."""
        self._grows_on = None
        fitting = int(_SHARE * accelerator.free_bytes(device) / max(image_bytes, 1.0))  # some need none
        self.size = max(self.size, min(fitting, self._most))
