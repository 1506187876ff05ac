from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from lcsc_opt.diagnostics.profiling import machine

CPU = torch.device("cpu")


def test_reading_is_measured_on_the_files_own_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "BLOCK_BYTES", 2**20)
    file = tmp_path / "weights.bin"
    file.write_bytes(bytes(8 * 2**20 + 5))
    rate = machine.read_rate(file)
    start = time.perf_counter()
    content = file.read_bytes()
    copied = len(content) / (time.perf_counter() - start)
    assert copied / 100 < rate < 1e13
    monkeypatch.setattr(machine, "READ_SECONDS", 0.0)
    assert machine.read_rate(file) > 0  # of the one block that there was time for


def test_memory_is_read_as_fast_as_it_is_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "LARGEST_READ", 2**22)
    words = torch.zeros(2**19, dtype=torch.int64)
    start = time.perf_counter()
    words.sum()
    assert machine.memory_rate(CPU, 10**12) > words.nbytes / (time.perf_counter() - start) / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_arithmetic_is_as_fast_as_a_matrix_product(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "MATRIX", {"cpu": 256})
    monkeypatch.setattr(machine, "CONVOLUTION", {"cpu": (2, 16, 8)})
    matrix = torch.rand(256, 256).to(dtype)
    start = time.perf_counter()
    for _ in range(3):
        matrix @ matrix
    assert machine.arithmetic_rate(dtype, CPU) > 3 * 2 * 256**3 / (time.perf_counter() - start) / 4


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
