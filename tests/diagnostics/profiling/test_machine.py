from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from lcsc_opt.diagnostics.profiling import machine

CPU = torch.device("cpu")


def a_second_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on when it is looked at, and only then."""
    monkeypatch.setattr(machine.time, "perf_counter", itertools.count().__next__)


def test_reading_is_measured_on_the_files_own_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "BLOCK_BYTES", 2**20)
    file = tmp_path / "weights.bin"
    file.write_bytes(bytes(8 * 2**20 + 5))
    a_second_each_time(monkeypatch)
    monkeypatch.setattr(machine, "READ_SECONDS", 1000.0)
    assert machine.read_rate(file) == 8 * 2**20 / 9  # the clock is looked at after each block and at the end
    monkeypatch.setattr(machine, "READ_SECONDS", 0.0)
    assert machine.read_rate(file) > 0  # of the one block that there was time for


def test_memory_is_read_once_for_each_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "LARGEST_READ", 2**22)
    a_second_each_time(monkeypatch)
    assert machine.memory_rate(CPU, 10**12) == 2**22
    assert machine.memory_rate(CPU, 800) == 800


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_arithmetic_is_that_of_the_faster_task(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "MATRIX", {"cpu": 256})
    monkeypatch.setattr(machine, "CONVOLUTION", {"cpu": (2, 16, 8)})
    a_second_each_time(monkeypatch)
    assert machine.arithmetic_rate(dtype, CPU) == 2 * 256**3  # the convolution has fewer operations in that second


def test_operations_count_a_multiplication_and_an_addition_as_two(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    monkeypatch.setattr(machine, "MATRIX", {"cpu": 32})
    monkeypatch.setattr(machine, "CONVOLUTION", {"cpu": (2, 4, 8)})
    for task, operations in machine._tasks(torch.float32, CPU):
        with FlopCounterMode(display=False) as counter:
            task()
        assert counter.get_total_flops() == operations


def test_memory_is_what_the_process_had_at_most() -> None:
    before = machine.peak_bytes()
    torch.ones(64 * 2**20, dtype=torch.uint8)
    assert before <= machine.peak_bytes() < 2**40
    assert machine.peak_bytes() > 50 * 2**20
    assert machine.device_peak_bytes(CPU) is None
