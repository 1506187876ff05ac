"""Which device each worker process has, and how many of the cores."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from lcsc_opt.base.errors import StudySpecError

VISIBLE = "CUDA_VISIBLE_DEVICES"
CPU = "cpu"


def gpus() -> list[str]:
    """The GPUs that this process may use, by the names that ``CUDA_VISIBLE_DEVICES`` takes."""
    import torch

    count = torch.cuda.device_count()
    listed = [name.strip() for name in os.environ.get(VISIBLE, "").split(",") if name.strip()]
    return listed[:count] if len(listed) >= count else [str(index) for index in range(count)]


def workers_for_this_machine() -> int:
    """One for each GPU; one where there is none, since one process uses all cores."""
    return max(len(gpus()), 1)


def cores() -> int:
    """How many cores this process may use: under a batch system often fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def environments(workers: int, devices: Sequence[str] = ()) -> list[Mapping[str, str]]:
    """The environment variables of each worker, with which ``cuda`` and ``auto`` mean its own device.

    Args:
        workers: how many.
        devices: the device of each worker, such as ``cuda:0`` or ``cpu``; empty spreads workers evenly over the GPUs.

    Raises:
        StudySpecError: there is no such GPU.
    """
    there = gpus()
    if not devices:
        return [{VISIBLE: there[worker % len(there)]} if len(there) > 1 else {} for worker in range(workers)]
    return [{VISIBLE: _visible(device, there)} for device in devices]


def _visible(device: str, there: Sequence[str]) -> str:
    if device == CPU:
        return ""
    index = int(device.partition(":")[2] or 0)
    if index >= len(there):
        seen = f"{len(there)} of them" if there else "none"
        raise StudySpecError(f"workers: {device} is not there (torch sees {seen}); 'auto' takes what is")
    return there[index]
