"""What merges do to the process around them: its threads, and what it asked torch for."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from lcsc_opt.trajectory.disk.tiles import Scratch, Tile
from lcsc_opt.trajectory.merge import arithmetic
from lcsc_opt.trajectory.merge.arithmetic import Workers


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_threads_of_a_merge_take_no_further_ones_and_leave_others_theirs() -> None:
    tiles = [Tile(start, start + 1, torch.ones(1, 1, 3, 1)) for start in range(40)]
    seen: dict[int, int] = {}

    def note(tile: Tile, _scratch: Scratch) -> None:
        seen[tile.start] = torch.get_num_threads()

    with Workers(2) as workers:
        workers.each(note, tiles)
    assert seen == dict.fromkeys(range(40), 1)
    assert torch.get_num_threads() == 2
    others: list[int] = []
    thread = threading.Thread(target=lambda: others.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert others == [2]


@pytest.mark.parametrize("count", [1, 3])
def test_what_a_tile_raises_is_raised(count: int) -> None:
    def fail(_tile: Tile, _scratch: Scratch) -> None:
        raise ValueError("broken")

    with Workers(count) as workers, pytest.raises(ValueError, match="broken"):
        workers.each(fail, [Tile(0, 1, torch.ones(1, 1, 3, 1))])


def test_precision_is_as_before_when_the_last_of_several_threads_is_done() -> None:
    asked = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    before = torch.backends.mkldnn.matmul.fp32_precision
    first, second = threading.Event(), threading.Event()

    def merge() -> None:
        with arithmetic.full_precision():
            first.set()
            second.wait(120)

    try:
        thread = threading.Thread(target=merge)
        thread.start()
        first.wait(120)
        with arithmetic.full_precision():
            second.set()
            thread.join()
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert torch.backends.mkldnn.matmul.fp32_precision == before != "ieee"
    finally:
        torch.set_float32_matmul_precision(asked)
