"""Checkpoints that several processes write, each its part: the same bits as those of one process."""

from __future__ import annotations

import filecmp
import functools
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.trajectory import Trajectory, TrajectoryWriter
from lcsc_opt.trajectory.packing import pack
from lcsc_opt.trajectory.shards import part_of
from tests.processes import CONTEXT, forked
from tests.trajectory import sharded_training
from tests.trajectory.sharded_training import MEANS, STEPS, full_weights, run_process
from tests.trajectory.trajectory_examples import make_trajectory, same_bits

torch_distributed = pytest.mark.skipif(sys.platform != "linux", reason="gloo and SIGKILL")


def append_all(path: Path) -> None:
    """As the sharded training of this name, in one process."""
    with TrajectoryWriter(path, keep_last=4) as writer:
        for step in range(1, STEPS + 1):
            writer.append(step, full_weights(step))


def add_all(path: Path) -> None:
    with TrajectoryWriter(path, means=MEANS) as writer:
        for step in range(1, STEPS + 1):
            writer.step(step, full_weights(step))
        writer.finish(STEPS, full_weights(STEPS))


PAIRS = [(append_all, sharded_training.append_all), (add_all, sharded_training.add_all)]


def assert_same_trajectory(path: Path, expected: Path) -> None:
    """The same manifest, but for the random name of a training and the places of rows, and the same rows."""
    manifests = []
    for folder in (path, expected):
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["metadata"].pop("training", None)
        for saved in manifest["checkpoints"]:
            del saved["slot"]
        manifests.append(manifest)
    assert manifests[0] == manifests[1]
    trajectory = Trajectory.open(path)
    trajectory.verify()
    for index in range(len(trajectory.steps)):
        assert same_bits(trajectory.checkpoint(index), Trajectory.open(expected).checkpoint(index))


Statuses = list[int | None]


@pytest.fixture(scope="module")
def forks() -> Iterator[Callable[..., Statuses]]:
    """Calls functions, each in a process of its own; the exit statuses of these."""
    here, there = CONTEXT.Pipe()
    server = forked(sharded_training.serve, there)
    server.start()
    there.close()

    def run(*calls: Callable[[], None]) -> Statuses:
        here.send(calls)
        statuses: Statuses = here.recv()
        return statuses

    yield run
    here.close()
    server.join()


def run_two(
    forks: Callable[..., Statuses], train: Callable[..., None], path: Path, *, killed: int = 0, at: int = 0
) -> Statuses:
    """The exit statuses of two processes, of which one may be killed: minus 9."""
    meeting = path.with_name(f"meeting-{path.name}-{at}")
    return forks(
        *(functools.partial(run_process, rank, meeting, train, path, at if rank == killed else 0) for rank in range(2))
    )


@torch_distributed
@pytest.mark.parametrize(("train", "sharded_train"), PAIRS)
def test_training_that_is_killed_in_one_process_leaves_the_same_bits(forks, tmp_path, train, sharded_train):
    train(tmp_path / "expected")
    path = tmp_path / "sharded"
    for attempt in itertools.count():
        killed = attempt % 2
        statuses = run_two(forks, sharded_train, path, killed=killed, at=3 + 70 * attempt)
        if statuses == [0, 0]:
            break
        assert statuses[killed] == -9
        assert statuses[1 - killed] == 3
        assert "Another process of this training has ended" in path.with_suffix(".error").read_text()
        if (path / "manifest.json").exists():
            Trajectory.open(path).verify()
    assert attempt > 1
    assert_same_trajectory(path, tmp_path / "expected")


@torch_distributed
def test_fsdp_and_tensor_parallelism_under_torchrun(forks, tmp_path):
    assert forks(functools.partial(sharded_training.launch, tmp_path)) == [0]
    append_all(tmp_path / "expected")
    assert_same_trajectory(tmp_path / "appended.trajectory", tmp_path / "expected")
    for path in (tmp_path / "appended.trajectory", tmp_path / "expected"):
        with TrajectoryWriter(path, keep_last=4) as writer:
            writer.append(STEPS + 1, full_weights(STEPS + 1))  # one process may go on
    assert_same_trajectory(tmp_path / "appended.trajectory", tmp_path / "expected")
    for name in ("fsdp", "tensor"):
        gathered = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        with TrajectoryWriter(tmp_path / name) as writer:
            for step, weights in gathered.items():
                writer.append(step, weights)
        assert_same_trajectory(tmp_path / f"{name}.trajectory", tmp_path / name)
        rows = tmp_path / name / "weights.bin"
        assert filecmp.cmp(tmp_path / f"{name}.trajectory" / "weights.bin", rows, shallow=False)


