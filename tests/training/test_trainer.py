"""The loop of all recipes: what it leaves, how it goes on, what stops it."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from lcsc_opt.base.errors import TrainingError
from lcsc_opt.training.recipes import Batch
from lcsc_opt.training.recipes.ct import Ct
from lcsc_opt.training.recipes.edm import Edm
from lcsc_opt.training.trainer import Job, new_accelerator, train
from lcsc_opt.trajectory import Trajectory
from tests.training.toy_network import IMAGES, ToyNetwork

STEPS, EVERY = 20, 4


class StopError(Exception):
    """Stands for whatever ends a process."""


class StoppingEdm(Edm):
    """Ends before step ``at``."""

    at: int = 0

    def loss(self, batch: Batch) -> Tensor:
        if batch.step == self.at:
            raise StopError
        return super().loss(batch)


class StoppingCt(Ct):
    """The same, with a target that follows."""

    at: int = 0

    def loss(self, batch: Batch) -> Tensor:
        if batch.step == self.at:
            raise StopError
        return super().loss(batch)


class CtrlC(Edm):
    """Its user ends it in a step, with so many signals."""

    at: int = 0
    signals: int = 1

    def loss(self, batch: Batch) -> Tensor:
        if batch.step == self.at:
            for _ in range(self.signals):
                signal.raise_signal(signal.SIGINT)
        return super().loss(batch)


class BrokenEdm(Edm):
    """Its loss is not finite at step 11."""

    value: ClassVar[float] = math.nan

    def loss(self, batch: Batch) -> Tensor:
        return super().loss(batch) * (self.value if batch.step == 10 else 1)


@pytest.fixture(autouse=True)
def new_state() -> Iterator[None]:
    """Accelerate keeps one for a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def job(folder: Path, recipe: Any, **changes: Any) -> Job:
    torch.manual_seed(3)
    usual: dict[str, Any] = {
        "recipe": recipe,
        "network": ToyNetwork(),
        "images": IMAGES,
        "out": folder / "run.trajectory",
        "steps": STEPS,
        "checkpoint_every": EVERY,
    }
    return Job(**{**usual, **changes})


def run(given: Job, *, resume: bool = False) -> None:
    train(given, accelerator=new_accelerator(given.precision), resume=resume)


def curve(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "run.jsonl").read_text().splitlines()]
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)
    return [(line["step"], line["loss"]) for line in lines]


def test_a_training_leaves_checkpoints_and_a_curve(tmp_path: Path) -> None:
    given = job(tmp_path, Edm(batch_size=8))
    before = {name: tensor.clone() for name, tensor in given.network.state_dict().items()}
    run(given)
    trajectory = Trajectory.open(given.out)
    assert trajectory.steps == (4, 8, 12, 16, 20)
    assert [step for step, _ in curve(tmp_path)] == [4, 8, 12, 16, 20]
    last = trajectory.merge([0, 0, 0, 0, 1.0])
    assert set(last) == set(before)
    assert not torch.equal(last["first.weight"], before["first.weight"])


def test_the_curve_is_the_mean_loss_since_the_line_before(tmp_path: Path) -> None:
    losses: list[float] = []

    class Recording(Edm):
        def loss(self, batch: Batch) -> Tensor:
            loss = super().loss(batch)
            losses.append(float(loss.detach()))
            return loss

    run(job(tmp_path, Recording(batch_size=8)))
    expected = [sum(losses[i : i + EVERY]) / EVERY for i in range(0, STEPS, EVERY)]
    assert [loss for _, loss in curve(tmp_path)] == pytest.approx(expected)


