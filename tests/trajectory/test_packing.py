from __future__ import annotations

import contextlib
import errno
import itertools
import mmap
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.paths import KnownCheckpoints
from lcsc_opt.checkpoints.finding import Selection
from lcsc_opt.trajectory import Trajectory, filling, pack
from lcsc_opt.trajectory.continuing import changes_at
from lcsc_opt.trajectory.neighbours import check_neighbours
from lcsc_opt.trajectory.packing import open_request
from lcsc_opt.trajectory.sources import PackRequest
from tests.processes import CONTEXT, forked, peak_growth, wait_until
from tests.trajectory.trajectory_examples import (
    STEPS,
    append,
    assert_whole,
    interrupt,
    make_trajectory,
    open_or_pack,
    same_bits,
    state_dict,
)


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / f"model{step:06d}.safetensors" for step in STEPS]
    for path, step in zip(paths, STEPS, strict=True):
        save_file(state_dict(step), path)
    return paths


def names(folder):
    return {entry.name for entry in folder.iterdir()}


def test_packed_in_the_order_of_steps(files, tmp_path):
    trajectory = pack(files[::-1], tmp_path / "run.trajectory")
    assert trajectory.sources == tuple(map(str, files))
    assert_whole(trajectory.path, STEPS)
    assert "run.trajectory.partial" not in names(tmp_path)


@pytest.mark.parametrize(("suffix", "save"), [("pt", torch.save), ("safetensors", save_file)])
def test_files_are_read_on_the_cpu_whatever_the_default_device_is(tmp_path, suffix, save):
    for step in (1, 2, 3, 4):
        save({"weight": torch.full((3,), float(step))}, tmp_path / f"m{step}.{suffix}")
    torch.set_default_device("meta")
    try:
        merged = pack(tmp_path / f"*.{suffix}", tmp_path / "t").merge([0.25] * 4)
    finally:
        torch.set_default_device(None)
    assert merged["weight"].tolist() == [2.5] * 3


def test_key_of_the_first_is_taken_from_all(tmp_path):
    torch.save({"ema": state_dict(1)}, tmp_path / "m1.pt")
    torch.save({"ema": state_dict(3), "model": state_dict(4)}, tmp_path / "m2.pt")
    paths = [tmp_path / "m1.pt", tmp_path / "m2.pt"]
    with pytest.raises(
        TrajectoryError, match=r"m2\.pt would be read by the key 'model', and the first checkpoint by 'ema'"
    ):
        pack(paths, tmp_path / "t")
    trajectory = pack(paths, tmp_path / "t", key="ema")
    assert same_bits(trajectory.checkpoint(1), state_dict(3))
    assert trajectory.metadata["key"] == "ema"


@pytest.mark.parametrize("first_average", [0, 1, 2])
def test_raw_weights_are_packed_wherever_they_are_beside_an_average(tmp_path, caplog, first_average):
    caplog.set_level("INFO", logger="lcsc_opt")
    for step in (1, 2):
        averages = {"ema": state_dict(step + 10)} if step > first_average else {}
        torch.save({"model": state_dict(step), **averages}, tmp_path / f"m{step}.pt")
    trajectory = pack(tmp_path, tmp_path / "t")
    assert trajectory.metadata["key"] == "model"
    assert same_bits(trajectory.checkpoint(0), state_dict(1))
    assert (trajectory.trainer_ema() is None) == (first_average == 2)
    assert ("using the raw weights, 'model'; for the trainer's average: key: ema" in caplog.text) == (first_average < 2)
    assert ("m2.pt is the first checkpoint with an average (ema)" in caplog.text) == (first_average == 1)
    if first_average == 0:
        averages_alone = pack(tmp_path, tmp_path / "averages", key="ema")
        assert same_bits(averages_alone.checkpoint(0), state_dict(11))


