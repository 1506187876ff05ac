"""Trainings whose weights are sharded over two processes, forks of one that has imported what they need."""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.fsdp import fully_shard
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.trajectory import TrajectoryWriter
from lcsc_opt.trajectory.callbacks import TrajectorySaver
from tests.processes import SECONDS
from tests.trajectory.test_means import with_statistics

FORK = multiprocessing.get_context("fork")
STEPS = 23
MEANS = 4
CALLS = ("pwrite", "fsync", "replace")
PLACEMENTS: dict[str, Any] = {
    "weight": Shard(1),  # 7 × 5: strips, and not as many in each process
    "bias": Shard(0),
    "double": Shard(0),
    "bfloat": Shard(0),
    "half": Replicate(),
    "constant": Shard(0),
    "index": Shard(0),
}


def full_weights(step: int) -> dict[str, Tensor]:
    """Those of a training that is not sharded."""
    return {**with_statistics(step), "one": torch.tensor([float(step)])}


def sharded_weights(step: int, mesh: DeviceMesh) -> dict[str, Tensor]:
    """The same, each process with its part; ``one`` is all in the first."""
    weights: dict[str, Tensor] = {}
    for name, tensor in full_weights(step).items():
        placement = PLACEMENTS.get(name)
        if name == "one":
            placement = Shard(0)
        weights[name] = tensor
        if placement is not None:
            weights[name] = distribute_tensor(tensor, mesh, [placement], src_data_rank=None)
    return weights


def append_all(path: Path, mesh: DeviceMesh) -> None:
    """Go on behind the last checkpoint that is there."""
    with TrajectoryWriter(path, sharded=True, keep_last=4) as writer:
        first = max(writer.steps, default=0) + 1
        for step in range(first, STEPS + 1):
            writer.append(step, sharded_weights(step, mesh), wait=step % 3 == 0)


def add_all(path: Path, mesh: DeviceMesh) -> None:
    """Means; each process saves its state every fifth step, and goes on from the last one that all have."""
    rank = distributed.get_rank()
    first = 1
    saved = _common_states(path)
    with TrajectoryWriter(path, sharded=True, means=MEANS, resume=None if saved else 0) as writer:
        if saved:
            first = saved[-1] + 1
            writer.load_state_dict(torch.load(_state(path, saved[-1], rank), weights_only=True))
        for step in range(first, STEPS + 1):
            writer.step(step, sharded_weights(step, mesh))
            if step % 5 == 0:
                pending = _state(path, step, rank).with_suffix(".partial")
                torch.save(writer.state_dict(), pending)
                pending.replace(_state(path, step, rank))
        writer.finish(STEPS, sharded_weights(STEPS, mesh))


def _state(path: Path, step: int, rank: int) -> Path:
    return path.with_name(f"{path.name}-{step}-{rank}.pt")


def _common_states(path: Path) -> list[int]:
    """The steps of which every process has saved its state. All look before one writes."""
    steps = [step for step in range(STEPS) if all(_state(path, step, rank).exists() for rank in range(2))]
    distributed.barrier()
    return steps


def train_fsdp(path: Path, mesh: DeviceMesh) -> None:
    """A model with ``fully_shard``; the first process keeps what all processes have together."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    with TrajectoryWriter(path, sharded=True) as writer:
        _train(path, model, functools.partial(writer.append, wait=False))


def train_tensor_parallel(path: Path, mesh: DeviceMesh) -> None:
    """The same for tensor parallelism, with a first layer in columns and a second one in rows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    saver = TrajectorySaver(path, every=1, sharded=True)
    _train(path, model, saver.step)
    saver.close()


