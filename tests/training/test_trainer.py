"""The loop of all recipes: what it leaves, how it goes on, what stops it."""

from __future__ import annotations

import itertools
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lcsc_opt.base.errors import LcscError, TrainingError
from lcsc_opt.training import trainer
from lcsc_opt.training.recipes import Batch
from lcsc_opt.training.recipes.consistency import Ct
from lcsc_opt.training.recipes.diffusion import Edm
from lcsc_opt.training.trainer import Trainer, Training
from lcsc_opt.trajectory import Trajectory
from tests.training.toy_network import IMAGES, ToyNetwork
from tests.trajectory.trajectory_examples import interrupt

STEPS, EVERY = 20, 4
EDM = Edm(batch_size=8)


class StopError(Exception):
    """Stands for whatever ends a process."""


def watched(
    kind: type[Any],
    look: Callable[[Batch], Any] = lambda _: None,
    after: Callable[[Batch, Tensor], Tensor] = lambda _, loss: loss,
) -> Any:
    """A recipe that looks at each batch before its loss, where it may raise, and may change the loss."""

    class Watched(kind):  # type: ignore[misc]
        def loss(self, batch: Batch) -> Tensor:
            look(batch)
            return after(batch, super().loss(batch))

    return Watched(batch_size=8)


def ending(kind: type[Any], at: int, *, signals: int = 0) -> Any:
    """Ends in step ``at``, with so many of its user's Ctrl-C. Its network draws numbers of its own, as for dropout."""

    def end(batch: Batch) -> None:
        if batch.step == at:
            for _ in range(signals):
                signal.raise_signal(signal.SIGINT)
            if not signals:
                raise StopError

    def by_chance(_batch: Batch, loss: Tensor) -> Tensor:
        return loss * (1 + torch.rand(()))

    return watched(kind, end, by_chance)


def first_weights() -> ToyNetwork:
    torch.manual_seed(3)
    return ToyNetwork()


def run(folder: Path, recipe: Any, *, resume: bool = False, images: Tensor = IMAGES, **changes: Any) -> Trajectory:
    usual: dict[str, Any] = {"data": "squares", "out": folder / "run.trajectory", "steps": STEPS}
    keeps_start = changes.pop("keeps_start", False)
    training = Training(recipe, **{**usual, "checkpoint_every": EVERY, **changes})
    made = Trainer(training, first_weights(), images, keeps_start=keeps_start)
    made.train(resume=resume)
    return Trajectory.open(training.out)