MISUSE = [
    "'weight' is a DTensor, a part of which is in each process: make the writer with sharded=True in every process",
    "do different things (0: open ",
    "own does not exist in process 1: name a folder that all processes share",
    "stores int8, which no sharded training can",
    "different values: names, shapes and dtypes of the first checkpoint",
    "'w' holds partial sums",
    "",  # the same weights again
    "Step 1 is saved already, with other weights",
    "Tensor 'weight' at step 2 holds NaN",
    "do different things",
    "does not fit the first one: it lacks",
    "that of another process",
    "the state has no mean",
]


@torch_distributed
def test_what_one_process_does_wrong_is_said_in_both_and_writes_nothing(forks, tmp_path):
    packed = pack(make_trajectory(tmp_path / "exact").path, tmp_path / "int8", dtype="int8")
    path = tmp_path / "t"
    assert run_two(forks, sharded_training.misuse, path) == [0, 0]
    for rank in range(2):
        said = path.with_suffix(f".{rank}").read_text().split("\n")
        assert len(said) == len(MISUSE)
        for line, expected in zip(said, MISUSE, strict=True):
            assert expected in line
            assert bool(expected) == bool(line)
    trajectory = Trajectory.open(path)
    trajectory.verify()
    assert trajectory.steps == (1, 3)
    assert same_bits(trajectory.checkpoint(1), full_weights(3))
    assert Trajectory.open(packed.path).sha256 == packed.sha256


@torch_distributed
def test_folder_that_is_not_shared_is_found_out(forks, tmp_path):
    path = tmp_path / "t"
    assert run_two(forks, sharded_training.write_elsewhere, path) == [3, 3]
    assert "does not show what the other processes wrote" in path.with_suffix(".error").read_text()
    assert not (path / "manifest.json").exists()


def test_without_a_process_group_sharded_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(TrajectoryError, match="init_process_group"):
        TrajectoryWriter(tmp_path / "t", sharded=True)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("shape", "placements", "mesh"),
    [
        ((7, 5), [Shard(0)], (3,)),
        ((7, 5), [Shard(1)], (4,)),
        ((2, 3), [Shard(0)], (4,)),  # some have nothing
        ((4, 3, 5), [Shard(1)], (2,)),
        ((4, 3, 5), [Shard(0), Shard(2)], (2, 2)),
        ((9, 4), [Shard(0), Shard(0)], (2, 3)),
        ((9, 4), [Replicate(), Shard(1)], (2, 2)),
        ((11, 4), [_StridedShard(0, split_factor=3), Shard(0)], (2, 3)),
        ((4, 10), [_StridedShard(1, split_factor=2), Shard(1)], (3, 2)),
        ((3, 0), [Shard(0)], (2,)),
    ],
)
def test_spans_are_where_torch_puts_the_shards(shape, placements, mesh):
    tensor = torch.arange(math.prod(shape), dtype=torch.int16).view(shape)
    written = torch.full_like(tensor.view(-1), -1).view(torch.uint8)
    for coordinate in itertools.product(*map(range, mesh)):
        local = tensor
        for placement, count, position in zip(placements, mesh, coordinate, strict=True):
            if not placement.is_replicate():
                shards, _ = placement._split_tensor(local, count, with_padding=False)
                local = shards[position]
        part = part_of(shape, placements, mesh, coordinate)
        assert part.local_shape == tuple(local.shape)
        content = local.contiguous().reshape(-1).view(torch.uint8)
        position = 0
        for start, stop in part.spans(itemsize=2):
            written[start:stop] = content[position : position + stop - start]
            position += stop - start
        assert position == len(content)
    assert torch.equal(written.view(torch.int16), tensor.view(-1))
