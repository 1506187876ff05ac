"""``batch_size: auto``: the best number of images at once, measured once on each device and kept in the cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.files import write_atomically
from lcsc_opt.base.machine import free_memory
from lcsc_opt.base.progress import notice
from lcsc_opt.base.records import SEARCH
from lcsc_opt.metrics import Scores
from lcsc_opt.sampling import Sampler

AUTO: Literal["auto"] = "auto"
FIRST, MOST = 4, 16_384  # sizes that the search begins and ends with
GAIN = 1.05  # a doubling must raise images per second by this factor
ENOUGH_SECONDS, MOST_TIMINGS = 0.3, 3


def largest_batch(sampler: Sampler, scores: Scores, *, device: torch.device, cache: Path) -> int:
    """The best number of images to sample at once: doubled until they do not fit, or until it is no longer faster.

    The answer is kept for each sampler, extractors, device and version of torch. Without a kept answer, it is measured
    with the weights that are in the sampler, and a line says so.

    Args:
        sampler: with weights in it.
        scores: their extractors see the images.
        device: where both run.
        cache: the folder where answers are kept.

    Raises:
        ObjectiveError: not even one image fits.
    """
    file = _file(sampler, scores, device, cache)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads(file.read_text(encoding="utf-8"))["batch_size"])
    with torch.compiler.set_stance("force_eager"):  # a compiler would take minutes for each size
        size = fastest_size(lambda count: images_per_second(sampler, scores, count, device=device))
    _write(file, size, device)
    notice(f"batch_size: auto: {size} images at once on {_device_name(device)}; remembered in {file}")
    return size


def smaller_batch(size: int, sampler: Sampler, scores: Scores, *, device: torch.device, cache: Path) -> int:
    """Half of ``size``, which did not fit into memory; it replaces the kept answer.

    Raises:
        ObjectiveError: it was one image.
    """
    if size <= 1:
        raise ObjectiveError(NOTHING_FITS)
    free_memory()
    _write(_file(sampler, scores, device, cache), size // 2, device)
    notice(f"batch_size: auto: {size} images at once ran out of memory; going on with {size // 2}")
    return size // 2


def fastest_size(rate: Callable[[int], float | None], *, most: int = MOST) -> int:
    """The smallest of the sizes 4, 8, 16, … that is within 5 % of the fastest.

    Doubling ends when the memory is full, or after two doublings that gained less than 5 %. If not even 4 images fit,
    the size is halved until it fits.

    Args:
        rate: size → images per second; ``None`` if it does not fit into memory.
        most: the largest size.

    Raises:
        ObjectiveError: not even one image fits.
    """
    rates: dict[int, float] = {}
    size, best, without_gain = FIRST, 0.0, 0
    while size <= most and without_gain < 2:
        measured = rate(size)
        if measured is None:
            break
        rates[size] = measured
        without_gain = 0 if measured >= GAIN * best else without_gain + 1
        best, size = max(best, measured), 2 * size
    if rates:
        return min(size for size, measured in rates.items() if measured * GAIN >= best)
    while size > 1:
        size //= 2
        if rate(size) is not None:
            return size
    raise ObjectiveError(NOTHING_FITS)


@torch.no_grad()
def images_per_second(sampler: Sampler, scores: Scores, count: int, *, device: torch.device) -> float | None:
    """Images per second with ``count`` at once through sampler and extractors; ``None`` if they do not fit."""

    def once() -> float:
        start = time.perf_counter()
        scores.image_metrics(count).update(sampler.sample(SEARCH, 0, count))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    try:
        once()  # draws noise, chooses kernels, compiles
        timings = [once()]
        while sum(timings) < ENOUGH_SECONDS and len(timings) < MOST_TIMINGS:
            timings.append(once())
        return count / min(timings)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "DefaultCPUAllocator" not in str(error):
            raise
    free_memory()  # out here the exception is gone, and with it the memory that it held
    return None


NOTHING_FITS = (
    "batch_size: one image takes more memory than the device has; sample with dtype: bf16 or fp16, or run on another "
    "device"
)


def _device_name(device: torch.device) -> str:
    """The kind of device. A batch that fits one device fits all of its kind."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _file(sampler: Sampler, scores: Scores, device: torch.device, cache: Path) -> Path:
    described: dict[str, Any] = {
        "sampler": sampler.describe(),
        "extractors": sorted(str(view["name"]) for view in scores.describe()["extractors"].values()),
        "device": _device_name(device),
        "torch": torch.__version__,
    }
    text = json.dumps(described, sort_keys=True, default=str)
    return cache / "batch-sizes" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def _write(file: Path, size: int, device: torch.device) -> None:
    """Keep the size. If the folder cannot be written, it is measured again next time."""
    content = {"batch_size": size, "device": _device_name(device), "torch": torch.__version__}
    with contextlib.suppress(ObjectiveError):
        write_atomically(file, f"{json.dumps(content)}\n".encode(), error=ObjectiveError)
