"""``batch_size: auto``: the best number of images at once, measured once on each device and kept in the cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from pathlib import Path
from typing import Any, Literal

import torch

from lcsc_opt.base import accelerator
from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.files import write_atomically
from lcsc_opt.base.machine import free_memory
from lcsc_opt.base.progress import notice
from lcsc_opt.base.records import SEARCH
from lcsc_opt.metrics import Scores
from lcsc_opt.sampling import Sampler
from lcsc_opt.sampling.base import prompts_of

AUTO: Literal["auto"] = "auto"
_FIRST, _MOST = 4, 16_384  # sizes that the search begins and ends with
_GAIN = 1.05  # a doubling must raise images per second by this factor
_ENOUGH_SECONDS, _MOST_TIMINGS = 0.3, 3


class MeasuredBatchSize:
    """The best number of images to sample at once, for a sampler, its extractors, a device and a version of torch.

    Args:
        sampler: with weights in it.
        scores: their extractors see the images.
        device: where both run.
        cache: the folder where answers are kept.
    """

    def __init__(self, sampler: Sampler, scores: Scores, *, device: torch.device, cache: Path) -> None:
        self._sampler, self._scores, self._device = sampler, scores, device
        # a batch that fits one device fits all of its kind
        self._kind = accelerator.model_name(device)
        described: dict[str, Any] = {
            "sampler": sampler.describe(),
            "extractors": sorted(str(view["name"]) for view in scores.describe()["extractors"].values()),
            "device": self._kind,
            "torch": torch.__version__,
        }
        digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()
        self._file = cache / "batch-sizes" / f"{digest[:16]}.json"

    def largest(self) -> int:
        """The kept answer; without one it is measured with the weights in the sampler, and a line says so.

        Of the sizes 4, 8, 16, … it is the smallest that is within 5 % of the fastest. Doubling ends when the memory is
        full, or after two doublings that gained less. If not even 4 images fit, the size is halved until it fits.

        Raises:
            ObjectiveError: not even one image fits.
        """
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return int(json.loads(self._file.read_text(encoding="utf-8"))["batch_size"])
        rates: dict[int, float] = {}
        size, best, without_gain = _FIRST, 0.0, 0
        with torch.compiler.set_stance("force_eager"):  # a compiler would take minutes for each size
            while size <= _MOST and without_gain < 2 and (rate := self._images_per_second(size)) is not None:
                rates[size] = rate
                without_gain = 0 if rate >= _GAIN * best else without_gain + 1
                best, size = max(best, rate), 2 * size
            if not rates:
                while self._images_per_second(size := self._at_least_one(size // 2)) is None:
                    pass
                rates[size] = best
        found = min(size for size, rate in rates.items() if rate * _GAIN >= best)
        self._keep(found)
        notice(f"batch_size: auto: {found} images at once on {self._kind}; remembered in {self._file}")
        return found

    def smaller(self, size: int) -> int:
        """Half of ``size``, which did not fit into memory; it replaces the kept answer.

        Raises:
            ObjectiveError: it was one image.
        """
        half = self._at_least_one(size // 2)
        free_memory()
        self._keep(half)
        notice(f"batch_size: auto: {size} images at once ran out of memory; going on with {half}")
        return half

    @staticmethod
    def _at_least_one(size: int) -> int:
        if size < 1:
            raise ObjectiveError(
                "batch_size: one image takes more memory than the device has; sample with dtype: bf16 or fp16, or run "
                "on another device"
            )
        return size

    @torch.no_grad()
    def _images_per_second(self, count: int) -> float | None:
        """Images per second with ``count`` at once through sampler and extractors; ``None`` if they do not fit."""

        def once() -> float:
            start = time.perf_counter()
            images, prompts = self._sampler.sample(SEARCH, 0, count), prompts_of(self._sampler, SEARCH, 0, count)
            self._scores.image_metrics(count).update(images, prompts=prompts)
            accelerator.synchronize(self._device)
            return time.perf_counter() - start

        try:
            once()  # draws noise, chooses kernels, compiles
            timings = [once()]
            while sum(timings) < _ENOUGH_SECONDS and len(timings) < _MOST_TIMINGS:
                timings.append(once())
            return count / min(timings)
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "DefaultCPUAllocator" not in str(error):
                raise
        free_memory()  # out here the exception is gone, and with it the memory that it held
        return None

    def _keep(self, size: int) -> None:
        """Keep the size. If the folder cannot be written, it is measured again next time."""
        content = {"batch_size": size, "device": self._kind, "torch": torch.__version__}
        with contextlib.suppress(ObjectiveError):
            write_atomically(self._file, f"{json.dumps(content)}\n".encode(), error=ObjectiveError)
