"""One thread: the networks and matrices of these tests are small, and cores may be shared."""

import pytest
from threadpoolctl import threadpool_limits


@pytest.fixture(scope="module", autouse=True)
def one_thread_of_each_library(one_thread):
    with threadpool_limits(1):
        yield
