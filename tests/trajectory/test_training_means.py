"""Means that a training writes: of all its checkpoints, also if it was killed at any point and resumed."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.trajectory import Trajectory, TrajectoryWriter
from lcsc_opt.trajectory.means import Interval
from lcsc_opt.trajectory.windows import Windows, pair_to_merge
from tests.processes import forked
from tests.trajectory.test_means import assert_is_mean, with_statistics
from tests.trajectory.trajectory_examples import append, interrupt, same_bits, state_dict

LENGTH = 23
SAVED_EVERY = 5
CALLS = ("write", "fsync", "replace", "lseek")


class StopError(Exception):
    """Stands for the end of the process."""


def weights(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {"w": torch.randn(4, generator=generator), "batches": torch.tensor(step)}


def written(path: Path, steps: int, *, means: int = 4, **options: Any) -> Trajectory:
    """The trajectory of a training that saves no state, with every kind of tensor."""
    with TrajectoryWriter(path, means=means, **options) as writer:
        for step in range(1, steps + 1):
            writer.step(step, with_statistics(step))
        writer.finish(steps, with_statistics(steps))
    return Trajectory.open(path)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 33])
def test_rows_are_the_means_of_all_checkpoints_and_the_last_one(tmp_path, steps):
    trajectory = written(tmp_path / "t", steps)
    trajectory.verify()
    assert trajectory.intervals is not None
    *means, last = trajectory.intervals
    assert last == (steps, steps, 1)
    assert [first for first, _, _ in (*means, last)] == [1, *(end + 1 for _, end, _ in means)], "no step is left out"
    full = {count for _, _, count in means[:-1]}
    assert len(means) <= 4
    assert len(full) <= 1
    assert len(means) >= 2 or steps < 4
    for row, (first, end, count) in enumerate(means):
        assert count == end - first + 1
        assert_is_mean(trajectory, row, range(first, end + 1))
    assert same_bits(trajectory.checkpoint(-1), with_statistics(steps))


def test_every_nth_checkpoint_is_added_and_the_last_one_need_not_be(tmp_path):
    with TrajectoryWriter(tmp_path / "t", means=2, every=10) as writer:
        for step in range(1, 38):
            writer.step(step, with_statistics(step))
        writer.finish(37, with_statistics(37))
    trajectory = Trajectory.open(tmp_path / "t")
    assert trajectory.intervals == ((10, 20, 2), (30, 30, 1), (37, 37, 1))
    assert_is_mean(trajectory, 0, (10, 20))
    assert same_bits(trajectory.checkpoint(1), with_statistics(30))


@pytest.mark.parametrize("steps", [7, 8])
def test_other_weights_than_those_that_were_added_last_are_the_next_step(tmp_path, capsys, steps):
    ema = {**weights(steps), "w": torch.zeros(4)}
    for name, last in (("t", ema), ("resumed", ema), ("same", weights(steps))):
        with TrajectoryWriter(tmp_path / name, means=4) as writer:
            for step in range(1, steps + 1):
                writer.step(step, weights(step))
            state = writer.state_dict()
            if name != "resumed":
                writer.finish(steps, last)
        if name == "resumed":
            with TrajectoryWriter(tmp_path / name, means=4) as writer:
                writer.load_state_dict(state)
                writer.finish(steps, last)
    others = Trajectory.open(tmp_path / "t")
    assert_are_means(others, len(others) - 1)
    assert others.steps[-2:] == (steps, steps + 1)
    assert same_bits(others.checkpoint(-1), ema)
    assert Trajectory.open(tmp_path / "resumed").sha256 == others.sha256
    assert Trajectory.open(tmp_path / "same").intervals[-1] == (steps, steps, 1)
    notices = capsys.readouterr().err
    assert notices.count(f"step {steps} was added with other weights: these are saved as step {steps + 1}") == 2


def test_half_precision_is_added_in_float32(tmp_path):
    models = [{"w": torch.tensor([1.0, 256.0]).bfloat16() + step} for step in range(8)]
    with TrajectoryWriter(tmp_path / "t", means=2) as writer:
        for step, model in enumerate(models):
            writer.step(step, model)
        writer.finish(8, models[-1])
    exact = torch.stack([model["w"].double() for model in models[:4]]).mean(dim=0)
    row = Trajectory.open(tmp_path / "t").checkpoint(0)["w"]
    assert row.dtype == torch.bfloat16
    assert torch.equal(row, exact.bfloat16())


@pytest.mark.parametrize("means", [2, 4, 32])
def test_number_of_rows_stays_between_half_and_all(means):
    windows = Windows(means)
    for step in range(2000):
        windows.add(step)
        full = windows.additions // windows.size
        assert full <= means
        assert full >= means // 2 or windows.size == 1


def test_neighbours_are_merged_only_if_they_are_one_window_that_nobody_needs():
    intervals = [Interval(1, 2, 2), Interval(3, 3, 1), Interval(4, 4, 1), Interval(5, 6, 2)]
    assert pair_to_merge(intervals, 1) is None
    assert pair_to_merge(intervals, 2) == 1
    assert pair_to_merge(intervals, 2, before=4) is None
    assert pair_to_merge([Interval(1, 1, 1), Interval(2, 3, 2), Interval(4, 5, 2)], 4) is None


def train(path: Path, saved: Path, *, to: int = LENGTH) -> None:
    """A training that goes on from the state in ``saved``, if there is one."""
    state: dict[str, Any] | None = torch.load(saved) if saved.exists() else None
    first = 1
    with TrajectoryWriter(path, means=4, resume=0 if state is None else None) as writer:
        if state is not None:
            writer.load_state_dict(state["writer"])
            first = state["step"] + 1
        for step in range(first, to + 1):
            writer.step(step, weights(step))
            if step % SAVED_EVERY == 0:
                pending = saved.with_suffix(".partial")
                torch.save({"writer": writer.state_dict(), "step": step}, pending)
                pending.replace(saved)
        writer.finish(to, weights(to))


@pytest.fixture
def uninterrupted(tmp_path):
    train(tmp_path / "uninterrupted", tmp_path / "uninterrupted.state")
    trajectory = Trajectory.open(tmp_path / "uninterrupted")
    assert trajectory.intervals == ((1, 8, 8), (9, 16, 8), (17, 22, 6), (23, 23, 1))
    return trajectory


@pytest.mark.parametrize("name", CALLS)
def test_training_that_crashed_at_any_call_leaves_the_same_bits(tmp_path, monkeypatch, uninterrupted, name):
    crashed = True
    for count in itertools.count(1):
        path = tmp_path / f"{count}"
        saved = tmp_path / f"{count}.state"
        with monkeypatch.context() as patch:
            interrupt(patch, os, name, count, StopError())
            try:
                train(path, saved)
                crashed = False
            except StopError:
                pass
        if (path / "manifest.json").exists():
            assert_rows_are_whole(path)
        train(path, saved)
        assert Trajectory.open(path).sha256 == uninterrupted.sha256
        assert Trajectory.open(path).intervals == uninterrupted.intervals
        if not crashed:
            break
    assert count > 10


def assert_rows_are_whole(path):
    trajectory = Trajectory.open(path)
    trajectory.verify()
    assert_are_means(trajectory, len(trajectory))


def assert_are_means(trajectory, rows):
    for row, (first, last, _) in enumerate(trajectory.intervals[:rows]):
        mean = torch.stack([weights(step)["w"] for step in range(first, last + 1)]).mean(dim=0)
        torch.testing.assert_close(trajectory.checkpoint(row)["w"], mean)
        assert trajectory.checkpoint(row)["batches"] == last


def train_until_killed(path: Path, saved: Path, at: int) -> None:
    """SIGKILL comes before the call ``at`` among those of :data:`CALLS`."""
    calls = itertools.count(1)

    def dying(plain: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if next(calls) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*arguments, **options)

        return call

    for name in CALLS:
        setattr(os, name, dying(getattr(os, name)))
    train(path, saved)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_training_that_is_killed_again_and_again_leaves_the_same_bits(tmp_path, uninterrupted):
    path = tmp_path / "t"
    saved = tmp_path / "t.state"
    for at in itertools.count(50, 25):
        process = forked(train_until_killed, path, saved, at)
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        if (path / "manifest.json").exists():
            assert_rows_are_whole(path)
    assert at > 60
    assert Trajectory.open(path).sha256 == uninterrupted.sha256


def test_finished_training_is_continued_from_its_last_state(tmp_path):
    train(tmp_path / "t", tmp_path / "state", to=20)
    assert Trajectory.open(tmp_path / "t").intervals[-1] == (20, 20, 1)
    train(tmp_path / "t", tmp_path / "state")
    train(tmp_path / "whole", tmp_path / "whole.state")
    assert Trajectory.open(tmp_path / "t").sha256 == Trajectory.open(tmp_path / "whole").sha256


def test_resume_without_the_mean_is_refused_and_writes_nothing(tmp_path, uninterrupted):
    with (
        TrajectoryWriter(uninterrupted.path, means=4, resume=20) as writer,
        pytest.raises(TrajectoryError, match="holds means already: load the training's state"),
    ):
        writer.step(21, weights(21))
    assert Trajectory.open(uninterrupted.path).sha256 == uninterrupted.sha256


def state_of(path: Path, *, to: int = 9, means: int = 4) -> dict[str, Any]:
    with TrajectoryWriter(path, means=means) as writer:
        for step in range(1, to + 1):
            writer.step(step, weights(step))
        return writer.state_dict()


BAD_STATES = {
    "of another training": (lambda path: state_of(path), "the means of another training"),
    "with other means": (lambda path: state_of(path, means=8), "began with means=8"),
    "no state": (lambda _: {"step": 3}, "the state has no mean"),
    "with another every": (lambda path: {**state_of(path), "every": 10}, "began with every=10"),
    "without its mean": (lambda path: {**state_of(path), "mean": {}}, "lacks its mean of 1 checkpoints"),
    "with something else": (lambda path: {**state_of(path), "mean": 3.0}, "lacks its mean of 1 checkpoints"),
    "with texts": (
        lambda path: {**state_of(path), "windows": dict.fromkeys(Windows(4).state(), "x")},
        "not that of a writer of means",
    ),
    "broken": (lambda path: {**state_of(path), "windows": {"means": 4}}, "not that of a writer of means"),
}


@pytest.mark.parametrize(("state", "message"), BAD_STATES.values(), ids=BAD_STATES)
def test_state_that_does_not_fit_is_refused_and_writes_nothing(tmp_path, uninterrupted, state, message):
    loaded = state(tmp_path / "other")
    with (
        TrajectoryWriter(uninterrupted.path, means=4) as writer,
        pytest.raises(TrajectoryError, match=message) as caught,
    ):
        writer.load_state_dict(loaded)
    assert "\n" not in str(caught.value)
    assert Trajectory.open(uninterrupted.path).sha256 == uninterrupted.sha256


def test_state_from_before_a_merge_that_it_does_not_know_is_refused(tmp_path):
    with TrajectoryWriter(tmp_path / "t", means=4) as writer:
        for step in range(1, 23):
            writer.step(step, weights(step))
            if step == 3:
                old = writer.state_dict()
            if step in (15, 20):
                writer.state_dict()
        writer.finish(22, weights(22))
    with (
        TrajectoryWriter(tmp_path / "t", means=4) as writer,
        pytest.raises(TrajectoryError, match="does not hold the means before step 3 of the state"),
    ):
        writer.load_state_dict(old)


def test_mean_of_another_model_is_refused(tmp_path):
    state = state_of(tmp_path / "t")
    with TrajectoryWriter(tmp_path / "new", means=4) as writer:
        state["windows"] = {**state["windows"], "additions": 1}
        writer.load_state_dict(state)
        with pytest.raises(TrajectoryError, match="the training's state does not fit the model"):
            writer.step(10, state_dict(10))


def test_checkpoints_and_means_are_not_mixed(tmp_path):
    append(tmp_path / "checkpoints", 1, 2)
    with (
        TrajectoryWriter(tmp_path / "checkpoints", means=4) as writer,
        pytest.raises(TrajectoryError, match="holds checkpoints, and no means"),
    ):
        writer.step(3, state_dict(3))
    written(tmp_path / "means", 5)
    without: dict[str, Any] = {}
    for options, message in ((without, "holds means of checkpoints"), ({"means": 4}, "saves means: call step")):
        with (
            TrajectoryWriter(tmp_path / "means", **options) as writer,
            pytest.raises(TrajectoryError, match=message),
        ):
            writer.append(6, with_statistics(6))
    with TrajectoryWriter(tmp_path / "new") as writer, pytest.raises(TrajectoryError, match="make it with means=32"):
        writer.step(1, state_dict(1))


@pytest.mark.parametrize("options", [{"means": 3}, {"means": 0}, {"means": 4, "keep_last": 2}], ids=str)
def test_bad_options_are_refused_before_anything_is_written(tmp_path, options):
    with pytest.raises(TrajectoryError, match="means:"):
        TrajectoryWriter(tmp_path / "t", **options)
    assert not (tmp_path / "t").exists()


def test_weights_that_are_not_finite_end_the_writing(tmp_path):
    broken = {"w": torch.tensor([float("nan"), 0, 0, 0]), "batches": torch.tensor(3)}
    with TrajectoryWriter(tmp_path / "t", means=2) as writer:
        writer.step(1, weights(1))
        writer.step(2, weights(2))
        writer.step(3, broken)
        writer.step(4, weights(4))
        writer.step(5, weights(5))  # writes the mean of steps 3 and 4
        with pytest.raises(TrajectoryError, match="Tensor 'w' at step 4 holds NaN"):
            writer.flush()
        with pytest.raises(TrajectoryError, match="resume from the training's state"):
            writer.step(9, weights(9))


def test_full_disk_says_that_the_training_is_resumed_from_its_state(tmp_path, monkeypatch):
    with TrajectoryWriter(tmp_path / "t", means=2) as writer:
        writer.step(1, weights(1))
        writer.step(2, weights(2))
        writer.flush()
        interrupt(monkeypatch, os, "write", 1, OSError(28, "No space left on device"))
        writer.step(3, weights(3))
        with pytest.raises(TrajectoryError, match="up to step 1 all is saved, resume from the training's state"):
            writer.flush()


def test_step_that_comes_twice_or_late_is_refused(tmp_path):
    with TrajectoryWriter(tmp_path / "t", means=2) as writer:
        writer.step(5, weights(5))
        with pytest.raises(TrajectoryError, match="Step 5 was added already"):
            writer.step(5, weights(5))
        with pytest.raises(TrajectoryError, match="Step 4 comes after step 5"):
            writer.step(4, weights(4))
        writer.finish(5, weights(5))
        with pytest.raises(TrajectoryError, match="the training is finished"):
            writer.step(6, weights(6))
