"""Trainings on two processes: one writes, what was preempted goes on, nobody waits for a process that does not come."""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from lcsc_opt.trajectory import Trajectory
from tests.processes import CONTEXT, SECONDS, forked
from tests.trajectory.rank_training import DIED, KINDS, SAVED_AT, serve

REWOUND = f"goes back to step {SAVED_AT}, 1 later checkpoints are dropped"


@pytest.fixture(scope="module")
def launcher() -> Iterator[Connection]:
    """To the process that the processes of trainings are forked from."""
    here, there = CONTEXT.Pipe()
    process = forked(serve, there)
    process.start()
    there.close()
    with here:
        yield here
    process.join(SECONDS)


def train(launcher: Connection, kind: str, folder: Path, *, resume: bool) -> list[int | None]:
    """On two processes; how each ended, nothing where it hung."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "ranks", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launcher.send((kind, folder, [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"], resume))
    return launcher.recv()  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_that_die_go_on_and_only_one_of_them_writes(
    launcher: Connection, kind: str, tmp_path: Path
) -> None:
    if kind == "lightning" and importlib.util.find_spec("pytorch_lightning") is None:
        pytest.skip("Lightning is not installed")
    assert train(launcher, kind, tmp_path / "run", resume=False) == [DIED, DIED]
    before = Trajectory.open(tmp_path / "run" / "run.trajectory")
    assert before.steps == (2, 4, 6), "row 6 is later than the checkpoint of step 4"
    rows = before.checkpoint_sha256
    assert train(launcher, kind, tmp_path / "run", resume=True) == [0, 0], (tmp_path / "said0").read_text()
    after = Trajectory.open(tmp_path / "run" / "run.trajectory")
    assert after.steps == (2, 4, 6, 8, 10)
    assert after.checkpoint_sha256[:3] == rows, "what was dropped came again, bit for bit"
    assert (tmp_path / "said0").read_text().count(REWOUND) == 1
    assert REWOUND not in (tmp_path / "said1").read_text()
