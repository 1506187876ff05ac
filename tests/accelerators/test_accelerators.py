"""What holds on every accelerator, in a process of its own: the pretend one stays once it is registered."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from tests.accelerators import pretend
from tests.processes import Lcsc

HERE = Path(__file__).parent
REAL = pytest.mark.skipif(not torch.accelerator.is_available(), reason="this machine has none")
TESTS = ("-q", "-p", "no:cacheprovider", str(HERE / "on_device.py"))


def run_pretended(arguments: tuple[str, ...]) -> NoReturn:
    """As ``pytest ARGUMENTS`` where the pretend accelerator is installed."""
    pretend.register()
    sys.exit(pytest.main([*arguments]))


@pytest.mark.slow
def test_what_must_hold_on_every_accelerator_holds_on_a_pretended_one() -> None:
    done = Lcsc(first=functools.partial(run_pretended, TESTS)).wait()
    sys.stdout.write(done.out + done.err)
    assert done.status == 0


@pytest.mark.slow
@pytest.mark.gpu
@REAL
def test_what_must_hold_on_every_accelerator_holds_on_the_real_one() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), *sys.path])}
    command = [sys.executable, "-m", "pytest", *TESTS]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    sys.stdout.write(done.stdout)
    assert done.returncode == 0