@pytest.mark.parametrize("recipe", [StoppingEdm, StoppingCt])
@pytest.mark.parametrize(("at", "state_seconds"), [(14, 0.0), (14, 1e9), (2, 0.0), (16, 0.0)])
def test_a_training_that_was_interrupted_goes_on_as_if_it_had_not_been(
    tmp_path: Path, recipe: Any, at: int, state_seconds: float
) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    for folder in (whole, parted):
        folder.mkdir()
    run(job(whole, recipe(batch_size=8, at=-1)))
    with pytest.raises(StopError):
        run(job(parted, recipe(batch_size=8, at=at), state_seconds=state_seconds))
    run(job(parted, recipe(batch_size=8, at=-1), state_seconds=state_seconds), resume=True)
    first, second = (Trajectory.open(folder / "run.trajectory") for folder in (whole, parted))
    assert first.steps == second.steps
    for k in range(len(first.steps)):
        one_hot = [float(k == i) for i in range(len(first.steps))]
        for name, tensor in first.merge(one_hot).items():
            assert torch.equal(tensor, second.merge(one_hot)[name])
    assert [step for step, _ in curve(parted)] == [4, 8, 12, 16, 20]
    assert curve(whole) == curve(parted)


@pytest.mark.parametrize(("at", "state_seconds"), [(14, 0.0), (2, 1e9)])
def test_a_tuning_keeps_what_it_began_with_also_after_an_interruption(
    tmp_path: Path, at: int, state_seconds: float
) -> None:
    given = job(tmp_path, StoppingEdm(batch_size=8, at=at), keeps_start=True, state_seconds=state_seconds)
    start = {name: tensor.clone() for name, tensor in given.network.state_dict().items()}
    with pytest.raises(StopError):
        run(given)
    run(job(tmp_path, StoppingEdm(batch_size=8, at=-1), keeps_start=True), resume=True)
    trajectory = Trajectory.open(given.out)
    assert trajectory.steps == (0, 4, 8, 12, 16, 20)
    assert all(torch.equal(tensor, start[name]) for name, tensor in trajectory.checkpoint(0).items())


def test_sheets_of_samples_change_nothing_else(tmp_path: Path) -> None:
    from PIL import Image

    for name, every in (("plain", None), ("sampled", 8)):
        (tmp_path / name).mkdir()
        run(job(tmp_path / name, Edm(batch_size=8), samples_every=every))
    plain, sampled = (Trajectory.open(tmp_path / name / "run.trajectory") for name in ("plain", "sampled"))
    assert all(torch.equal(tensor, sampled.checkpoint(4)[name]) for name, tensor in plain.checkpoint(4).items())
    assert not (tmp_path / "plain" / "run.samples").exists()
    sheets = sorted((tmp_path / "sampled" / "run.samples").iterdir())
    assert [sheet.name for sheet in sheets] == ["step00000008.png", "step00000016.png"]
    with Image.open(sheets[0]) as first, Image.open(sheets[1]) as second:
        assert first.size == (8 * 50 - 2, 4 * 50 - 2)  # 32 images of 4×4, enlarged to 48
        assert first.tobytes() != second.tobytes()


def test_a_finished_training_goes_on_to_more_steps(tmp_path: Path) -> None:
    run(job(tmp_path, Edm(batch_size=8), steps=8))
    run(job(tmp_path, Edm(batch_size=8)), resume=True)
    assert Trajectory.open(tmp_path / "run.trajectory").steps == (4, 8, 12, 16, 20)
    assert [step for step, _ in curve(tmp_path)] == [4, 8, 12, 16, 20]


