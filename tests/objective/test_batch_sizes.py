"""How many images are sampled at once on the CPU, where nothing follows the memory."""

from __future__ import annotations

import re

import pytest
import torch

from lcsc_opt.base.accelerator import CPU
from lcsc_opt.base.progress import progress
from lcsc_opt.objective.batch_sizes import AUTO, BatchSizes, Size, images_at_once


@pytest.mark.parametrize(
    ("given", "with_graph", "expected"),
    [
        (None, None, (500, 500)),
        (None, 20, (500, 20)),
        (AUTO, None, (500, 125)),
        (64, None, (64, 64)),
        (64, 100, (64, 64)),
    ],
)
def test_the_cpu_has_numbers_that_no_batch_changes(
    given: Size | None, with_graph: int | None, expected: tuple[int, int]
) -> None:
    sizes = BatchSizes(images_at_once(given, CPU), with_graph=with_graph, images=2000, device=CPU)
    for batches in (sizes.batches, sizes.batches_with_graph):
        ranges = list(batches(3, 1803))
        assert [first for first, _ in ranges] == [3, *(last for _, last in ranges[:-1])]
        assert ranges[-1][1] == 1803
    assert (sizes.without_graph, sizes.with_graph) == expected


@pytest.mark.parametrize(("side", "expected"), [(16, 500), (64, 500), (128, 128), (512, 8), (4096, 1)])
def test_a_pipeline_samples_as_many_small_images_at_once_as_any_sampler_and_fewer_large_ones(
    side: int, expected: int
) -> None:
    assert images_at_once(None, CPU, image_size=(side, side)) == expected
    assert images_at_once(64, CPU, image_size=(side, side)) == 64
    assert images_at_once(None, torch.device("meta"), image_size=(side, side)) == "auto"


@pytest.mark.usefixtures("anything_is_slow")
def test_images_of_a_long_evaluation_are_counted_behind_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = BatchSizes(64, with_graph=None, images=1150)
    for batches in (sizes.batches, sizes.batches_with_graph):
        with progress("report", 1, after=1e-9) as advance:
            assert list(batches(1000, 1150)) == [(1000, 1064), (1064, 1128), (1128, 1150)]
            advance()
        counted = re.findall(r"images [\d,/]+", capsys.readouterr().err)
        assert list(dict.fromkeys(counted)) == ["images 64/150", "images 128/150", "images 150/150"]
