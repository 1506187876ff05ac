"""A training on two processes: one writes, what was preempted goes on, and nobody waits for a process that died."""

from __future__ import annotations

import os
import socket
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from lcsc_opt.trajectory import Trajectory
from lcsc_opt.trajectory.callbacks import TrajectorySaver
from tests.processes import SECONDS, forked

STEPS, SAVED_AT, DIES_AT = 10, 4, 7
DIED = 3  # the exit status of a process that was told to die
KEPT: list[object] = []  # until the process ends: gloo's destructors may wait for ever for a process that has ended


def rank(folder: Path, environment: dict[str, str], *, resume: bool) -> None:
    """One process of a training with Accelerate, as ``torchrun`` starts it; it says things to a file of its own."""
    warnings.simplefilter("ignore")
    os.environ.update(environment)
    said = folder.parent / f"said{environment['RANK']}"
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    from accelerate import Accelerator  # type: ignore[import-untyped]

    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    model, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters(), 1e-2))
    KEPT.extend([accelerator, model, optimizer])
    saver = TrajectorySaver(folder / "run.trajectory", every=2, accelerator=accelerator)
    if resume:
        accelerator.load_state(str(folder / "kept"))
    for step in range(SAVED_AT + 1 if resume else 1, STEPS + 1):
        if step > DIES_AT and not resume:
            sys.exit(DIED)
        inputs = torch.full((4, 3), 1.0 + accelerator.process_index + step / STEPS)
        accelerator.backward(model(inputs).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        saver.step(step, model)
        if step == SAVED_AT:
            accelerator.save_state(str(folder / "kept"))
    saver.close()
    accelerator.end_training()


def train(folder: Path, *, resume: bool) -> list[int | None]:
    """On two processes; how each ended, nothing where it hung."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "ranks", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    processes = [forked(rank, folder, shared | {"RANK": r, "LOCAL_RANK": r}, resume=resume) for r in "01"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
    ended = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return ended


@pytest.mark.slow
def test_two_processes_that_die_go_on_and_only_one_of_them_writes(tmp_path: Path) -> None:
    assert train(tmp_path / "run", resume=False) == [DIED, DIED]
    before = Trajectory.open(tmp_path / "run" / "run.trajectory")
    assert before.steps == (2, 4, 6), "row 6 is later than the checkpoint of step 4"
    assert train(tmp_path / "run", resume=True) == [0, 0], (tmp_path / "said0").read_text()
    after = Trajectory.open(tmp_path / "run" / "run.trajectory")
    assert after.steps == (2, 4, 6, 8, 10)
    assert after.checkpoint_sha256[:3] == before.checkpoint_sha256, "what was dropped came again, bit for bit"
    rewound = f"goes back to step {SAVED_AT}, 1 later checkpoints are dropped"
    assert (tmp_path / "said0").read_text().count(rewound) == 1
    assert rewound not in (tmp_path / "said1").read_text()
