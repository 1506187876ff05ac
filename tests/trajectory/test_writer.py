from __future__ import annotations

import contextlib
import gc
import itertools
import os
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.trajectory import Trajectory, TrajectoryWriter
from tests.processes import CONTEXT, forked
from tests.trajectory.ended_writers import append_for_ever
from tests.trajectory.trajectory_examples import append, assert_whole, interrupt, make_trajectory, same_bits, state_dict


class Averaging(nn.Module):
    """As ema-pytorch's ``EMA`` lays its parts out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.online_model = nn.Linear(2, 1)
        self.ema_model = model
        self.register_buffer("step", torch.tensor(3))


@pytest.mark.parametrize("average", [torch.optim.swa_utils.AveragedModel, Averaging])
def test_of_an_average_its_weights_are_saved_under_the_models_names(tmp_path, average):
    model = nn.Linear(2, 1)
    with TrajectoryWriter(tmp_path / "t") as writer:
        writer.append(1, average(nn.DataParallel(model)))
    assert same_bits(Trajectory.open(tmp_path / "t").checkpoint(0), model.state_dict())


class LitEma(nn.Module):
    """As CompVis' average: buffers whose names lack their dots."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.register_buffer("decay", torch.tensor(0.9))
        self.register_buffer("num_updates", torch.tensor(0, dtype=torch.int))
        for name, weight in model.named_parameters():
            self.register_buffer(name.replace(".", ""), torch.zeros_like(weight))


