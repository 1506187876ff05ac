from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch

from lcsc_opt.base import accelerator


def test_a_device_that_is_full_for_a_moment_can_compute_in_float64_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator.has_float64.cache_clear()
    with monkeypatch.context() as full:
        full.setattr(torch, "ones", Mock(side_effect=torch.OutOfMemoryError))
        with pytest.raises(torch.OutOfMemoryError):
            accelerator.has_float64(accelerator.CPU)
    assert accelerator.has_float64(accelerator.CPU)
