"""What holds on every accelerator, in a process of its own: the pretend one stays once it is registered."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_what_must_hold_on_every_accelerator_holds_on_a_pretend_one() -> None:
    checks = Path(__file__).with_name("on_pretend.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(checks)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:]
