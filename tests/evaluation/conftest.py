from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def importable_by_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker processes are new interpreters, which find the examples by their module's name."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
