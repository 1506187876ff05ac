"""What many tests need: a quick objective over coefficients, and a study database in a temporary folder."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import numpy as np
import pytest

from lcsc_opt.objective import CoefficientFunction, Objective

# no deadline: the first example pays for imports, and machines are shared
hypothesis.settings.register_profile("lcsc_opt", deadline=None)
hypothesis.settings.load_profile("lcsc_opt")

STEPS = tuple(range(100, 2100, 100))


def distance_to_target(coefficients: np.ndarray) -> float:
    """A smooth loss whose optimum, with negative coefficients, no EMA reaches."""
    target = np.linspace(-0.3, 0.4, len(coefficients))
    return float(np.square(coefficients - target / target.sum()).sum())


@pytest.fixture
def objective() -> Objective:
    return CoefficientFunction(distance_to_target, STEPS, name="tests:distance_to_target")


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'studies.db'}"


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with a cache of its own and no storage in the environment."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LCSC_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LCSC_STORAGE", raising=False)
    monkeypatch.delenv("OPTUNA_STORAGE", raising=False)
    return folder
