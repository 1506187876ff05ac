from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def everywhere(one_thread: None) -> None:
    """Sums over several threads have other last bits; threads that wait for each other take long on a busy machine."""
