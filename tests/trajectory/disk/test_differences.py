"""Trajectories that store differences from a reference checkpoint."""

from __future__ import annotations

import contextlib
import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.cli.trajectory import app
from lcsc_opt.trajectory import Trajectory, TrajectoryWriter, pack
from lcsc_opt.trajectory.disk import differences
from lcsc_opt.trajectory.disk.saving import Saver
from lcsc_opt.trajectory.exact_merge import Combination, PackedCheckpoints, merge_exactly
from lcsc_opt.trajectory.inspection import inspect
from tests.trajectory.trajectory_examples import STEPS, bits, make_trajectory, same_bits, state_dict

K = len(STEPS)
MERGED = ("weight", "bias", "scale", "double", "bfloat", "half")
DTYPES = ("float16", "bfloat16", "int8")
UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "int8": 0.5 / 127}  # of a block's largest difference
COMBINATIONS = [[2.5, -1.75, 0.5, 0.25, -0.5], [0.0, 0.0, 3.0, -2.0, 0.0], np.full(K, 1 / K)]


@pytest.fixture(params=DTYPES)
def dtype(request):
    return request.param


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that a tensor has several blocks, and parts have several too."""
    monkeypatch.setattr(differences, "BLOCK_COLUMNS", 8)
    monkeypatch.setattr(differences, "AT_ONCE", 2)
    monkeypatch.setattr(differences, "BLOCK_ROWS", 2)


def write(path, dtype, steps=STEPS, **options):
    with TrajectoryWriter(path, dtype=dtype, **options) as writer:
        for step in steps:
            writer.append(step, state_dict(step))
    return Trajectory.open(path)


@pytest.fixture
def trajectory(tmp_path, dtype):
    return write(tmp_path / "t", dtype, reference=state_dict(STEPS[2]))


def doubles(tensors):
    return {name: tensors[name].double() for name in MERGED}


def test_checkpoints_come_back_within_the_rounding_of_their_block(trajectory, dtype):
    origin = doubles(state_dict(STEPS[2]))
    for index, step in enumerate(STEPS):
        there, given = trajectory.checkpoint(index), state_dict(step)
        for name in MERGED:
            error = (there[name].double() - given[name].double()).abs().reshape(-1)
            moved = (given[name].double() - origin[name]).abs().reshape(-1)
            own = torch.finfo(given[name].dtype).eps * given[name].double().abs().max()  # rounded to its dtype
            for block in range(0, len(error), 8):
                part = slice(block, block + 8)
                assert error[part].max() <= 1.01 * UNIT[dtype] * moved[part].max() + own
        rest = {name: tensor for name, tensor in given.items() if name not in MERGED}
        assert same_bits({name: there[name] for name in rest}, rest)


def test_reference_comes_back_bit_for_bit(trajectory):
    assert same_bits(trajectory.checkpoint(2), state_dict(STEPS[2]))  # with its −0
    assert same_bits(trajectory.merge(np.eye(K)[2]), state_dict(STEPS[2]))


@pytest.mark.parametrize("coefficients", COMBINATIONS, ids=str)
def test_merge_combines_what_checkpoints_read_back_are(trajectory, coefficients):
    merged = trajectory.merge(coefficients)
    several = trajectory.merge_many([coefficients, np.eye(K)[1], *COMBINATIONS])
    stored = [doubles(trajectory.checkpoint(index)) for index in range(K)]
    unit = {"weight": 4e-6, "bias": 4e-6, "scale": 4e-6, "double": 1e-13, "bfloat": 0.1, "half": 0.02}
    for name in MERGED:
        expected = sum(a * tensors[name] for a, tensors in zip(coefficients, stored, strict=True))
        for one in (merged, several[0]):
            assert one[name].dtype == state_dict(1)[name].dtype
            torch.testing.assert_close(one[name].double(), expected, rtol=unit[name], atol=unit[name])
    assert same_bits(several[1], trajectory.checkpoint(1))
    assert bits(merged["constant"]) == bits(state_dict(0)["constant"])
    assert merged["batches"].item() == STEPS[int(np.argmax(coefficients))]


def test_projection_gram_and_norms_are_those_of_the_checkpoints(trajectory):
    gradients = {name: tensor.double() for name, tensor in state_dict(9).items() if name in MERGED}
    stored = [doubles(trajectory.checkpoint(index)) for index in range(K)]
    expected = [sum(float((tensors[name] * gradients[name]).sum()) for name in MERGED) for tensors in stored]
    np.testing.assert_allclose(trajectory.project(gradients), expected, atol=0.05)  # of bfloat and half, rounded
    alone = {"double": gradients["double"]}
    exact = [float((tensors["double"] * gradients["double"]).sum()) for tensors in stored]
    np.testing.assert_allclose(trajectory.project(alone), exact, rtol=1e-12, atol=1e-12)
    rows = np.stack([torch.cat([tensors[name].reshape(-1) for name in MERGED]).numpy() for tensors in stored])
    centered = rows - rows.mean(axis=0)
    np.testing.assert_allclose(trajectory.gram(), centered @ centered.T, atol=0.3)
    expected_norms = np.linalg.norm(np.diff(rows, axis=0), axis=1)
    np.testing.assert_allclose(trajectory.difference_norms(), expected_norms, rtol=0.01)


def test_export_does_not_depend_on_how_much_is_worked_on_at_once(trajectory):
    combination = Combination.of(trajectory, COMBINATIONS[0])  # type: ignore[arg-type]
    exported = merge_exactly(PackedCheckpoints(trajectory), combination)
    assert same_bits(exported, merge_exactly(PackedCheckpoints(trajectory), combination, elements=3))
    stored = [trajectory.checkpoint(index)["double"].numpy() for index in range(K)]
    total = COMBINATIONS[0][0] * stored[0]
    for a, values in zip(COMBINATIONS[0][1:], stored[1:], strict=True):
        total = total + a * values
    assert exported["double"].numpy().tobytes() == total.tobytes()


def test_identity_follows_the_dtype(tmp_path):
    exact = make_trajectory(tmp_path / "exact")
    coded = [write(tmp_path / dtype, dtype) for dtype in DTYPES]
    assert len({exact.sha256, *(trajectory.sha256 for trajectory in coded)}) == 1 + len(DTYPES)
    assert write(tmp_path / "again", "int8").sha256 == coded[2].sha256
    assert [trajectory.stored for trajectory in (exact, *coded)] == [None, *DTYPES]


@pytest.mark.parametrize("file", ["weights.bin", "reference.bin"])
def test_damage_is_found(trajectory, file):
    trajectory.verify()
    with (trajectory.path / file).open("r+b") as content:
        content.seek(100)
        content.write(b"\x7f\x11\x22")
    with pytest.raises(TrajectoryError, match="damaged"):
        trajectory.verify()


def test_bytes_are_those_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.undo()
    exact, coded = tmp_path / "exact", tmp_path / "int8"
    for path, dtype in ((exact, "exact"), (coded, "int8")):
        with TrajectoryWriter(path, dtype=dtype) as writer:
            for step in range(20):
                writer.append(step, {"w": torch.full((30_000,), float(step))})
    files = sum(512 * (coded / name).stat().st_blocks for name in ("weights.bin", "reference.bin"))  # without holes
    assert Trajectory.open(coded).nbytes == pytest.approx(files, rel=0.1)
    assert files < 0.31 * Trajectory.open(exact).nbytes  # a quarter, and the reference


def test_measured_error_is_that_of_combinations(tmp_path, dtype, monkeypatch):
    monkeypatch.undo()
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(20_000, generator=generator)
    rows = [start + 0.1 * torch.randn(20_000, generator=generator) for _ in range(30)]
    with TrajectoryWriter(tmp_path / "t", dtype=dtype) as writer:
        assert writer.measure() is None
        for step, row in enumerate(rows):
            writer.append(step, {"w": row})
        measured = writer.measure()
    trajectory = Trajectory.open(tmp_path / "t")
    assert trajectory.relative_error == pytest.approx(measured, rel=0.01)
    errors = []
    for a in differences.random_combinations(20, 30):
        assert np.abs(a).sum() == pytest.approx(differences.FOUND_SIZE, rel=0.1)
        exact = torch.stack(rows).double().t() @ torch.from_numpy(a)
        errors.append(float((trajectory.merge(a)["w"].double() - exact).norm() / exact.norm()))
    assert measured == pytest.approx(np.sqrt(np.mean(np.square(errors))), rel=0.1)
    assert make_trajectory(tmp_path / "exact").relative_error is None


def test_writer_goes_on_as_the_trajectory_began(tmp_path, dtype):
    whole = write(tmp_path / "whole", dtype)
    write(tmp_path / "t", dtype, STEPS[:2])
    for dtype_now, steps in ((None, STEPS[:3]), (dtype, STEPS)):
        continued = write(tmp_path / "t", dtype_now, steps)
    assert continued.sha256 == whole.sha256
    with pytest.raises(TrajectoryError, match=f"stores {dtype}, not exact"):
        TrajectoryWriter(tmp_path / "t", dtype="exact")
    with (
        TrajectoryWriter(tmp_path / "t") as writer,
        pytest.raises(TrajectoryError, match="saved already, with other weights"),
    ):
        writer.append(STEPS[1], state_dict(7))


def test_last_differences_are_kept(tmp_path, dtype):
    trajectory = write(tmp_path / "t", dtype, range(1, 9), keep_last=3)
    assert trajectory.steps == (6, 7, 8)
    trajectory.verify()
    expected = write(tmp_path / "all", dtype, range(1, 9))
    assert same_bits(trajectory.checkpoint(0), expected.checkpoint(5))
    merged = trajectory.merge([2.0, -0.5, -0.5])["double"]
    torch.testing.assert_close(merged, expected.merge([0, 0, 0, 0, 0, 2.0, -0.5, -0.5])["double"])


@pytest.mark.parametrize("where", ["reference", "checkpoint"])
def test_weights_that_are_not_finite_are_refused(tmp_path, dtype, where):
    broken = state_dict(1)
    broken["half"].view(-1)[0] = float("inf")
    options = {"reference": broken} if where == "reference" else {}
    weights = state_dict(1) if where == "reference" else broken
    with (
        TrajectoryWriter(tmp_path / "t", dtype=dtype, **options) as writer,  # type: ignore[arg-type]
        pytest.raises(TrajectoryError, match=r"'half' at .* NaN or infinity"),
    ):
        writer.append(1, weights)


def test_difference_too_large_to_store(tmp_path, dtype):
    with TrajectoryWriter(tmp_path / "t", dtype=dtype) as writer:
        writer.append(1, {"w": torch.full((3,), 3e38)})
        with pytest.raises(TrajectoryError, match=r"'w' differs too much.*--dtype exact"):
            writer.append(2, {"w": torch.full((3,), -3e38)})
    assert Trajectory.open(tmp_path / "t").steps == (1,)


def test_unknown_dtype(tmp_path):
    with pytest.raises(TrajectoryError, match="expected exact, float16, bfloat16, int8, got 'int4'"):
        TrajectoryWriter(tmp_path / "t", dtype="int4")


def test_manifest_of_exact_rows_is_as_it_was(tmp_path):
    """Earlier versions read it."""
    content = json.loads((make_trajectory(tmp_path / "t").path / "manifest.json").read_text())
    assert content["format"] == 1
    assert not {"stored", "reference_sha256"} & content.keys()


@pytest.mark.parametrize("change", [{"format": 1}, {"stored": None}, {"reference_sha256": None}, {"stored": "int4"}])
def test_manifest_that_contradicts_itself(tmp_path, change):
    path = write(tmp_path / "t", "int8").path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(TrajectoryError, match="is broken"):
        Trajectory.open(path.parent)


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / f"model{step:06d}.safetensors" for step in STEPS]
    for path, step in zip(paths, STEPS, strict=True):
        save_file(state_dict(step), path)
    return paths


def test_packed_as_differences_from_the_middle(files, tmp_path, dtype):
    trajectory = pack(files, tmp_path / "t.trajectory", dtype=dtype)
    assert same_bits(trajectory.checkpoint(2), state_dict(STEPS[2]))
    assert trajectory.sha256 == write(tmp_path / "w", dtype, reference=state_dict(STEPS[2])).sha256
    inspected = inspect(trajectory.path, verify=True)
    assert (inspected.stored, inspected.relative_error) == (dtype, trajectory.relative_error)
    assert inspected.dtypes[:4] == ["float64", "float32", "bfloat16", "float16"]


def test_partial_of_another_dtype_is_not_continued(files, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Saver, "measure", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pack(files, tmp_path / "t", dtype="float16")
    assert (tmp_path / "t.partial" / "reference.bin").exists()
    assert pack(files, tmp_path / "t", dtype="int8").stored == "int8"
    assert pack(files, tmp_path / "t", overwrite=True).stored is None


def test_reference_is_no_checkpoint_to_pack(files, tmp_path):
    write(tmp_path / "reference", "int8")
    (tmp_path / "reference" / "manifest.json").unlink()
    with pytest.raises(TrajectoryError, match="No checkpoint in"):
        pack(tmp_path / "reference", tmp_path / "t")


def test_command_says_what_it_costs(files, tmp_path):
    out = tmp_path / "t.trajectory"
    answer = CliRunner().invoke(app, ["pack", *map(str, files), "-o", str(out), "--dtype", "int8"])
    assert answer.exit_code == 0, answer.output
    error = Trajectory.open(out).relative_error
    assert f"stored as int8 differences; their error in combinations such as searches find: {error:.2g} of" in " ".join(
        answer.output.split()
    )
    shown = CliRunner().invoke(app, ["show", str(out), "--format", "json"])
    assert json.loads(shown.output)["stored"] == "int8"


class Stop(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("kept", [None, 2])
@pytest.mark.parametrize("name", ["write", "fsync", "replace"])
def test_crash_at_any_call_leaves_whole_checkpoints(tmp_path, monkeypatch, name, kept):
    """Rows lie between each other, so a half-written one must not touch its neighbours."""
    generator = torch.Generator().manual_seed(0)
    rows = {step: {"w": torch.randn(20, generator=generator), "n": torch.tensor(step)} for step in range(1, 6)}
    whole = {}
    for length in rows:
        with TrajectoryWriter(tmp_path / f"whole{length}", dtype="int8", keep_last=kept) as writer:
            for step in range(1, length + 1):
                writer.append(step, rows[step])
        whole[length] = Trajectory.open(tmp_path / f"whole{length}").sha256
    plain, count, failed = getattr(os, name), 0, True
    while failed:
        count += 1
        path, calls = tmp_path / f"{count}", []

        def call(*arguments, calls=calls, count=count):
            calls.append(arguments)
            if len(calls) == count:
                raise Stop
            return plain(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, name, call)
            with contextlib.suppress(Stop), TrajectoryWriter(path, dtype="int8", keep_last=kept) as writer:
                for step, weights in rows.items():
                    writer.append(step, weights)
        failed = len(calls) >= count
        last = 0
        if (path / "manifest.json").exists():
            left = Trajectory.open(path)
            left.verify()
            last = left.steps[-1]
            assert left.sha256 == whole[last]
        with TrajectoryWriter(path, dtype="int8", keep_last=kept) as writer:
            for step in range(last + 1, 6):
                writer.append(step, rows[step])
        Trajectory.open(path).verify()
        assert Trajectory.open(path).sha256 == whole[5]
    assert count > 2
