"""Other people's training loops, interrupted and continued: the trajectory is that of a training that never was."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.trajectory import Trajectory, TrajectoryWriter
from lcsc_opt.trajectory.callbacks import TrajectorySaver, lightning_callback

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
STEPS = 10
SAVED_AT = 4
DIES_AT = 7


class DiedError(RuntimeError):
    """What a preemption does."""


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.ones(4 * STEPS, 3)), batch_size=4)


def lightning_module(dies_at: int | None = None) -> Any:
    pl = pytest.importorskip("pytorch_lightning")

    class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def training_step(self, batch: Any, _index: int) -> Tensor:
            if self.global_step == dies_at:
                raise DiedError
            return self.network(batch[0]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), 1e-2)

    return Module()


def lightning(folder: Path, dies_at: int | None, goes_on: bool, **options: Any) -> None:
    pl = pytest.importorskip("pytorch_lightning")
    from pytorch_lightning.callbacks import ModelCheckpoint

    saving = lightning_callback(folder / "run.trajectory", every=2, weights=lambda module: module.network, **options)
    keeping = ModelCheckpoint(folder / "kept", every_n_train_steps=SAVED_AT, save_top_k=-1, filename="{step}")
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_steps=STEPS, callbacks=[saving, keeping], accelerator="cpu", **quiet)
    checkpoint = folder / "kept" / f"step={SAVED_AT}.ckpt"
    trainer.fit(lightning_module(dies_at), loader(), ckpt_path=checkpoint if goes_on else None)


def accelerate(folder: Path, dies_at: int | None, goes_on: bool, **options: Any) -> None:
    from accelerate import Accelerator  # type: ignore[import-untyped]

    accelerator = Accelerator(cpu=True)
    model = network()
    model, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters(), 1e-2))
    saver = TrajectorySaver(folder / "run.trajectory", every=2, accelerator=accelerator, **options)
    first = 1
    if goes_on:
        accelerator.load_state(str(folder / "kept"))
        first = SAVED_AT + 1
    for step in range(first, STEPS + 1):
        if step - 1 == dies_at:
            saver.close()
            raise DiedError
        accelerator.backward(model(torch.ones(4, 3)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        saver.step(step, model)
        if step == SAVED_AT:
            accelerator.save_state(str(folder / "kept"))
    saver.close()
    accelerator.end_training()


Train = Callable[..., None]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("train", [lightning, accelerate])
def test_a_training_that_dies_and_goes_on_leaves_the_rows_of_one_that_did_not(
    tmp_path: Path, train: Train, capfd: pytest.CaptureFixture[str]
) -> None:
    uninterrupted = tmp_path / "uninterrupted"
    died = tmp_path / "died"
    train(uninterrupted, None, False)
    with pytest.raises(DiedError):
        train(died, DIES_AT, False)
    assert Trajectory.open(died / "run.trajectory").steps == (2, 4, 6), "row 6 is later than the checkpoint of step 4"
    train(died, None, True)
    assert "goes back to step 4, 1 later checkpoints are dropped" in capfd.readouterr().err
    expected = Trajectory.open(uninterrupted / "run.trajectory")
    continued = Trajectory.open(died / "run.trajectory")
    assert continued.steps == (2, 4, 6, 8, 10)
    assert continued.sha256 == expected.sha256
    with pytest.raises(TrajectoryError, match=r'holds 5 checkpoints of another training.* resume="restart"'):
        train(died, None, False)
    with pytest.raises(DiedError):
        train(died, SAVED_AT - 1, False, resume="restart")  # before the training's first checkpoint
    assert Trajectory.open(died / "run.trajectory").steps == (2,)
    train(died, None, False, resume="restart")
    assert Trajectory.open(died / "run.trajectory").sha256 == expected.sha256


def test_a_tuning_that_restarts_keeps_the_checkpoint_of_its_start(tmp_path: Path) -> None:
    for _ in range(2):
        saver = TrajectorySaver(tmp_path / "t", every=1, resume="restart")
        saver.begin(0)
        saver.keep_start(network())
        saver.step(1, network())
        saver.close()
    assert Trajectory.open(tmp_path / "t").steps == (0, 1)
    with pytest.raises(TrajectoryError, match="holds 2 checkpoints of another training"):
        TrajectorySaver(tmp_path / "t", every=1).begin(0)


@pytest.mark.parametrize("main", [True, False])
@pytest.mark.parametrize("with_accelerate", [False, True])
def test_a_checkpoint_of_the_training_is_never_newer_than_the_trajectory(
    tmp_path: Path, main: bool, with_accelerate: bool
) -> None:
    accelerator = None
    if with_accelerate:
        accelerator = Mock(is_main_process=main, unwrap_model=lambda model: model)
    saver = TrajectorySaver(tmp_path / "run.trajectory", every=1, accelerator=accelerator)
    saver.saves = main
    saver.load_state_dict({"step": 3})
    saver.step(4, network())
    assert saver.state_dict() == {"step": 4}
    assert not main or Trajectory.open(tmp_path / "run.trajectory").steps == (4,)
    saver.close()
    assert (tmp_path / "run.trajectory").exists() == main, "other processes write nothing"


@pytest.mark.filterwarnings("ignore")
def test_every_example_of_a_callback_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = network()
    names: dict[str, Any] = {
        "module": lightning_module(),
        "loader": loader(),
        "network": model,
        "optimizer": torch.optim.SGD(model.parameters(), 0.1),
        "steps": 200,
    }
    of_callbacks = PAGE.read_text().partition("\n## Your own training\n")[2]
    blocks = re.findall(r"^```python\n(.*?)^```$", of_callbacks, re.M | re.S)
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    rows = {path.stem: Trajectory.open(path).steps for path in tmp_path.glob("*.trajectory")}
    eight = (2, 4, 6, 8)
    assert rows == {"lightning": eight, "accelerate": (*eight, 10)}


@pytest.mark.parametrize(
    ("stride", "every", "saved"),
    [(48, 1000, (1008, 2016, 3024)), (2, 15, (16, 30, 46)), (1, 10, (10, 20, 30)), (7, 5, (14, 21, 28))],
    ids=["images", "two optimizers", "steps", "longer than an interval"],
)
def test_a_checkpoint_is_saved_once_an_interval(tmp_path, stride, every, saved):
    saver = TrajectorySaver(tmp_path / "t", every=every)
    for step in range(stride, saved[-1] + 1, stride):
        saver.step(step, {"w": torch.full((2,), float(step))})
    saver.close()
    assert Trajectory.open(tmp_path / "t").steps == saved
    with TrajectoryWriter(tmp_path / "t", every=every, resume=saved[1]) as writer:
        steps = range(saved[1] + stride, saved[-1] + 1, stride)
        assert [step for step in steps if writer.append(step, {"w": torch.full((2,), float(step))})] == [saved[-1]]
