"""How many images are sampled at once, and smaller batches when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, TypeVar

import torch

from lcsc_opt.base.machine import free_memory
from lcsc_opt.base.progress import notice

AUTO: Literal["auto"] = "auto"
DEFAULT_BATCH = 500
GRAPH_MEMORY = 4  # a graph multiplies the memory of a batch by about this

Range = tuple[int, int]
"""The images ``[first, last)``."""

T = TypeVar("T")


class BatchSizes:
    """The number of images of a batch, with and without a graph.

    Args:
        size: images in a batch without a graph; ``auto`` begins with :data:`DEFAULT_BATCH` and halves it whenever
            memory runs out.
        with_graph: images in a batch with a graph; ``None`` uses ``size``, or a quarter of an automatic one.
        images: how many an evaluation samples; an automatic batch is not larger.

    Attributes:
        automatic: whether sizes are halved when memory runs out.
        without_graph: the size of a batch without a graph.
        with_graph: the size of a batch with a graph, at most ``without_graph``.
    """

    def __init__(self, size: int | Literal["auto"], *, with_graph: int | None, images: int) -> None:
        self.automatic = size == AUTO
        if size == AUTO:
            self.without_graph = min(DEFAULT_BATCH, images)
            default_with_graph = max(self.without_graph // GRAPH_MEMORY, 1)
        else:
            self.without_graph = size
            default_with_graph = size
        self.with_graph = min(with_graph or default_with_graph, self.without_graph)

    def batches(self, first: int, last: int) -> Iterator[Range]:
        """``[first, last)`` in batches without a graph."""
        return _ranges(first, last, self.without_graph)

    def batches_with_graph(self, first: int, last: int) -> Iterator[Range]:
        """``[first, last)`` in batches with a graph."""
        return _ranges(first, last, self.with_graph)

    def start_of_last(self, first: int, last: int) -> int:
        """The first image of the last batch of ``[first, last)``, if that batch has a graph."""
        images_in_last = (last - first - 1) % self.without_graph + 1
        return last - min(images_in_last, self.with_graph)

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
            self.without_graph //= 2
            self.with_graph = max(self.with_graph // 2, 1)
            notice(f"batch_size: auto: out of memory; continuing with {self.without_graph} images at once")


def _ranges(first: int, last: int, size: int) -> Iterator[Range]:
    for start in range(first, last, size):
        yield start, min(start + size, last)
