from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the study file is in, below the working directory."""
    monkeypatch.chdir(tmp_path)
    here = tmp_path / "study"
    here.mkdir()
    return here
