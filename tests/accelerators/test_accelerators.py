"""What holds on every accelerator, in a process of its own: the pretend one stays once it is registered."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
REAL = pytest.mark.skipif(not torch.accelerator.is_available(), reason="this machine has none")


@pytest.mark.slow
@pytest.mark.parametrize("device", ["pretend", pytest.param("real", marks=[pytest.mark.gpu, REAL])])
def test_what_must_hold_on_every_accelerator_holds(device: str) -> None:
    path = os.pathsep.join(
        [*([str(HERE / "autoload")] if device == "pretend" else []), str(HERE.parents[1]), *sys.path]
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "on_device.py")]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    sys.stdout.write(done.stdout)
    assert done.returncode == 0