@pytest.fixture
def often_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of a training is saved with each checkpoint, not once a minute."""
    monkeypatch.setattr(trainer, "STATE_SECONDS", 0.0)


@pytest.mark.parametrize(  # Ct has a target that follows
    ("kind", "at", "states"), [(Edm, 14, "often"), (Ct, 14, "often"), (Ct, 14, "never"), (Ct, 2, "often")]
)
def test_an_interrupted_training_continues_to_the_same_bits(
    tmp_path: Path, kind: Any, at: int, states: str, request: pytest.FixtureRequest
) -> None:
    if states == "often":
        request.getfixturevalue("often_saved")
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    expected = run(whole, ending(kind, -1))
    with pytest.raises(StopError):
        run(parted, ending(kind, at))
    assert run(parted, ending(kind, -1), resume=True).sha256 == expected.sha256


@pytest.mark.parametrize("at", [14, 2])
def test_a_tuning_keeps_its_start_also_after_an_interruption(tmp_path: Path, at: int) -> None:
    with pytest.raises(StopError):
        run(tmp_path, ending(Edm, at), keeps_start=True)
    trajectory = run(tmp_path, EDM, keeps_start=True, resume=True)
    assert trajectory.steps == (0, 4, 8, 12, 16, 20)
    start = first_weights().state_dict()
    assert all(torch.equal(tensor, start[name]) for name, tensor in trajectory.checkpoint(0).items())
    assert not torch.equal(trajectory.checkpoint(-1)["first.weight"], start["first.weight"])


@pytest.mark.parametrize("at", [0, 11, STEPS - 1])
def test_ctrl_c_loses_no_step(tmp_path: Path, capsys: pytest.CaptureFixture[str], at: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "ended", ending(Edm, at, signals=1))
    assert f"stopped after step {at + 1}; stored up to step {at + 1}\n" in capsys.readouterr().err
    continued = run(tmp_path / "ended", ending(Edm, -1), resume=True)
    assert continued.sha256 == run(tmp_path / "whole", ending(Edm, -1)).sha256


def test_a_second_ctrl_c_does_not_wait_for_the_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], often_saved: None
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, ending(Edm, 10, signals=2))
    assert "stopped after step 10; stored up to step 8" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_its_whole_state_the_checkpoints_of_a_training_are_kept(tmp_path: Path) -> None:
    """A user removes it for its size; to train anew is to lose what is there."""
    before = run(tmp_path, Ct(batch_size=8), steps=4).sha256
    state = tmp_path / "run.state"
    whole = state.read_bytes()
    damaged = r"run\.state: cannot be read \(.*\); search the checkpoints, or train again"
    for content in (b"", whole[: len(whole) // 2], b"step4"):
        state.write_bytes(content)
        with pytest.raises(TrainingError, match=damaged):
            run(tmp_path, Ct(batch_size=8), steps=8, resume=True)
    state.unlink()
    with pytest.raises(TrainingError, match=r"run\.state is missing, so the training cannot be resumed"):
        run(tmp_path, Ct(batch_size=8), steps=8, resume=True)
    assert Trajectory.open(tmp_path / "run.trajectory").sha256 == before


@pytest.mark.parametrize("keeps_start", [False, True])
def test_a_training_that_ends_while_its_first_state_is_saved_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keeps_start: bool
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, torch, "save", 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, EDM, keeps_start=keeps_start)
    assert (tmp_path / "run.trajectory").exists()
    trajectory = run(tmp_path, EDM, keeps_start=keeps_start, resume=True)
    assert trajectory.steps == (0, 4, 8, 12, 16, 20)[not keeps_start :]


def test_a_training_is_not_resumed_without_checkpoints_that_its_state_follows(tmp_path: Path) -> None:
    out = tmp_path / "run.trajectory"
    run(tmp_path, EDM, steps=4)
    shutil.copytree(out, tmp_path / "older.trajectory")
    run(tmp_path, EDM, steps=9, resume=True)
    for older in (True, False):
        shutil.rmtree(out)
        if older:
            shutil.copytree(tmp_path / "older.trajectory", out)
        with pytest.raises(TrainingError, match=r"run\.trajectory lacks checkpoints up to step 8: restore it, or"):
            run(tmp_path, EDM, resume=True)
        assert out.exists() == older


@pytest.mark.usefixtures("often_saved")
def test_a_disk_that_is_full_is_one_line_and_the_training_goes_on_from_the_state_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, EDM, steps=4)
    with monkeypatch.context() as patch:
        interrupt(patch, os, "fsync", 7, OSError(28, "full"))
        with pytest.raises(LcscError, match="full"):
            run(tmp_path, EDM, steps=12, resume=True)
    assert run(tmp_path, EDM, steps=12, resume=True).steps == (4, 8, 12)


def test_a_loss_that_is_not_finite_stops_with_its_step(tmp_path: Path) -> None:
    broken = watched(Edm, after=lambda batch, loss: loss * (math.inf if batch.step == 10 else 1))
    with pytest.raises(TrainingError, match="the loss of step 11 is inf"):
        run(tmp_path, broken)
    trajectory = Trajectory.open(tmp_path / "run.trajectory")
    assert trajectory.steps == (4, 8)
    assert all(torch.isfinite(tensor).all() for tensor in trajectory.checkpoint(1).values())


def test_the_target_follows_at_its_rate(tmp_path: Path) -> None:
    class Slow(Ct):
        def target_rate(self, step: int, steps: int) -> float:
            return 0.75

    seen: list[list[Tensor]] = []

    def look(batch: Batch) -> None:
        seen.append([network.state_dict()["first.weight"].clone() for network in (batch.target, batch.network)])

    run(tmp_path, watched(Slow, look))
    assert torch.equal(*seen[0])
    for (before, _), (after, student) in itertools.pairwise(seen):
        torch.testing.assert_close(after, 0.75 * before + 0.25 * student)
    assert not torch.equal(*seen[-1])


def test_images_that_are_bytes_train_as_floats_do(tmp_path: Path) -> None:
    images = torch.randint(256, (64, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    floats = images.float() / 127.5 - 1
    assert run(tmp_path / "a", EDM, images=images).sha256 == run(tmp_path / "b", EDM, images=floats).sha256