def test_what_is_called_an_average_and_is_of_another_model_is_not_taken(tmp_path, caplog):
    caplog.set_level("INFO", logger="lcsc_opt")
    for step in (1, 2):
        content = {"model": state_dict(step), "norm_ema": {"train": torch.ones(1)}, "grads_ema": [torch.ones(2)]}
        torch.save(content, tmp_path / f"m{step}.pt")
        torch.save(content | {"net": {"w": torch.ones(3)}}, tmp_path / f"n{step}.pt")
    trajectory = pack(tmp_path / "m*.pt", tmp_path / "t")
    assert trajectory.metadata["key"] == "model"
    assert trajectory.trainer_ema() is None
    assert "using 'model'; there is also norm_ema (of other names than the model, so no average of it)" in caplog.text
    with pytest.raises(TrajectoryError, match=r"several state dicts \(model, net\): choose one"):
        pack(tmp_path / "n*.pt", tmp_path / "u")


@pytest.mark.parametrize("named", ["ema_params", "shadow"])
def test_an_average_that_moves_more_than_the_weights_is_said_and_both_have_rows(tmp_path, caplog, named):
    """Weights rest at the end of a training, and their average catches up; or the names are exchanged."""
    caplog.set_level("INFO", logger="lcsc_opt")
    for step in (1, 2, 3):
        raw = {name: torch.full((2,), 10.0 * step) for name in ("a", "b")}
        averaged = {name: torch.full((2,), 1.0 * step) for name in ("a", "b")}
        beside = [*raw.values()] if named == "ema_params" else raw
        ema = beside if named == "ema_params" else {named: beside, "decay": torch.tensor(0.9)}
        torch.save({"model": averaged, "ema_params" if named == "ema_params" else "ema": ema}, tmp_path / f"m{step}.pt")
    trajectory = pack(tmp_path, tmp_path / "t")
    assert trajectory.metadata["key"] == "model"
    assert trajectory.averages == ("trainer's EMA",)
    assert "moves more than 'model' from file to file: the weights rest" in caplog.text


def test_an_average_that_never_changes_is_not_the_trainers(tmp_path, caplog):
    caplog.set_level("INFO", logger="lcsc_opt")
    for step in (1, 2):
        torch.save({"model": state_dict(step), "teacher_ema": state_dict(7)}, tmp_path / f"m{step}.pt")
    trajectory = pack(tmp_path, tmp_path / "t")
    assert trajectory.metadata["key"] == "model"
    assert trajectory.trainer_ema() is None
    assert "'teacher_ema' is the same as in m1.pt though the weights have moved, so it is no average" in caplog.text


