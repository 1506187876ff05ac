"""What worker processes on this machine share: its cores and its devices."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence


def cores() -> int:
    """How many cores this process may use: under a batch system often fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def environments(workers: int, devices: Sequence[str] = ()) -> list[Mapping[str, str]]:
    """The environment variables of each worker, with which ``auto`` and a name without a number mean its device.

    Args:
        workers: how many.
        devices: the device of each worker, such as ``cuda:0`` or ``cpu``; empty spreads workers evenly over the
            accelerators.

    Raises:
        ObjectiveError: there is no such device.
    """
    from lcsc_opt.base import accelerator

    there = accelerator.names()
    if not devices and len(there) < 2:
        return [{}] * workers
    chosen = devices or [there[worker % len(there)] for worker in range(workers)]
    return [accelerator.only(accelerator.find(device)) for device in chosen]
