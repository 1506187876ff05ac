"""A training on several processes that find each other as those of ``torchrun`` do; they die where they are told to."""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import sys
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lcsc_opt.trajectory.callbacks import TrajectorySaver, lightning_callback, transformers_callback
from tests.processes import SECONDS

STEPS, SAVED_AT, DIES_AT = 10, 4, 7
DIED = 3  # the exit status of a process that was told to die
KEPT: list[object] = []  # until the process ends: gloo's destructors may wait for ever for a process that has ended


class Scored(nn.Module):
    """As the Trainer of transformers wants a model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """The loss of inputs ``[B, 3]``."""
        return {"loss": (self.network(inputs) - (0 if labels is None else labels)).square().mean()}


def accelerate(folder: Path, *, dies: bool, resume: bool) -> None:
    """A loop of one's own."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = Scored()
    model, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters(), 1e-2))
    KEPT.extend([accelerator, model, optimizer])
    saver = TrajectorySaver(folder / "run.trajectory", every=2, accelerator=accelerator)
    if resume:
        accelerator.load_state(str(folder / "kept"))
    for step in range(SAVED_AT + 1 if resume else 1, STEPS + 1):
        if dies and step > DIES_AT:
            sys.exit(DIED)
        inputs = torch.full((4, 3), 1.0 + accelerator.process_index + step / STEPS)
        accelerator.backward(model(inputs)["loss"])
        optimizer.step()
        optimizer.zero_grad()
        saver.step(step, model)
        if step == SAVED_AT:
            accelerator.save_state(str(folder / "kept"))
    saver.close()
    accelerator.end_training()


def transformers(folder: Path, *, dies: bool, resume: bool) -> None:
    """The Trainer."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Dying(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if dies and state.global_step == DIES_AT:
                sys.exit(DIED)

    arguments = TrainingArguments(
        str(folder / "kept"), max_steps=STEPS, save_steps=SAVED_AT, learning_rate=1e-2, use_cpu=True, report_to=[],
        disable_tqdm=True, per_device_train_batch_size=4,
    )  # fmt: skip
    data: Any = [{"inputs": torch.full((3,), index / 40), "labels": torch.zeros(1)} for index in range(8 * STEPS)]
    saving = transformers_callback(folder / "run.trajectory", every=2)
    trainer = Trainer(model=Scored(), args=arguments, train_dataset=data, callbacks=[saving, Dying()])
    KEPT.append(trainer)
    trainer.train(resume_from_checkpoint=str(folder / "kept" / f"checkpoint-{SAVED_AT}") if resume else None)


def lightning(folder: Path, *, dies: bool, resume: bool) -> None:
    """Its Trainer."""
    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import ModelCheckpoint
    from torch.utils.data import DataLoader, TensorDataset

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.scored = Scored()

        def training_step(self, batch: Any, _index: int) -> Tensor:
            if dies and self.global_step == DIES_AT:
                sys.exit(DIED)
            return self.scored(batch[0] * (1 + self.global_rank))["loss"]

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), 1e-2)

    data = TensorDataset(torch.ones(8 * STEPS, 3))  # where it goes on, Lightning begins its epoch anew
    saving = lightning_callback(folder / "run.trajectory", every=2, weights=lambda module: module.scored)
    keeping = ModelCheckpoint(folder / "kept", every_n_train_steps=SAVED_AT, save_top_k=-1, filename="{step}")
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        max_steps=STEPS, callbacks=[saving, keeping], accelerator="cpu", devices=2, strategy="ddp", **quiet
    )
    KEPT.append(trainer)
    kept = folder / "kept" / f"step={SAVED_AT}.ckpt"
    trainer.fit(Module(), DataLoader(data, batch_size=4), ckpt_path=kept if resume else None)


KINDS = {"accelerate": accelerate, "transformers": transformers, "lightning": lightning}


def serve(asked: Connection) -> None:
    """Import what trains once; then, for each training that is asked for, fork its processes, and tell how they ended.

    A training is its kind, its folder, the environment of each process, and whether it goes on.
    """
    warnings.simplefilter("ignore")
    for library in ("accelerate", "transformers.trainer", "pytorch_lightning"):
        if importlib.util.find_spec(library.split(".", maxsplit=1)[0]) is not None:
            importlib.import_module(library)
    forked = multiprocessing.get_context("fork")
    with contextlib.suppress(EOFError):
        while True:
            kind, folder, environments, resume = asked.recv()
            processes = [
                forked.Process(target=rank, args=(kind, folder, environment), kwargs={"resume": resume})
                for environment in environments
            ]
            for process in processes:
                process.start()
            for process in processes:
                process.join(SECONDS)
            asked.send([process.exitcode for process in processes])
            for process in processes:
                process.kill()


def rank(kind: str, folder: Path, environment: dict[str, str], *, resume: bool) -> None:
    """One process of a training; what it says goes to a file of its own."""
    os.environ.update(environment)
    said = folder.parent / f"said{environment['RANK']}"
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    KINDS[kind](folder, dies=not resume, resume=resume)