def test_another_number_of_threads_is_said_where_it_changes_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(job(tmp_path, Edm(batch_size=8), steps=8))
    run(job(tmp_path, Edm(batch_size=8), steps=12), resume=True)
    assert "threads" not in capsys.readouterr().err
    torch.set_num_threads(2)
    try:
        run(job(tmp_path, Edm(batch_size=8)), resume=True)
    finally:
        torch.set_num_threads(1)
    assert "1 threads trained it, and 2 go on" in (said := capsys.readouterr().err)
    assert "OMP_NUM_THREADS=1 keeps them" in said


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """These tests may run in the background, where Ctrl-C is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
@pytest.mark.parametrize("at", [0, 10, 11, STEPS - 1])
def test_ctrl_c_loses_no_step(tmp_path: Path, capsys: pytest.CaptureFixture[str], at: int) -> None:
    run(job(tmp_path / "whole", Edm(batch_size=8)))
    ended = job(tmp_path / "ended", CtrlC(batch_size=8, at=at))
    with pytest.raises(KeyboardInterrupt):
        run(ended)
    assert f"stopped after step {at + 1}; with --resume the same command goes on from there" in capsys.readouterr().err
    run(job(tmp_path / "ended", CtrlC(batch_size=8, at=at, signals=0)), resume=True)
    trajectories = [Trajectory.open(tmp_path / name / "run.trajectory") for name in ("ended", "whole")]
    assert trajectories[0].sha256 == trajectories[1].sha256
    assert curve(tmp_path / "ended") == curve(tmp_path / "whole")


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_twice_does_not_wait_for_the_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(job(tmp_path, CtrlC(batch_size=8, at=10, signals=2), state_seconds=0.0))
    said = capsys.readouterr().err
    assert "run.trajectory: stopped after step 10; with --resume the same command goes on from step 8" in said
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_its_state_the_checkpoints_of_a_training_are_kept(tmp_path: Path) -> None:
    """A user removes it for its size; to train anew is to lose what is there."""
    run(job(tmp_path, Edm()))
    shutil.rmtree(tmp_path / "run.state")
    before = Trajectory.open(tmp_path / "run.trajectory").sha256
    with pytest.raises(TrainingError, match=r"run\.state: is not there, and without it the training of 20 steps"):
        run(job(tmp_path, Edm(), steps=2 * STEPS), resume=True)
    assert Trajectory.open(tmp_path / "run.trajectory").sha256 == before


def test_a_broken_state_is_said(tmp_path: Path) -> None:
    run(job(tmp_path, Edm(batch_size=8), steps=8))
    (tmp_path / "run.state" / "step8" / "optimizer.bin").unlink()
    with pytest.raises(TrainingError, match=r"run\.state: cannot be gone on from"):
        run(job(tmp_path, Edm(batch_size=8)), resume=True)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_with_its_step(
    tmp_path: Path, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BrokenEdm, "value", value)
    with pytest.raises(TrainingError, match=rf"the loss of step 11 is {value}: lower learning_rate"):
        run(job(tmp_path, BrokenEdm(batch_size=8)))
    trajectory = Trajectory.open(tmp_path / "run.trajectory")
    assert trajectory.steps == (4, 8)
    assert all(torch.isfinite(tensor).all() for tensor in trajectory.merge([0, 1.0]).values())


def test_bf16_halves_the_arithmetic_and_not_the_weights(tmp_path: Path) -> None:
    weights = {}
    for precision in ("fp32", "bf16"):
        folder = tmp_path / precision
        folder.mkdir()
        AcceleratorState._reset_state(reset_partial_state=True)
        run(job(folder, Edm(batch_size=8), precision=precision))
        weights[precision] = Trajectory.open(folder / "run.trajectory").merge([0, 0, 0, 0, 1.0])["first.weight"]
    assert weights["bf16"].dtype == torch.float32
    difference = float((weights["bf16"] - weights["fp32"]).abs().max())
    assert 0 < difference < 0.02


def test_the_target_follows_at_its_rate(tmp_path: Path) -> None:
    class Slow(Ct):
        def target_rate(self, step: int, steps: int) -> float:
            return 0.75

    seen: list[tuple[Tensor, Tensor]] = []

    class Recording(Slow):
        def loss(self, batch: Batch) -> Tensor:
            seen.append((weight(batch.target), weight(batch.network)))
            return super().loss(batch)

    def weight(network: nn.Module) -> Tensor:
        return network.state_dict()["first.weight"].clone()

    run(job(tmp_path, Recording(batch_size=8)))
    assert torch.equal(*seen[0])
    for (before, _), (after, student) in itertools.pairwise(seen):
        torch.testing.assert_close(after, 0.75 * before + 0.25 * student)
    assert not torch.equal(*seen[-1])


def test_images_that_are_bytes_train_as_floats_do(tmp_path: Path) -> None:
    images = torch.randint(256, (64, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    last = []
    for name, given in (("bytes", images), ("floats", images.float() / 127.5 - 1)):
        (tmp_path / name).mkdir()
        run(job(tmp_path / name, Edm(batch_size=8), images=given))
        last.append(Trajectory.open(tmp_path / name / "run.trajectory").merge([0, 0, 0, 0, 1.0])["first.weight"])
    assert torch.equal(*last)
