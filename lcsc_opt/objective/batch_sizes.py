"""How many images are sampled at once, and smaller batches when memory runs out."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, TypeVar

import torch
from torch import Tensor

from lcsc_opt.base import accelerator
from lcsc_opt.base.accelerator import CPU
from lcsc_opt.base.batches import MOST, Batches, Range
from lcsc_opt.base.machine import free_memory
from lcsc_opt.base.progress import notice, progress_inside

AUTO: Literal["auto"] = "auto"
DEFAULT_BATCH = 500
GRAPH_MEMORY = 4  # a graph multiplies the memory of a batch by about this
PIXELS_ON_CPU = 2**21  # of all images at once that a pipeline decodes: 8 of 512 × 512
_FIRST = 16  # images in the first batch on a device, which is measured
_FIRST_WITH_GRAPH = 8

Size = int | Literal["auto"]
T = TypeVar("T")


def images_at_once(given: Size | None, device: torch.device, *, image_size: tuple[int, int] | None = None) -> Size:
    """The setting ``batch_size`` where it is given; else a number on the CPU, and ``auto`` on a device.

    ``image_size``, height and width, is that of a pipeline, whose large images bound the number on the CPU.
    """
    if given is not None:
        return given
    if device != CPU:
        return AUTO
    if image_size is None:
        return DEFAULT_BATCH
    return min(DEFAULT_BATCH, max(PIXELS_ON_CPU // math.prod(image_size), 1))


class BatchSizes:
    """The number of images of a batch, with and without a graph.

    Args:
        size: images in a batch without a graph. ``auto`` follows the memory of a device (:class:`Batches`) and begins
            with :data:`DEFAULT_BATCH` on the CPU; it is halved whenever memory runs out.
        with_graph: images in a batch with a graph; ``None`` uses ``size``. Where that is automatic, it follows the
            memory of a device, too, and is a quarter of the size without a graph on the CPU.
        images: how many an evaluation samples; an automatic batch is not larger.
        device: where the network is.

    Attributes:
        automatic: whether sizes are halved when memory runs out.
        usual: images in a batch without a graph, as assumed before a device's memory is measured.
    """

    def __init__(self, size: Size, *, with_graph: int | None, images: int, device: torch.device = CPU) -> None:
        self.automatic = size == AUTO
        if size == AUTO:
            self.usual = min(DEFAULT_BATCH, images)
            default_with_graph = max(self.usual // GRAPH_MEMORY, 1)
        else:
            self.usual = size
            default_with_graph = size
        self._plain = Batches(self.usual)
        self._graph = Batches(with_graph or default_with_graph)
        if self.automatic and accelerator.measures_memory(device):
            growing = functools.partial(Batches, grows_on=device, most=min(MOST, images))
            self._plain = growing(min(_FIRST, images))
            if with_graph is None:
                self._graph = growing(min(_FIRST_WITH_GRAPH, images))

    @property
    def without_graph(self) -> int:
        """The size of a batch without a graph."""
        return self._plain.size

    @property
    def with_graph(self) -> int:
        """The size of a batch with a graph, at most :attr:`without_graph` where that is known: a graph adds memory."""
        if not self._plain.is_measured:
            return self._graph.size
        return min(self._graph.size, self._plain.size)

    def batches(self, first: int, last: int) -> Iterator[Range]:
        """``[first, last)`` in batches without a graph."""
        return _counted(self._plain.ranges(first, last), last - first)

    def batches_with_graph(self, first: int, last: int) -> Iterator[Range]:
        """``[first, last)`` in batches with a graph."""
        self._graph.size = self.with_graph  # which the size without a graph may have bounded meanwhile
        return _counted(self._graph.ranges(first, last), last - first)

    def start_of_last(self, first: int, last: int) -> int:
        """The first image of the last batch of ``[first, last)``, if that one has a graph and the others have none.

        Unless a graph needs smaller batches, the images are divided as without a gradient, so their bits are the same.
        """
        images_in_last = (last - first - 1) % self.without_graph + 1
        return last - min(images_in_last, self.with_graph)

    def images(self, count: int, sample: Callable[[int, int], Tensor]) -> Tensor:
        """The first ``count`` images as they are saved, on the CPU: ``[count, C, H, W]`` in [-1, 1].

        Args:
            count: how many.
            sample: gives those of a range, ``[first, last)``.

        Raises:
            torch.OutOfMemoryError: as :meth:`retry_smaller`.
        """

        def sampled() -> Tensor:
            return torch.cat([sample(start, stop).cpu() for start, stop in self.batches(0, count)]).clamp(-1, 1)

        return self.retry_smaller(sampled)

    def retry_smaller(self, stage: Callable[[], T]) -> T:
        """The result of ``stage``, which is run again with half the batch size whenever memory runs out.

        Raises:
            torch.OutOfMemoryError: a batch of one image does not fit, or the size is not automatic.
        """
        while True:
            try:
                return stage()
            except torch.OutOfMemoryError:
                if not self.automatic or self.without_graph == 1:
                    raise
            # outside of the except clause: the exception's traceback keeps the stage's tensors alive
            free_memory()
            self._plain.halve()
            self._graph.halve()
            notice(f"batch_size: auto: out of memory; continuing with {self.without_graph} images at once")


def _counted(batches: Iterable[Range], images: int) -> Iterator[Range]:
    """The batches, whose images are counted behind the bar of what evaluates."""
    with progress_inside("images", images) as advance:
        for start, stop in batches:
            yield start, stop
            advance(stop - start)
