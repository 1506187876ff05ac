"""Sampling noise, drawn for each image by its index.

The noise of image i is a stream of its own of a counter-based generator (Philox 4x64, Salmon et al. 2011), whose
counter starts at i: it depends neither on the batch size nor on how images are spread over devices.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lcsc_opt.records import Noise
from lcsc_opt.seeds import derive_seed

CACHE_BYTES = 256 * 2**20


class ImageNoise:
    """Standard normal noise below one seed.

    A search samples every candidate from the same noise, so the last batches drawn are kept, up to ``cache_bytes``.
    """

    def __init__(self, seed: int, *, cache_bytes: int = CACHE_BYTES) -> None:
        self.seed = seed
        self._cache: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()
        self._free_bytes = cache_bytes

    def batch(self, noise: Noise, start: int, stop: int, shape: Sequence[int], *, draw: int = 0) -> Tensor:
        """Noise of the images ``start`` to ``stop``: ``[stop - start, *shape]`` float32, not to be written to.

        Args:
            noise: the group.
            start: first image.
            stop: one past the last image.
            shape: of one image, ``[C, H, W]``.
            draw: which of several independent draws for the same image, as multi-step sampling needs.
        """
        key = (noise, start, stop, tuple(shape), draw)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        drawn = self._draw(noise, start, stop, shape, draw)
        self._keep(key, drawn)
        return drawn

    def _draw(self, noise: Noise, start: int, stop: int, shape: Sequence[int], draw: int) -> Tensor:
        key = derive_seed(self.seed, "noise", noise.group, noise.seed, draw, bits=128)
        drawn = np.empty((stop - start, *shape), dtype=np.float32)
        for i, image in enumerate(range(start, stop)):
            bits = np.random.Philox(key=key, counter=image << 192)  # 2^192 blocks before the next image's begin
            drawn[i] = np.random.Generator(bits).standard_normal(shape, dtype=np.float32)
        return torch.from_numpy(drawn)

    def _keep(self, key: tuple[object, ...], drawn: Tensor) -> None:
        self._cache[key] = drawn
        self._free_bytes -= drawn.nbytes
        while self._free_bytes < 0:
            _, dropped = self._cache.popitem(last=False)
            self._free_bytes += dropped.nbytes