class Training(nn.Module):
    """As a module of Lightning: parts by their names, and a buffer for each number."""

    def __init__(self, parts: dict[str, nn.Module], numbers: dict[str, float]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        for name, number in numbers.items():
            self.register_buffer(name, torch.tensor(number))


def compvis() -> dict[str, nn.Module]:
    model = nn.Sequential(nn.Linear(2, 1))
    return {"model": model, "model_ema": LitEma(model)}


def linear(*names: str) -> dict[str, nn.Module]:
    return {name: nn.Linear(2, 1) for name in names}


@pytest.mark.parametrize(
    "module",
    [
        Training({**compvis(), "first_stage_model": nn.Linear(3, 3)}, {}),
        Training(compvis(), {"scale_factor": 0.2}),
        Training(linear("ema_model", "online_model", "vae"), {"initted": 1.0}),
        Training(linear("ema_model", "unet"), {"initted": True, "step": 3}),
        Training(linear("ema_model", "online_model"), {"scale_factor": 0.2}),
        Training(linear("module", "vae"), {"n_averaged": 1}),
    ],
)
def test_a_module_that_holds_an_average_beside_other_parts_is_saved_whole(tmp_path, module):
    with TrajectoryWriter(tmp_path / "t") as writer:
        writer.append(1, nn.DataParallel(module))
    assert same_bits(Trajectory.open(tmp_path / "t").checkpoint(0), module.state_dict())


@pytest.mark.parametrize(
    "module",
    [
        Training(linear("ema_model"), {"initted": 1.0, "step": 3}),
        Training(linear("ema_model", "online_model"), {"initted": True, "step": 3}),
        Training(linear("ema_model", "online_model"), {}),
        nn.ModuleList([Training(linear("ema_model", "online_model"), {"initted": True, "step": 3})]),
    ],
)
def test_a_module_that_does_nothing_but_average_is_saved_as_its_average(tmp_path, module):
    with TrajectoryWriter(tmp_path / "t") as writer:
        writer.append(1, module)
    averaging = module[0] if isinstance(module, nn.ModuleList) else module
    assert same_bits(Trajectory.open(tmp_path / "t").checkpoint(0), averaging.ema_model.state_dict())


@pytest.mark.parametrize(
    ("step", "weights", "message"),
    [
        (1, torch.optim.SGD([torch.ones(3)]), r"not SGD: pass the model"),
        (1, {"model": {"w": torch.ones(3)}}, r"^model is a dict, not a tensor; .* give state\['model'\]"),
        (-1, state_dict(1), "[Ss]tep"),
        (1.5, state_dict(1), "[Ss]tep"),
        (2**63, state_dict(1), "[Ss]tep"),
    ],
)
def test_what_is_no_checkpoint_or_no_step_is_refused(tmp_path, step, weights, message):
    with TrajectoryWriter(tmp_path / "t") as writer, pytest.raises(TrajectoryError, match=message):
        writer.append(step, weights)


def test_keep_last_keeps_the_last_checkpoints_and_the_file_stops_growing(tmp_path):
    path = tmp_path / "t"
    with TrajectoryWriter(path, keep_last=3) as writer:
        for step in range(1, 12):
            writer.append(step, state_dict(step))
            assert_whole(path, range(max(1, step - 2), step + 1))
            assert writer.steps == tuple(range(max(1, step - 2), step + 1))
    row = Trajectory.open(path).nbytes // 3
    assert (path / "weights.bin").stat().st_size == 4 * row


def test_tensor_that_varied_once_stays_varying(tmp_path):
    rows = [{"w": torch.tensor(weight), "c": torch.tensor(3.0)} for weight in (1.0, 2.0, 1.0)]
    trajectory = make_trajectory(tmp_path / "t", range(3), weights=rows.__getitem__)
    assert trajectory.varying == {"w"}
    assert trajectory.merge([1.0, -1.0, 1.0])["w"].item() == 0.0


def test_writer_continues_and_keeps_metadata(tmp_path):
    append(tmp_path / "t", 1, 2, metadata={"run": "a", "note": "x"})
    (tmp_path / "t" / "notes.txt").touch()  # of the user: only a folder without a manifest is refused for such
    append(tmp_path / "t", 3, metadata={"note": "y"})
    assert_whole(tmp_path / "t", [1, 2, 3])
    assert dict(Trajectory.open(tmp_path / "t").metadata) == {"run": "a", "note": "y"}


def test_resumed_training_may_come_by_a_second_time(tmp_path):
    assert append(tmp_path / "t", 1, 2, 3) == [True] * 3
    assert append(tmp_path / "t", 2, 3, 4) == [False, False, True]
    with TrajectoryWriter(tmp_path / "t") as writer:
        with pytest.raises(TrajectoryError, match="Step 2 is saved already, with other weights"):
            writer.append(2, state_dict(7))
        with pytest.raises(TrajectoryError, match="Step 0 comes after step 4"):
            writer.append(0, state_dict(0))
    assert_whole(tmp_path / "t", [1, 2, 3, 4])


@pytest.mark.parametrize(("name", "value"), [("weight", "nan"), ("bfloat", "inf"), ("half", "-inf"), ("double", "nan")])
def test_non_finite_weights_are_refused(tmp_path, name, value):
    broken = state_dict(21)
    broken[name].view(-1)[-1] = float(value)
    with TrajectoryWriter(tmp_path / "t", every=10) as writer:
        assert writer.append(10, state_dict(10))
        with pytest.raises(TrajectoryError, match=f"'{name}' at step 21"):
            writer.append(21, broken)
        assert writer.append(22, state_dict(22)), "nothing of its interval is saved"
        assert writer.append(23, state_dict(23)) is False
    assert_whole(tmp_path / "t", [10, 22])


def test_a_non_finite_number_at_the_end_of_a_large_tensor_is_found(tmp_path):
    weight = torch.ones(600_000)
    with TrajectoryWriter(tmp_path / "t") as writer:
        writer.append(1, {"w": weight.clone()})
        weight[-1] = float("nan")
        with pytest.raises(TrajectoryError, match="'w' at step 2"):
            writer.append(2, {"w": weight})


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_what_cannot_be_merged_may_be_kept_but_not_change(tmp_path, dtype):
    with TrajectoryWriter(tmp_path / "t") as writer:
        for step in (1, 2):
            writer.append(step, {"w": torch.tensor(float(step)), "frequencies": torch.ones(2).to(dtype)})
        with pytest.raises(TrajectoryError, match=r"'frequencies' is .* and changes"):
            writer.append(3, {"w": torch.tensor(3.0), "frequencies": torch.zeros(2).to(dtype)})
    frequencies = Trajectory.open(tmp_path / "t").merge([0.5, 0.5])["frequencies"]
    assert frequencies.to(torch.complex64).tolist() == [1, 1]


@pytest.mark.parametrize(("dtype", "keep_last"), [("exact", None), ("float16", 3)])
def test_training_that_goes_on_from_an_earlier_step_replaces_what_came_later(tmp_path, capsys, dtype, keep_last):
    of_step_4 = make_trajectory(tmp_path / "t", range(1, 6), dtype=dtype, keep_last=keep_last).checkpoint(-2)
    with TrajectoryWriter(tmp_path / "t", resume=4, keep_last=keep_last) as writer:
        assert writer.append(5, state_dict(15))
        assert writer.append(6, state_dict(16), wait=False)
    assert "goes back to step 4, 1 later checkpoints are dropped" in capsys.readouterr().err
    trajectory = Trajectory.open(tmp_path / "t")
    trajectory.verify()
    assert trajectory.steps == (1, 2, 3, 4, 5, 6)[-(keep_last or 6) :]
    assert same_bits(trajectory.checkpoint(-3), of_step_4)
    if dtype == "exact":
        assert same_bits(trajectory.checkpoint(-1), state_dict(16))


@pytest.mark.parametrize("options", [{"every": 0}, {"keep_last": 0}, {"every": 1.5}, {"dtype": "int8"}], ids=str)
def test_bad_options_are_refused_before_anything_is_written(tmp_path, options):
    with pytest.raises(TrajectoryError):
        TrajectoryWriter(tmp_path / "t", **options)
    assert not (tmp_path / "t").exists()


def test_numpys_numbers_are_whole_numbers(tmp_path):
    with TrajectoryWriter(tmp_path / "t", every=np.int64(2), keep_last=np.int32(2)) as writer:
        for step in range(1, 8):
            writer.append(step, state_dict(step))
    assert_whole(tmp_path / "t", [4, 6])


@pytest.mark.skipif(sys.platform == "win32", reason="no flock")
def test_second_writer_is_kept_out_until_the_first_closes(tmp_path):
    with TrajectoryWriter(tmp_path / "t") as writer:
        writer.append(1, state_dict(1))
        with pytest.raises(TrajectoryError, match="rank 0"):
            TrajectoryWriter(tmp_path / "t")
    append(tmp_path / "t", 2)
    with pytest.raises(TrajectoryError, match="is closed"):
        writer.append(3, state_dict(3))


class StopError(Exception):
    """Stands for the end of the process."""


CALLS = ("write", "fsync", "replace", "lseek")


def survivors(path):
    if (path / "manifest.json").exists():
        return Trajectory.open(path).steps
    with pytest.raises(TrajectoryError, match="no complete checkpoint yet"):
        Trajectory.open(path)
    return ()


def write_until_stopped(path, monkeypatch, name, count, *, keep_last, wait):
    """Append steps 1 to 3, with a crash at the ``count``-th call of ``os.<name>``.

    Gives the last step whose append returned, and whether the crash came.
    """
    appended = 0
    with monkeypatch.context() as patch:
        interrupt(patch, os, name, count, StopError())
        try:
            with TrajectoryWriter(path, keep_last=keep_last) as writer:
                for step in range(1, 4):
                    writer.append(step, state_dict(step), wait=wait)
                    appended = step
        except StopError:
            return appended, True
    return appended, False


@pytest.mark.parametrize(("keep_last", "wait"), [(1, True), (2, False)])
@pytest.mark.parametrize("name", CALLS)
def test_crash_at_any_call_leaves_whole_checkpoints(tmp_path, monkeypatch, name, keep_last, wait):
    for count in itertools.count(1):
        path = tmp_path / f"{count}"
        appended, crashed = write_until_stopped(path, monkeypatch, name, count, keep_last=keep_last, wait=wait)
        last = max(survivors(path), default=0)
        assert last in (appended, appended + 1) or (not wait and last <= appended)
        if last:
            assert_whole(path, range(max(1, last - keep_last + 1), last + 1))
        append(path, *range(last + 1, 6), keep_last=keep_last)
        assert_whole(path, range(6 - keep_last, 6))
        if not crashed:
            break
    assert count > 3 or not wait, "each append calls it"
    assert count > 1


@pytest.mark.parametrize("name", CALLS)
def test_crash_at_any_call_while_training_goes_back_leaves_the_old_rows_or_the_new(tmp_path, monkeypatch, name):
    """It goes back to step 2 of 4, and again after the crash."""
    for count in itertools.count(1):
        path = tmp_path / f"{count}"
        append(path, 1, 2, 3, 4)
        crashed = False
        with monkeypatch.context() as patch:
            interrupt(patch, os, name, count, StopError())
            try:
                again_from_step_2(path)
            except StopError:
                crashed = True
        gc.collect()  # the writer's lock ends with it, as with a process
        trajectory = Trajectory.open(path)
        trajectory.verify()
        seeds = [seed_of(trajectory, row) for row in range(len(trajectory))]
        assert seeds in ([1, 2, 3, 4], [1, 2], [1, 2, 13], [1, 2, 13, 14])
        again_from_step_2(path)
        ended = Trajectory.open(path)
        assert [seed_of(ended, row) for row in range(len(ended))] == [1, 2, 13, 14]
        if not crashed:
            break
    assert count > 1


def again_from_step_2(path):
    with TrajectoryWriter(path, resume=2) as writer:
        writer.append(3, state_dict(13))
        writer.append(4, state_dict(14))


def seed_of(trajectory, row):
    """Of which :func:`state_dict` a row is."""
    checkpoint = trajectory.checkpoint(row)
    seed = int(checkpoint["batches"])
    assert same_bits(checkpoint, state_dict(seed))
    return seed


@pytest.mark.parametrize("name", CALLS)
def test_same_writer_goes_on_after_the_disk_refused(tmp_path, monkeypatch, name):
    for count in range(1, 12):
        path = tmp_path / f"{count}"
        with TrajectoryWriter(path, keep_last=2) as writer:
            writer.append(1, state_dict(1))
            with monkeypatch.context() as patch:
                interrupt(patch, os, name, count, OSError(28, "No space left on device"))
                with contextlib.suppress(TrajectoryError):  # small counts reach it, large ones do not
                    writer.append(2, state_dict(2))
            assert survivors(path)[0] == 1
            writer.append(2, state_dict(2))
            assert_whole(path, [1, 2])
            writer.append(3, state_dict(3))
            assert_whole(path, [2, 3])


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_refused_disk_is_told_later_and_no_later_sync_makes_up_for_it(tmp_path, monkeypatch, name):
    """After a failed sync the next one may succeed although the bytes are lost."""
    with TrajectoryWriter(tmp_path / "t") as writer:
        writer.append(1, state_dict(1))
        interrupt(monkeypatch, os, name, 1, OSError(5, "Input/output error"))
        assert writer.append(2, state_dict(2), wait=False)
        with pytest.raises(TrajectoryError, match="Input/output error"):
            writer.append(3, state_dict(3), wait=False)
        assert survivors(tmp_path / "t") == writer.steps == (1,)
        writer.append(4, state_dict(4), wait=False)
    assert_whole(tmp_path / "t", [1, 4])


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize("how", ["wait", "later"])
def test_killed_process_leaves_the_last_whole_checkpoints(tmp_path, how):
    path = tmp_path / "t"
    reported = 0
    for limit in (2, 9):
        enough = reported + limit
        receiver, sender = CONTEXT.Pipe(duplex=False)
        process = forked(append_for_ever, path, sender, wait=how == "wait")
        process.start()
        sender.close()
        while reported < enough:
            reported = receiver.recv()
        process.kill()
        process.join()
        steps = survivors(path)
        assert steps[-1] >= reported
        assert_whole(path, range(max(1, steps[-1] - 2), steps[-1] + 1))


def test_what_a_killed_writer_left_half_done_is_removed(tmp_path):
    append(tmp_path / "t", 1)
    for name in (".manifest.json.0123.partial", "writer.lock"):
        (tmp_path / "t" / name).write_text("{")
    append(tmp_path / "t", 2)
    assert_whole(tmp_path / "t", [1, 2])
    assert sorted(entry.name for entry in (tmp_path / "t").iterdir()) == ["manifest.json", "weights.bin"]


def test_a_part_of_a_sharded_tensor_is_refused(tmp_path):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        sharded = distribute_tensor(torch.ones(4), init_device_mesh("cpu", (1,)), [Shard(0)])
        with (
            TrajectoryWriter(tmp_path / "t") as writer,
            pytest.raises(TrajectoryError, match="'w' is a DTensor, and each process has a part of it: gather"),
        ):
            writer.append(1, {"w": sharded})
    finally:
        torch.distributed.destroy_process_group()
