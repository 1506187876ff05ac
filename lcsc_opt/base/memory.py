"""Giving memory back."""

from __future__ import annotations

import gc
import sys


def free_memory() -> None:
    """Give back what a failed attempt held, on the accelerator too, so that the next one can have it.

    Call it where the exception is gone, and with it the frames that held the attempt's tensors.
    """
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