@pytest.mark.parametrize("count", [1, 4])
def test_interrupted_pack_goes_on_where_it_stopped(files, tmp_path, monkeypatch, caplog, count):
    caplog.set_level("INFO", logger="lcsc_opt")
    with monkeypatch.context() as patch:
        interrupt(patch, tqdm, "set_postfix_str", count, KeyboardInterrupt())  # while the progress is shown
        with pytest.raises(KeyboardInterrupt):
            pack(files, tmp_path / "t")
    assert not (tmp_path / "t").exists()
    assert Trajectory.open(tmp_path / "t.partial").steps == STEPS[:count]
    for packed in files[:count]:  # they are not used again: of this size and time, they would be refused
        before = packed.stat()
        save_file({name.replace("w", "W"): tensor for name, tensor in state_dict(1).items()}, packed)
        os.utime(packed, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert pack(files, tmp_path / "t").sha256 == make_trajectory(tmp_path / "whole").sha256
    assert caplog.text.count("packing 5 checkpoints") == 1, "where the key was chosen"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("count", [1, 2])
def test_a_sync_that_fails_once_is_told_and_loses_no_row(tmp_path, monkeypatch, count):
    run = tmp_path / "run"
    run.mkdir()
    for step in range(40):
        save_file({"w": torch.full((4,), float(step))}, run / f"model{step}.safetensors")
    plain = os.fsync
    syncs_of_rows = itertools.count(1)

    def fsync(descriptor):
        if Path(f"/proc/self/fd/{descriptor}").readlink().name == "weights.bin" and next(syncs_of_rows) == count:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        plain(descriptor)
        time.sleep(0.01)

    monkeypatch.setattr(filling, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(TrajectoryError, match=os.strerror(errno.EIO)):
        pack(run, tmp_path / "t")
    assert pack(run, tmp_path / "t").steps == tuple(range(40))


@pytest.mark.parametrize("change", ["content", "selection"])
def test_partial_of_other_sources_is_not_continued(files, tmp_path, monkeypatch, change):
    torch.save({"w": torch.ones(1)}, tmp_path / "model000600.pt")
    with pytest.raises(TrajectoryError, match=r"model000600\.pt: .* it lacks 'batches'"):
        pack([*files, tmp_path / "model000600.pt"], tmp_path / "t")
    assert "t.partial" in names(tmp_path)
    if change == "content":
        for path in files:
            save_file(state_dict(int(path.stem[5:]) + 1), path)
        torch.save(state_dict(601), tmp_path / "model000600.pt")
        files = [*files, tmp_path / "model000600.pt"]
    expected = state_dict(STEPS[0] + (change == "content"))
    assert same_bits(pack(files, tmp_path / "t").checkpoint(0), expected)


def test_overwrite_never_removes_anything_else(files, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").write_text("x")
    with pytest.raises(TrajectoryError, match="is not a trajectory"):
        pack(files, tmp_path / "photos", overwrite=True)
    (tmp_path / "photos").rename(tmp_path / "t.partial")
    with pytest.raises(TrajectoryError, match="in the way"):
        pack(files, tmp_path / "t")
    assert (tmp_path / "t.partial" / "me.jpg").exists()


def test_a_link_stays_one_to_what_is_packed(files, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "link").symlink_to("real.trajectory")
    first = pack(files, "~/link")
    with pytest.raises(TrajectoryError, match=r"real\.trajectory exists"):
        pack(files[1:], tmp_path / "link")
    second = pack(files[1:], tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert first.path == second.path == tmp_path / "real.trajectory"
    assert_whole(tmp_path / "link", STEPS[1:])


def test_what_another_call_packs_meanwhile_is_not_replaced(files, tmp_path):
    packed = []

    class Steps(list[int]):
        def __iter__(self):  # they are read while the first call looks for its checkpoints
            with contextlib.suppress(TrajectoryError):
                packed.append(pack(files[2:], tmp_path / "t"))
            return super().__iter__()

    with contextlib.suppress(TrajectoryError):
        packed.append(pack(files[:2], tmp_path / "t", steps=Steps(STEPS[:2])))
    assert len(packed) == 1


@pytest.mark.parametrize(
    ("steps", "message"), [([4, 4], "Step 4 appears twice"), ([-4, 4], "whole number from 0, not -4")]
)
def test_bad_steps_are_refused(files, tmp_path, steps, message):
    with pytest.raises(TrajectoryError, match=message):
        pack(files[:2], tmp_path / "t", steps=steps)
    assert not (tmp_path / "t").exists()


def test_selection_is_made_before_any_weights_are_read(files, tmp_path, capsys):
    unread = [path.with_suffix(".pt") for path in files[::3]]
    for path in unread:
        path.write_bytes(b"not weights")
    paths = [*files[1:3], files[4], *unread]
    selection = Selection(first_step=200, interval=200, last=2)
    trajectory = pack(paths, tmp_path / "t", selection=selection, steps=[200, 300, 500, 100, 400])
    assert trajectory.steps == (300, 500)
    assert "of 5 checkpoints, selected 2: steps 300 to 500, 200 apart" in capsys.readouterr().err
    with pytest.raises(TrajectoryError, match="window 3 leaves 1 of 5 checkpoints and a trajectory needs at least 2"):
        pack(files, tmp_path / "u", steps=[1, 2, 3, 4, 40], selection=Selection(window=3))


def test_packed_trajectory_opens_as_it_is(files, tmp_path):
    packed = pack(files, tmp_path / "t.trajectory").path
    for patterns in (packed, str(packed), [packed]):
        assert open_or_pack(patterns, folder=tmp_path / "cache").path == packed
    with pytest.raises(TrajectoryError, match="with key '', not 'model'"):
        open_or_pack(packed, folder=tmp_path / "cache", key="model")
    with pytest.raises(TrajectoryError, match="is packed: leave out steps"):
        open_or_pack(packed, folder=tmp_path / "cache", steps=[1, 2])
    with pytest.raises(
        TrajectoryError, match="was packed with stored 'exact', not 'bfloat16': leave it out, or pack again"
    ):
        open_or_pack(packed, folder=tmp_path / "cache", dtype="bfloat16")
    with pytest.raises(TrajectoryError, match="is packed already: name the checkpoints"):
        pack(packed, tmp_path / "again")
    selected = open_or_pack(packed, folder=tmp_path / "cache", selection=Selection(last=2))
    assert (selected.path, selected.steps) == (packed, STEPS[-2:])
    assert not (tmp_path / "cache").exists()


def test_checkpoints_of_a_study_are_packed_once(files, tmp_path, capsys):
    cache = tmp_path / "cache"
    first = open_or_pack(str(tmp_path / "model*"), folder=cache)
    assert first.path.parent == cache
    assert str(first.path) in capsys.readouterr().err
    assert first.sha256 == pack(files, tmp_path / "t").sha256
    written = (first.path / "weights.bin").stat()
    assert open_or_pack(tmp_path / "model*", folder=cache).path == first.path
    assert open_or_pack(files[::-1], folder=cache).path == first.path
    assert {path.name for path in first.path.parent.iterdir()} == {first.path.name}
    assert (first.path / "weights.bin").stat() == written


def test_other_sources_key_or_selection_are_packed_apart(files, tmp_path):
    cache = tmp_path / "cache"
    options: list[dict[str, Any]] = [{}, {"dtype": "exact"}, {"dtype": "bfloat16"}, {"key": ""}]
    options += [{"selection": Selection(last=3)}, {"steps": [1, 2, 3, 4, 5]}]
    paths = {open_or_pack(files, folder=cache, **some).path for some in options}
    paths.add(open_or_pack(files[1:], folder=cache).path)
    save_file(state_dict(7), files[2])
    later = open_or_pack(files, folder=cache)
    assert same_bits(later.checkpoint(2), state_dict(7))
    assert len(paths | {later.path}) == 7


def with_floats_as(dtype, tensors):
    floats = {name: tensor.to(dtype) for name, tensor in tensors.items() if tensor.is_floating_point()}
    return tensors | floats


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rows_of_half_precision_are_the_rounded_checkpoints(files, tmp_path, dtype):
    trajectory = pack(files, tmp_path / "t", dtype=dtype)
    half = getattr(torch, dtype)
    rounded = [with_floats_as(half, state_dict(step)) for step in STEPS]
    for index, expected in enumerate(rounded):
        wide = with_floats_as(torch.float32, expected)
        assert same_bits(trajectory.checkpoint(index), wide)
        assert same_bits(trajectory.merge(torch.eye(len(STEPS))[index]), wide)
    before = make_trajectory(tmp_path / "u", weights=dict(zip(STEPS, rounded, strict=True)).__getitem__)
    assert trajectory.sha256 == before.sha256  # as if the files had been rounded before
    row = [0.5, -0.25, 0.25, 1.5, -1.0]
    merged = sum(a * weights["weight"].double() for a, weights in zip(row, rounded, strict=True))
    torch.testing.assert_close(trajectory.merge(row)["weight"], merged.float())
    append(trajectory.path, 600)  # goes on as it began
    assert torch.equal(Trajectory.open(trajectory.path).checkpoint(-1)["weight"], state_dict(600)["weight"].to(half))


def pack_step_by_step(files, cache, pipe):
    """Wait for a message before the trajectory is written; sends the SHA-256 at the end."""

    def waiting(event, arguments):
        if event == "open" and str(arguments[0]).endswith("weights.bin") and not said:
            said.append("writes")
            pipe.send("writes")
            pipe.recv()

    said: list[str] = []
    sys.addaudithook(waiting)
    pipe.send(open_or_pack(files, folder=cache).sha256)


@pytest.mark.skipif(sys.platform == "win32", reason="no flock")
def test_second_process_waits_for_the_first(files, tmp_path, capsys):
    """As the workers of one study do, each of which builds the objective."""
    cache = tmp_path / "cache"
    worker, workers_end = CONTEXT.Pipe()
    process = forked(pack_step_by_step, files, cache, workers_end)
    process.start()
    workers_end.close()
    assert worker.recv() == "writes"  # it packs, and now stands still
    (partial,) = cache.glob(".*.lock")
    with pytest.raises(TrajectoryError, match="Another process packs to"):
        pack(files, partial.with_name(partial.name[1:].removesuffix(".lock")))
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(open_or_pack, files, folder=cache)
        wait_until(lambda: "waiting" in capsys.readouterr().err)
        assert not waiting.done()
        worker.send("go on")
        trajectory = waiting.result(timeout=120)
    assert worker.recv() == trajectory.sha256
    process.join()
    assert trajectory.steps == STEPS
    assert names(cache) == {trajectory.path.name}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_packing_holds_two_checkpoints(tmp_path):
    size = 40_000_000
    paths = [str(tmp_path / f"model{step}.safetensors") for step in range(4)]
    for step, path in enumerate(paths):
        save_file({f"w{i}": torch.full((size // 40,), float(step)) for i in range(10)}, path)
    assert peak_growth(pack, paths, tmp_path / "t") < 2.5 * size


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_neighbours_are_compared_in_little_memory(tmp_path):
    """However many checkpoints there are; a sample of each is a megabyte here."""
    weights = {f"w{number}": torch.zeros(1024) for number in range(128)}

    def moved(step):
        for tensor in weights.values():
            tensor += 1
        return weights

    make_trajectory(tmp_path / "t", range(40), weights=moved)
    assert peak_growth(compare_neighbours, tmp_path / "t") < 20_000_000


def compare_neighbours(path):
    check_neighbours(Trajectory.open(path), steps_given=False)


def written_run(folder, steps, start, length=3):
    """A run whose weights go on from ``start`` by about one a step."""
    folder.mkdir()
    draw = torch.Generator().manual_seed(int(start))
    for step in steps:
        torch.save({"w": start + step + torch.randn(length, generator=draw)}, folder / f"ckpt_{step}.pt")


@pytest.mark.parametrize(("first", "second"), [(1000.0, 2000.0), (0.0, 350.0)], ids=["two seeds", "a restart"])
def test_checkpoints_of_two_runs_are_refused_by_their_weights(tmp_path, caplog, first, second):
    written_run(tmp_path / "seed_1", (100, 200, 300), first)
    written_run(tmp_path / "seed_2", (150, 250, 350), second)
    with pytest.raises(TrajectoryError, match=r"seed_1/ckpt_100.pt is nearer to .*seed_1/ckpt_200.pt than to .*seed_2"):
        pack(tmp_path / "seed_*/ckpt_*.pt", tmp_path / "t")
    assert names(tmp_path) == {"seed_1", "seed_2"}
    caplog.set_level("INFO", logger="lcsc_opt")
    files = [
        tmp_path / f"seed_{seed}/ckpt_{step}.pt" for seed, step in ((1, 100), (2, 150), (1, 200), (2, 250), (1, 300))
    ]
    assert len(pack(files, tmp_path / "t", steps=[1, 2, 3, 4, 5])) == 5  # who names the steps knows better
    assert "of several runs" in caplog.text


def test_the_same_weights_at_two_steps_are_refused(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for step, value in ((100, 1.0), (200, 2.0), (300, 2.0)):
        torch.save({"w": torch.full((4,), value)}, run / f"model_{step}.pt")
    with pytest.raises(TrajectoryError, match=r"model_200.pt and .*model_300.pt hold the same weights, at steps 200 "):
        pack(run, tmp_path / "t")
    assert names(tmp_path) == {"run"}
    packed = pack(run, tmp_path / "t", steps=[1, 2, 3])  # who names the steps knows better
    assert packed.identical() == ["identical weights: steps 2, 3"]


def test_a_run_that_wanders_is_no_mixture(tmp_path):
    draw = torch.Generator().manual_seed(1)
    place = torch.zeros(50)
    for step in range(1, 13):
        place = place + torch.randn(50, generator=draw)
        torch.save({"w": place + 10 * torch.randn(50, generator=draw)}, tmp_path / f"{step}.pt")
    assert len(pack(tmp_path, tmp_path / "t")) == 12


def walked(lengths, seed=0):
    """Weights after moves of these lengths, each in a direction of its own."""
    draw = torch.Generator().manual_seed(seed)
    moves = torch.randn(len(lengths), 50, generator=draw)
    return (moves * torch.tensor(lengths)[:, None]).cumsum(0)


def scattered(spreads):
    """Weights around one mean, each as far from it as its learning rate lets it be."""
    draw = torch.Generator().manual_seed(1)
    return torch.randn(len(spreads), 50, generator=draw) * torch.tensor(spreads)[:, None]


def save_run(folder, rows, steps):
    for step, row in zip(steps, rows, strict=True):
        torch.save({"w": row.clone()}, folder / f"ckpt_{step}.pt")


@pytest.mark.parametrize("place", [1, 4, 6, -1])
def test_a_single_checkpoint_of_another_run_is_named(tmp_path, caplog, place):
    caplog.set_level("INFO", logger="lcsc_opt")
    steps = range(100, 900, 100)
    rows = walked([1.0] * 8)
    rows[place] = 10 * walked([1.0], seed=5)[0]
    save_run(tmp_path, rows, steps)
    assert len(pack(tmp_path, tmp_path / "t")) == 8
    said = [line for line in caplog.messages if "of another run" in line]
    assert len(said) == 1
    assert f"ckpt_{steps[place]}.pt is much further from the checkpoints beside it" in said[0]
    assert "to leave it out, list the others" in said[0]


@pytest.mark.parametrize(
    ("rows", "steps"),
    [
        (torch.arange(8.0)[:, None].expand(8, 50), range(1, 9)),
        (walked([1.0] * 20), range(1, 21)),
        (scattered([1.0] * 20), range(1, 21)),
        (scattered([1.0, 0.8, 0.5, 0.3, 0.1, 0.05, 0.01]), range(1, 8)),
        (scattered([1.0, 0.7, 0.05] * 4), range(1, 13)),
        (scattered([1.0, 0.05, 1.0, 0.05, 1.0]), range(1, 6)),
        (walked([1.0, 0.5, 0.1, 1.0, 0.5, 0.1]), range(1, 7)),
        (walked([2.0**power for power in range(12)]), [2**power for power in range(12)]),
        (walked([1.0] * 5 + [9.0]), [1, 2, 3, 4, 5, 86]),
        (walked([1.0, 1.0, 1.0, 9.0, 1.0, 1.0]), [10, 20, 30, 90, 100, 110]),
        (scattered([0.1, 0.1, 0.1, 5.0, 0.1, 0.1, 0.1, 5.0, 0.1, 0.1, 0.1]), range(1, 12)),
        (walked([1.0, 9.0, 50.0]), [1, 2, 3]),
        (walked([1.0, 9.0]), [1, 2]),
    ],
    ids=[
        "steady",
        "a random walk",
        "around a mean",
        "a learning rate that decays",
        "one that restarts",
        "two in each cycle",
        "a walk that restarts",
        "steps that double",
        "a late last one",
        "a run that was resumed later",
        "two phases of a higher learning rate",
        "three",
        "two",
    ],
)
def test_no_checkpoint_of_a_run_is_called_another_runs(tmp_path, caplog, rows, steps):
    caplog.set_level("INFO", logger="lcsc_opt")
    save_run(tmp_path, rows, steps)
    assert len(pack(tmp_path, tmp_path / "t")) == len(steps)
    assert "of another run" not in caplog.text


@pytest.mark.parametrize("change", ["cut", "longer", "gone"])
def test_a_checkpoint_that_is_written_over_while_it_is_packed_is_named(tmp_path, monkeypatch, change):
    """Reading the map of a file that was cut would end the process."""
    for step in (1, 2, 3):
        torch.save({"w": torch.randn(1 << 16)}, tmp_path / f"m_{step}.pt")
    path = tmp_path / "m_3.pt"
    size, number = path.stat().st_size, path.stat().st_ino
    changes = {"cut": lambda: os.truncate(path, 0), "longer": lambda: os.truncate(path, size + 1), "gone": path.unlink}
    plain = mmap.mmap

    def map_and_change(descriptor, length, **options):
        mapped = plain(descriptor, length, **options)
        if os.fstat(descriptor).st_ino == number and options["access"] == mmap.ACCESS_COPY:  # of its tensors
            changes[change]()
        return mapped

    monkeypatch.setattr(mmap, "mmap", map_and_change)
    with pytest.raises(TrajectoryError, match=r"m_3\.pt: was written over while it was read"):
        pack(tmp_path, tmp_path / "t")


@pytest.mark.parametrize("late", [{}, {"ema": {"other": torch.ones(9)}}, {"ema": {"w": torch.ones(7)}}])
def test_an_average_that_a_later_file_lacks_is_no_obstacle(tmp_path, caplog, late):
    caplog.set_level("INFO", logger="lcsc_opt")
    for step in (1, 2, 3):
        averages = late if step == 3 else {"ema": {"w": torch.full((2,), step - 0.1)}}
        torch.save({"model": {"w": torch.full((2,), float(step))}, **averages}, tmp_path / f"{step}.pt")
    trajectory = pack(tmp_path, tmp_path / "t")
    assert (trajectory.metadata["key"], trajectory.trainer_ema()) == ("model", None)
    assert "3.pt has no average (ema), unlike 1.pt" in caplog.text


def test_a_study_goes_on_with_a_packed_copy_where_the_named_trajectory_is_broken(tmp_path, caplog):
    caplog.set_level("INFO", logger="lcsc_opt")
    named = make_trajectory(tmp_path / "run.trajectory")
    shutil.copytree(named.path, tmp_path / "files" / "copy.trajectory")
    (named.path / "manifest.json").write_text("{")
    checkpoints = KnownCheckpoints(named.sha256, named.steps)
    request = PackRequest([named.path], tmp_path / "files", study_checkpoints=checkpoints)
    assert open_request(request).sha256 == named.sha256
    assert "run.trajectory: has changed; continuing with the 5 packed checkpoints" in caplog.text
    assert changes_at(request, checkpoints).written_again


def test_a_lora_whose_alphas_differ_is_refused(tmp_path):
    """A mean of 4 and 16 is an alpha of no file."""
    draw = torch.Generator().manual_seed(0)
    for step, alpha in ((100, 4.0), (200, 16.0)):
        module = "lora_unet_mid_to_q"
        tensors = {
            f"{module}.lora_down.weight": torch.randn(4, 8, generator=draw),
            f"{module}.lora_up.weight": torch.randn(8, 4, generator=draw),
            f"{module}.alpha": torch.tensor(alpha),
        }
        save_file(tensors, tmp_path / f"hat-{step:06d}.safetensors")
    with pytest.raises(TrajectoryError, match=r"mid_to_q\.alpha: its alpha differs between checkpoints"):
        pack(tmp_path, tmp_path / "t")
    assert not list(tmp_path.glob("t*"))
