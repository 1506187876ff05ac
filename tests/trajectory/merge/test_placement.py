"""Trajectories on a device, or read for each merge, against the same ones as they are mapped."""

from __future__ import annotations

import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.trajectory import Trajectory, TrajectoryWriter
from lcsc_opt.trajectory.disk import differences
from lcsc_opt.trajectory.disk.layout import Segment, TensorSpec
from lcsc_opt.trajectory.disk.rows import SegmentPlace
from lcsc_opt.trajectory.disk.tiles import accumulator
from lcsc_opt.trajectory.merge import arithmetic, memory, placement, reading, sources
from lcsc_opt.trajectory.merge.memory import PAGE, page_aligned
from tests.trajectory.trajectory_examples import STEPS, bits, make_trajectory, same_bits, state_dict

K = len(STEPS)
STORED = ("exact", "float16", "bfloat16", "int8")
WAYS = ("resident", "streamed", "streamed in turn")
COMBINATIONS = [[2.5, -1.75, 0.5, 0.25, -0.5], [0.0, 0.0, 3.0, -2.0, 0.0], np.full(K, 1 / K)]
COMBINED = ("weight", "bias", "scale", "double", "bfloat", "half")
UNITS = {torch.float32: 1e-5, torch.float64: 1e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.fixture(params=STORED)
def stored(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that tensors have several blocks, trajectories several groups of rows, and segments several reads."""
    monkeypatch.setattr(differences, "BLOCK_COLUMNS", 8)
    monkeypatch.setattr(differences, "BLOCK_ROWS", 2)
    monkeypatch.setattr(sources, "_read_bytes", lambda *_: 100)


def write(path: Path, dtype: str, steps: tuple[int, ...] = STEPS, **options: int) -> Trajectory:
    with TrajectoryWriter(path, dtype=dtype, reference=state_dict(STEPS[2]), **options) as writer:  # type: ignore[arg-type]
        for step in steps:
            writer.append(step, state_dict(step))
    return Trajectory.open(path)


def put(trajectory: Trajectory, way: str) -> Trajectory:
    """What a GPU does with what is streamed, too: it combines it in its own thread, in large tiles."""
    placed = trajectory.on("cpu", how="resident" if way == "resident" else "streamed")
    if way == "streamed in turn":
        placed._merger.source.threads = False
    return placed


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one trajectory of each kind is, which nobody changes."""
    return tmp_path_factory.mktemp("written")


@pytest.fixture
def trajectory(written: Path, stored: str) -> Trajectory:
    path = written / stored / "run.trajectory"
    return Trajectory.open(path) if path.exists() else write(path, stored)


def close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype
        assert tensor.is_contiguous()
        if name in COMBINED:
            unit = UNITS[tensor.dtype]
            torch.testing.assert_close(tensor, right[name], rtol=unit, atol=unit)
        else:
            assert bits(tensor) == bits(right[name])


@pytest.mark.parametrize("index", [0, 2, K - 1])
def test_one_hot_gives_back_the_checkpoint_bit_for_bit(trajectory: Trajectory, way: str, index: int) -> None:
    assert same_bits(put(trajectory, way).merge(np.eye(K)[index]), trajectory.checkpoint(index))


@pytest.mark.parametrize("row", COMBINATIONS, ids=["all", "two", "mean"])
def test_merges_are_those_of_the_map(trajectory: Trajectory, way: str, row: list[float]) -> None:
    placed = put(trajectory, way)
    close(placed.merge(row), trajectory.merge(row))
    several = [row, np.eye(K)[1], *COMBINATIONS]
    for left, right in zip(placed.merge_many(several), trajectory.merge_many(several), strict=True):
        close(left, right)


def test_float64_is_combined_in_float64(tmp_path: Path, way: str) -> None:
    trajectory = write(tmp_path / "run.trajectory", "exact")
    expected = sum(a * state_dict(step)["double"] for a, step in zip(COMBINATIONS[0], STEPS, strict=True))  # type: ignore[call-overload]
    torch.testing.assert_close(put(trajectory, way).merge(COMBINATIONS[0])["double"], expected, rtol=1e-14, atol=1e-14)  # type: ignore[arg-type]


def test_projection_gram_and_norms_are_those_of_the_map(trajectory: Trajectory, way: str) -> None:
    placed = put(trajectory, way)
    gradients = {name: torch.ones_like(state_dict(1)[name], dtype=torch.float64) for name in COMBINED}
    for names in (COMBINED, ("double",), ("half", "scale"), ()):
        some = {name: gradients[name] for name in names}
        np.testing.assert_allclose(placed.project(some), trajectory.project(some), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(placed.gram(), trajectory.gram(), rtol=1e-12)
    np.testing.assert_allclose(placed.difference_norms(), trajectory.difference_norms(), rtol=1e-12)


def test_slots_that_are_free_or_in_another_order_change_nothing(tmp_path: Path, stored: str, way: str) -> None:
    trajectory = write(tmp_path / "ring", stored, steps=tuple(range(1, 10)), keep_last=4)
    row = [0.5, -0.5, 2.0, -1.0]
    close(put(trajectory, way).merge(row), trajectory.merge(row))
    assert same_bits(put(trajectory, way).merge(np.eye(4)[0]), trajectory.checkpoint(0))


def test_results_belong_to_the_caller(trajectory: Trajectory, way: str) -> None:
    placed = put(trajectory, way)
    first = placed.merge(COMBINATIONS[0])  # type: ignore[arg-type]
    kept = {name: tensor.clone() for name, tensor in first.items()}
    placed.merge(COMBINATIONS[1])  # type: ignore[arg-type]
    assert same_bits(first, kept)
    for tensor in first.values():
        tensor.zero_()
    assert same_bits(placed.merge(COMBINATIONS[0]), kept)  # type: ignore[arg-type]


@pytest.mark.parametrize("tile", [1, 10**9])
def test_size_of_tiles_does_not_matter(
    trajectory: Trajectory, way: str, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lcsc_opt.trajectory.merge.merger.DEVICE_TILE_BYTES", tile)
    monkeypatch.setattr(arithmetic, "FEWEST_COLUMNS", 5)
    placed = put(trajectory, way)
    close(placed.merge(COMBINATIONS[0]), trajectory.merge(COMBINATIONS[0]))  # type: ignore[arg-type]
    close(placed.merge_many(COMBINATIONS)[1], trajectory.merge(COMBINATIONS[1]))  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 10**6])
def test_size_of_reads_does_not_matter(
    trajectory: Trajectory, way: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_read_bytes", lambda *_: size)
    placed = put(trajectory, way)
    close(placed.merge(COMBINATIONS[0]), trajectory.merge(COMBINATIONS[0]))  # type: ignore[arg-type]
    gradient = {name: tensor.double() for name, tensor in state_dict(9).items() if name in COMBINED}
    np.testing.assert_allclose(placed.project(gradient), trajectory.project(gradient), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("megabytes", "groups", "least", "models"),
    [(1200, 2, 2**24, 0.2), (1200, 50, 2**20, 0.2), (1200, 400, 2**18, 0.4), (80, 200, 2**15, 0.4)],
)
def test_reads_are_little_beside_a_model_and_long_enough_for_a_disk(
    megabytes: int, groups: int, least: int, models: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    model = megabytes * 10**6
    segment = Segment((TensorSpec("weight", (model // 4,), "float32", 0),))
    size = sources._read_bytes(segment, SegmentPlace(0, model, groups, 1, 4))
    assert size / groups >= least
    assert sources.BUFFERS * size < models * model


def test_memory_of_a_merge_is_used_again_when_nobody_holds_it(trajectory: Trajectory) -> None:
    first = trajectory.merge(COMBINATIONS[0])  # type: ignore[arg-type]
    place, scale = first["weight"].data_ptr(), first["scale"]
    del first
    second = trajectory.merge(COMBINATIONS[1])  # type: ignore[arg-type]
    assert second["weight"].data_ptr() != place  # its neighbour is still held
    del scale
    assert trajectory.merge(COMBINATIONS[1])["weight"].data_ptr() == place  # type: ignore[arg-type]


@pytest.mark.parametrize(("limit", "kept"), [(0, 1), (10**6, 3)])
def test_memory_of_one_model_is_kept_and_of_more_where_they_are_small(
    trajectory: Trajectory, limit: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "KEPT_BYTES", limit)
    trajectory.merge_many(COMBINATIONS)  # type: ignore[arg-type]
    assert {len(free) for free in trajectory._merger._memory._free.values()} == {kept}


def test_several_threads_may_merge_at_once(trajectory: Trajectory, way: str) -> None:
    placed = put(trajectory, way)
    rows = np.random.default_rng(2).dirichlet(np.ones(K), size=12)
    expected = [placed.merge(row) for row in rows]
    with ThreadPoolExecutor(4) as pool:
        assert all(map(same_bits, expected, pool.map(placed.merge, rows)))


def test_appended_checkpoints_change_nothing_and_overwritten_ones_are_noticed(tmp_path: Path, way: str) -> None:
    trajectory = make_trajectory(tmp_path / "run.trajectory")
    placed = put(trajectory, way)
    expected = placed.merge(COMBINATIONS[0])  # type: ignore[arg-type]
    with TrajectoryWriter(trajectory.path) as writer:
        writer.append(600, state_dict(600))
    assert same_bits(placed.merge(COMBINATIONS[0]), expected)  # type: ignore[arg-type]
    with TrajectoryWriter(trajectory.path, keep_last=3) as writer:
        writer.append(700, state_dict(700))
    for use in (lambda: placed.merge(COMBINATIONS[0]), lambda: placed.project({}), placed.gram):  # type: ignore[arg-type]
        with pytest.raises(TrajectoryError, match="open it again"):
            use()


def test_other_questions_are_answered_as_before(trajectory: Trajectory, way: str) -> None:
    placed = put(trajectory, way)
    assert (placed.steps, placed.sha256, placed.varying) == (trajectory.steps, trajectory.sha256, trajectory.varying)
    assert not placed.touched
    placed.verify()
    assert same_bits(placed.checkpoint(1), trajectory.checkpoint(1))
    assert placed.device == torch.device("cpu")
    assert same_bits(pickle.loads(pickle.dumps(placed)).checkpoint(1), trajectory.checkpoint(1))


def test_a_streamed_trajectory_is_read_again_after_an_error(tmp_path: Path) -> None:
    placed = write(tmp_path / "run.trajectory", "exact").on("cpu", how="streamed")
    expected = placed.merge(COMBINATIONS[0])  # type: ignore[arg-type]
    weights = tmp_path / "run.trajectory" / "weights.bin"
    content = weights.read_bytes()
    with weights.open("r+b") as file:
        file.truncate(len(content) - 200)
    with pytest.raises(TrajectoryError, match=r"weights\.bin is truncated"):
        placed.merge(COMBINATIONS[0])  # type: ignore[arg-type]
    with weights.open("r+b") as file:
        file.write(content)
    assert same_bits(placed.merge(COMBINATIONS[0]), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "free", "available", "way"),
    [
        (59, 100, 10, "resident"),
        (61, 100, 1000, "streamed"),
        (79, None, 100, "mapped"),
        (81, None, 100, "streamed"),
        (10**15, None, None, "mapped"),
    ],
)
def test_the_way_follows_from_the_memory(size: int, free: int | None, available: int | None, way: str) -> None:
    assert placement.choose(size, free, available) == way


def test_what_the_memory_holds_is_mapped_without_a_word(
    trajectory: Trajectory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert isinstance(trajectory.on("cpu")._merger.source, sources.Mapped)
    assert capsys.readouterr().err == ""


@pytest.fixture(params=["direct", "refused when opened", "refused when read"])
def disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Disks that can be read around the cache, and two that cannot; the bytes that the system was told to forget."""
    forgotten: list[tuple[int, int]] = []
    if request.param == "refused when opened":
        monkeypatch.setattr(reading.Reader, "_open_direct", lambda *_: None)
    if request.param == "refused when read":
        monkeypatch.setattr(reading.Reader, "_open_direct", lambda *_: -1)  # a descriptor that nothing can be read from
    monkeypatch.setattr(
        "os.posix_fadvise", lambda _f, offset, size, _a: forgotten.append((offset, size)), raising=False
    )
    return forgotten if request.param != "direct" else [(0, 0)]


def test_what_it_does_not_hold_is_read_from_the_disk_and_not_kept(
    trajectory: Trajectory,
    disk: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(placement, "available_bytes", lambda: 100)
    placed = trajectory.on("cpu")
    assert "5 checkpoints (" in (said := capsys.readouterr().err)
    assert "are read from the disk for each merge: 100 bytes of memory are available\n" in said
    close(placed.merge(COMBINATIONS[0]), trajectory.merge(COMBINATIONS[0]))  # type: ignore[arg-type]
    assert disk


def test_extents_longer_than_a_call_and_across_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = np.random.default_rng(0).integers(0, 256, 50_000, dtype=np.uint8)
    content.tofile(tmp_path / "file")
    monkeypatch.setattr(reading, "AT_ONCE", 2 * PAGE)
    for around_cache in (False, True):
        buffer = page_aligned(70_000, pinned=False)
        extents = [reading.Extent(0, 5, 30_000, 5), reading.Extent(0, 40_000, 10_000, 40_000 + 2 * PAGE)]
        with reading.Reader([tmp_path / "file"], around_cache=around_cache) as reader:
            reader.begin(extents, buffer).wait()
            assert (reader._direct[0] is not None) == (around_cache and can_be_read_around_the_cache(tmp_path / "file"))
        for extent in extents:
            read = buffer[extent.target : extent.target + extent.size].numpy()
            assert np.array_equal(read, content[extent.offset : extent.offset + extent.size])


def can_be_read_around_the_cache(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except (OSError, AttributeError):
        return False
    os.close(descriptor)
    return True


def test_free_rows_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    weights = {"w": torch.randn(200_000)}
    with TrajectoryWriter(tmp_path / "t", dtype="float16") as writer:
        for step in range(10):
            weights["w"] += 0.01
            writer.append(step, weights)
    trajectory = Trajectory.open(tmp_path / "t")
    read: list[int] = []
    monkeypatch.setattr(
        reading.Reader,
        "_read",
        lambda _self, job, target, plain=reading.Reader._read: (read.append(job.size), plain(_self, job, target)),
    )
    expected = trajectory.merge(np.full(10, 0.1))
    merged = trajectory.on("cpu", how="streamed").merge(np.full(10, 0.1))
    torch.testing.assert_close(merged["w"], expected["w"])
    assert 4_000_000 + 800_000 <= sum(read) < 1.1 * (4_000_000 + 800_000)  # of 32 rows


def test_where_it_is_kept_is_said_in_one_line(trajectory: Trajectory, capsys: pytest.CaptureFixture[str]) -> None:
    trajectory.on("cpu", how="resident")
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lcsc: ")]
    assert line.startswith("lcsc: run.trajectory: 5 checkpoints (")
    assert line.endswith(" kB) are kept in the memory of cpu")


def test_a_gpu_without_room_left_streams(
    trajectory: Trajectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_arguments: object) -> None:
        raise torch.OutOfMemoryError("meanwhile")

    monkeypatch.setattr(placement, "Resident", full)
    assert isinstance(trajectory.on("cpu", how="resident")._merger.source, sources.Streamed)
    assert "are streamed for each merge" in capsys.readouterr().err


def test_the_map_is_not_for_gpus(trajectory: Trajectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "_free_on", lambda _device: 10**9)
    with pytest.raises(TrajectoryError, match="cannot be mapped into cuda:0: choose 'resident' or 'streamed'"):
        trajectory.on("cuda:0", how="mapped")


def test_products_on_a_gpu_are_not_of_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, precision = torch.device("cuda"), torch.get_float32_matmul_precision()
    assert accumulator(torch.float32, gpu) == torch.float32
    torch.set_float32_matmul_precision("high")
    try:
        assert accumulator(torch.bfloat16, gpu) == torch.float64
        assert accumulator(torch.bfloat16, torch.device("cpu")) == torch.float32
    finally:
        torch.set_float32_matmul_precision(precision)