def _train(path: Path, model: nn.Module, save: Callable[[int, nn.Module], object]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gathered: dict[int, Mapping[str, Tensor]] = {}
    for step in range(1, 4):
        loss = model(torch.ones(4, next(model.parameters()).shape[1])).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        save(step, model)
        gathered[step] = {name: _full(tensor) for name, tensor in model.state_dict().items()}
    if distributed.get_rank() == 0:
        torch.save(gathered, path.with_suffix(".pt"))


def _full(tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        return tensor.full_tensor().clone()
    return tensor.clone()


def kill_before(at: int) -> None:
    """SIGKILL comes before the call ``at`` among those of :data:`CALLS`."""
    calls = itertools.count(1)

    def dying(plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if next(calls) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*arguments, **options)

        return call

    for name in CALLS:
        setattr(os, name, dying(getattr(os, name)))


def run_process(rank: int, meeting: Path, train: Callable[[Path, DeviceMesh], None], path: Path, at: int) -> None:
    """One of two processes, which is killed at the call ``at``; the other one ends with what the writer says."""
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    if at:
        kill_before(at)
    try:
        train(path, mesh)
    except TrajectoryError as error:
        path.with_suffix(".error").write_text(str(error))
        os._exit(3)
    distributed.barrier()
    os._exit(0)


def misuse(path: Path, mesh: DeviceMesh) -> None:
    """What each process says to what users may do wrong; a line for each, in the file of its rank."""
    rank = distributed.get_rank()
    sharded = sharded_weights(1, mesh)
    broken = sharded_weights(2, mesh)
    broken["weight"].to_local()[-1, -1] = float("nan") if rank == 1 else 0.0
    partial = DTensor.from_local(torch.ones(3), mesh, [Partial()])
    said: list[str] = []

    def attempt(call: Callable[[], object]) -> None:
        try:
            call()
            said.append("")
        except TrajectoryError as error:
            said.append(str(error))

    with TrajectoryWriter(path.with_name(f"plain-{rank}")) as plain:
        attempt(lambda: plain.append(1, sharded))
    attempt(lambda: TrajectoryWriter(path.with_name(f"own-{rank}"), sharded=True))
    disk = path.with_name(f"disk-{rank}")
    disk.mkdir()
    os.chdir(disk)
    attempt(lambda: TrajectoryWriter("own", sharded=True))
    attempt(lambda: TrajectoryWriter(path.with_name("int8"), sharded=True))
    with TrajectoryWriter(path, sharded=True) as writer:
        attempt(lambda: writer.append(1, {"w": torch.ones(3 + rank)}))
        attempt(lambda: writer.append(1, {"w": partial}))
        writer.append(1, sharded)
        attempt(lambda: writer.append(1, sharded_weights(1, mesh)))
        attempt(lambda: writer.append(1, sharded_weights(2, mesh)))
        attempt(lambda: writer.append(2, broken))
        attempt(lambda: writer.append(2 + rank, sharded))
        attempt(lambda: writer.append(3, sharded if rank == 0 else {"w": torch.ones(3)}))
        writer.append(3, sharded_weights(3, mesh))
    with TrajectoryWriter(path.with_name("means"), sharded=True, means=2) as adding:
        adding.step(1, sharded)
        states: list[Any] = [None, None]
        distributed.all_gather_object(states, adding.state_dict())
    with TrajectoryWriter(path.with_name("means"), sharded=True, means=2) as adding:
        attempt(lambda: adding.load_state_dict(states[1 - rank]))
        attempt(lambda: adding.load_state_dict(states[rank] if rank == 0 else {}))
    path.with_suffix(f".{rank}").write_text("\n".join(said))


def write_elsewhere(path: Path, mesh: DeviceMesh) -> None:
    """The second process has a folder of the same name on its own disk, from an earlier training."""
    os.chdir(path.parent)
    if distributed.get_rank() == 1:
        disk = path.with_name("another disk")
        disk.mkdir()
        os.chdir(disk)
        TrajectoryWriter(path.name).close()
    distributed.barrier()
    with TrajectoryWriter(path.name, sharded=True) as writer:
        writer.append(1, sharded_weights(1, mesh))


def train_all(folder: Path) -> None:
    """All trainings, one after the other, in a process of torchrun's."""
    distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    append_all(folder / "appended.trajectory", mesh)
    train_fsdp(folder / "fsdp.trajectory", mesh)
    train_tensor_parallel(folder / "tensor.trajectory", mesh)
    distributed.barrier()
    distributed.destroy_process_group()


def launch(folder: Path) -> None:
    """What ``torchrun --standalone --nproc_per_node=2`` does, with processes that are forks."""
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="fork",
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "logs")),
    )
    elastic_launch(settings, train_all)(folder)


def exit_statuses(*calls: Callable[[], None]) -> list[int | None]:
    """Of a process for each call; minus 9 of one that is killed."""
    processes = [FORK.Process(target=call) for call in calls]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
    return [process.exitcode for process in processes]


def serve(orders: Connection) -> None:
    """Answer the exit statuses of each order's calls."""
    importlib.import_module("torch._dynamo")  # which the first DTensor of each process would
    with contextlib.suppress(EOFError):
        while True:
            orders.send(exit_statuses(*orders.recv()))
