"""One thread: the networks and matrices of these tests are small, and cores may be shared."""

import pytest
from threadpoolctl import threadpool_limits

from lcsc_opt.metrics import distances


@pytest.fixture(scope="module", autouse=True)
def one_thread_of_each_library(one_thread):
    with threadpool_limits(1):
        yield


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request, monkeypatch):
    """Of pairs of images whose distances are held at once."""
    if request.param == "many blocks":
        monkeypatch.setattr(distances, "BLOCK", 700)
