"""The figure of ``benchmarks/means.py``: each training counts once, whatever number of seeds it has."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import means


def test_the_figure_has_a_line_for_each_kind_of_rows_and_of_coefficients() -> None:
    results = {}
    for coefficients, fid in (("layers", 1.0), ("one row", 5.0)):
        for rows, megabytes in (("8 means", 5.0), ("8 checkpoints", 5.0), ("all", 100.0)):
            for training, seed in ((0, 0), (0, 1), (1, 0)):
                values = {"fid B": fid + training, "megabytes": megabytes}
                results["digits", training, rows, coefficients, seed, 20_000] = values
    lines = {line.name: line for line in means.figure(results).data}
    assert list(lines) == ["layers, means", "layers, checkpoints", "one row, means", "one row, checkpoints"]
    assert lines["one row, means"].x == (5.0, 100.0)
    assert lines["one row, means"].y == pytest.approx((5.5, 5.5))
    assert lines["layers, means"].error_y.array == pytest.approx((0.5, 0.5))
