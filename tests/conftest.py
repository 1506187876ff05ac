"""What many tests need: a quick objective over coefficients, and a study database in a temporary folder."""

from __future__ import annotations

import collections
import gc
import itertools
import math
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import types
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import psutil
import pytest
import sqlalchemy as sa
from optuna.storages import RDBStorage
from threadpoolctl import threadpool_limits

from lcsc_opt.base import accelerator
from lcsc_opt.base.imports import allow_mismatched_torchvision
from lcsc_opt.base.machine import cores, let_waiting_threads_sleep
from lcsc_opt.base.progress import log, messages_on_stderr
from lcsc_opt.database import connection, lock
from lcsc_opt.database.connection import open_storage
from lcsc_opt.objective.contract import CoefficientFunction, Objective
from tests import commands, database_servers, migrations, processes

# no deadline, and no complaint about slow examples: the first one pays for imports, and machines are shared
hypothesis.settings.register_profile(
    "lcsc_opt", deadline=None, max_examples=50, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("lcsc_opt")

if sys.version_info < (3, 11):  # its pathlib keeps the function that it found when it was imported
    pathlib._NormalAccessor.replace = staticmethod(lambda *paths: os.replace(*paths))  # noqa: PTH105 - the point of it

if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background processes do not have

MEMORY, ROOM = Path("/dev/shm"), 4 * 2**30
if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > ROOM:
    os.environ.setdefault("TMPDIR", str(MEMORY))  # temporary folders and databases: no commit waits for a disk
    tempfile.tempdir = None  # pytest has asked for it before

PROCESS_BYTES = 2 * 2**30  # of a process that runs tests; it takes up to 1.7 GB
FILES, FILES_BETWEEN_COLLECTIONS = itertools.count(), 4
STEPS = tuple(range(100, 2100, 100))


def distance_to_target(coefficients: np.ndarray) -> float:
    """A smooth loss whose optimum, with negative coefficients, no EMA reaches."""
    target = np.linspace(-0.3, 0.4, len(coefficients))
    return float(np.square(coefficients - target / target.sum()).sum())


def pytest_configure() -> None:
    """Tests have small networks on shared cores: threads that wait for each other take ten times the work's time."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    threadpool_limits(int(os.environ["OMP_NUM_THREADS"]))  # of numpy, which is imported already
    let_waiting_threads_sleep()  # nothing has imported torch yet
    allow_mismatched_torchvision()  # tests import diffusers and transformers themselves
    gc.disable()  # until all is imported, of which nothing is garbage
    migrations.read_once()
    migrations.copy_empty()


def pytest_xdist_auto_num_workers() -> int:
    """As many as the cores, and two GiB of free memory for each; one more was slower."""
    return max(1, min(cores(), psutil.virtual_memory().available // PROCESS_BYTES))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, then those with many, so that all processes are through at the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    tests = collections.Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path not in slow, -tests[item.path], item.path))


def pytest_collection_finish() -> None:
    """A candidate that fails is followed by a garbage collection, which need not look at all that was imported.

    Others are rarer than Python's own: with its thresholds they took a twentieth of the time.
    """
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()


def seed_global_generators(name: str) -> None:
    """For what draws without a generator of its own: other tests before this one, or none, change nothing."""
    seed = zlib.crc32(name.encode())
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the global one
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.manual_seed(seed)


@pytest.fixture(autouse=True)
def nothing_depends_on_time(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else two runs could differ in their last bits, and a slow machine would evaluate and say more than a fast one.

    A test with a ``clock`` of its own has the limits that users have.
    """
    monkeypatch.setattr("lcsc_opt.base.progress.SLOW_SECONDS", threading.TIMEOUT_MAX)
    if "clock" in request.fixturenames:
        return
    if "lcsc_opt.sampling.layout" in sys.modules:
        monkeypatch.setattr("lcsc_opt.sampling.layout.SECONDS_TO_SHORTEN", math.inf)
    if "lcsc_opt.experiment.rehearsal" in sys.modules:
        monkeypatch.setattr("lcsc_opt.experiment.rehearsal.TIMED_SECONDS", math.inf)
        monkeypatch.setattr("lcsc_opt.experiment.rehearsal.SLOW_SECONDS", math.inf)


@pytest.fixture(autouse=True)
def workers_are_forked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for tests of how they start."""
    process = sys.modules.get("lcsc_opt.evaluation.process")
    if process is not None and request.node.get_closest_marker("fresh_workers") is None:
        monkeypatch.setattr(process, "subprocess", types.SimpleNamespace(Popen=processes.ForkedWorker))


@pytest.fixture(scope="module", autouse=True)
def a_files_own_numbers(request: pytest.FixtureRequest) -> None:
    seed_global_generators(request.node.nodeid)


@pytest.fixture(autouse=True)
def a_tests_own_numbers(request: pytest.FixtureRequest) -> None:
    seed_global_generators(request.node.nodeid)


@pytest.fixture(scope="module", autouse=True)
def collections_look_at_a_files_own_objects() -> None:
    """What is left of the files before, mostly modules that they imported, is no garbage for the next ones."""
    if next(FILES) % FILES_BETWEEN_COLLECTIONS == 0:
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def nothing_keeps_running() -> Iterator[None]:
    yield
    processes.kill_what_still_runs()


@pytest.fixture(autouse=True)
def messages_are_printed() -> Iterator[None]:
    """As the command line does it."""
    with messages_on_stderr():
        log.propagate = True  # to what records them for tests
        yield


@pytest.fixture
def objective() -> Objective:
    return CoefficientFunction(distance_to_target, STEPS, name="tests:distance_to_target")


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'studies.db'}"


@pytest.fixture
def storage(url: str) -> RDBStorage:
    return open_storage(url, write=True)


@pytest.fixture(scope="session")
def postgresql() -> Iterator[database_servers.Postgresql]:
    """A server of the tests' own; skips where none is installed, and fails in CI."""
    with database_servers.postgresql() as server:
        yield server


@pytest.fixture
def postgresql_url(postgresql: database_servers.Postgresql) -> Iterator[str]:
    """An empty database; connections that a test leaves open are closed after it."""
    opened: list[Any] = []

    def remember(connection: Any, _record: Any) -> None:
        opened.append(connection)

    sa.event.listen(sa.pool.Pool, "connect", remember)
    yield postgresql.new_database()
    sa.event.remove(sa.pool.Pool, "connect", remember)
    for left_open in opened:
        left_open.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def any_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Each database that the store must be the same on."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'any.db'}"
    url = str(request.getfixturevalue("postgresql_url"))
    return url.replace("postgresql:", "postgresql+psycopg:")  # tests open it with Optuna, too


@pytest.fixture
def any_storage(any_url: str) -> RDBStorage:
    return open_storage(any_url, write=True)


@pytest.fixture
def anything_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes no time is said, too."""
    monkeypatch.setattr("lcsc_opt.base.progress.SLOW_SECONDS", 0.0)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for long: for a lock, or for a server that comes back."""
    monkeypatch.setattr(lock, "WAIT_SECONDS", 0.3)
    monkeypatch.setattr(lock, "RETAKE_SECONDS", 0.3)
    monkeypatch.setattr(connection, "BUSY_SECONDS", 0.05)
    monkeypatch.setattr(connection, "RETRY_SECONDS", (0.02, 0.05, 0.1, 0.5, 1.0))


@pytest.fixture
def set_devices(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Names the accelerators that the machine has from then on."""
    return lambda *names: monkeypatch.setattr(accelerator, "names", lambda: list(names))


@pytest.fixture
def few_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The images that an export compares, of which users look at more."""
    monkeypatch.setattr("lcsc_opt.exports.images.PAIRS", 12)


@pytest.fixture
def few_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The held-out real images that are divided, of which users need more."""
    monkeypatch.setattr("lcsc_opt.metrics.reference.reference.FEWEST_UNSEEN", 4)


@pytest.fixture
def few_of_average(monkeypatch: pytest.MonkeyPatch) -> None:
    """The samples of the average that the target of few real images is shrunk towards, of which users have more."""
    monkeypatch.setattr("lcsc_opt.objective.merge_sample_score.ENOUGH", 24)
    monkeypatch.setattr("lcsc_opt.objective.merge_sample_score.PROBE", 12)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory with no storage in the environment; what was imported from it is forgotten."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("LCSC_STORAGE", raising=False)
    monkeypatch.delenv("OPTUNA_STORAGE", raising=False)
    known = set(sys.modules)
    yield folder
    for name in sys.modules.keys() - known:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(folder)):
            del sys.modules[name]


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch's; modules with small networks use it."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str]) -> commands.Typed:
    """Types commands of ``lcsc``."""
    return commands.Typed(capsys)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder with room for two megabytes."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a tmpfs of its own needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True, capture_output=True)


@pytest.fixture
def plain_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets that are shrunk need samples of an average first; tests of few real images have those."""
    monkeypatch.setattr("lcsc_opt.metrics.suite.MOST_REAL", 0)
