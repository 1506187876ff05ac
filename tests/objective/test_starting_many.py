"""A draft for very many checkpoints takes as many as a search along the gradient needs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from lcsc_opt.objective.starting import draft


@pytest.mark.parametrize(
    ("count", "kind", "taken"), [(40, "module", {"count": 16}), (32, "module", None), (40, "score", None)]
)
def test_a_draft_takes_sixteen_of_more_than_thirty_two_checkpoints(
    tmp_path: Path, count: int, kind: str, taken: dict[str, int] | None
) -> None:
    for step in range(10, 10 * count + 10, 10):
        torch.save({"layer.weight": torch.full((2, 2), float(step))}, tmp_path / f"model_{step:04d}.pt")
    text, _ = draft(kind, [tmp_path], {})  # type: ignore[arg-type]
    assert yaml.safe_load(text)["objective"]["settings"].get("select") == taken
