from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the study file is in, and a cache of its own."""
    monkeypatch.setenv("LCSC_CACHE", str(tmp_path / "cache"))
    here = tmp_path / "study"
    here.mkdir()
    return here
