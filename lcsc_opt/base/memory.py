"""Giving memory back."""

from __future__ import annotations

import gc
import sys


def free_memory() -> None:
    """Free the memory of a failed attempt, also on the accelerator, for the next one.

    Call it when the exception is gone: its frames hold the attempt's tensors.
    """
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
