"""torch's distributed checkpoints by the recipe of its tutorial: two processes with FSDP, and an ``AppState``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tiny
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

PROCESSES = 2


class AppState(Stateful):
    """A model and its optimizer, as the tutorial has them."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.model = model
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """What is saved."""
        model, optimizer = get_state_dict(self.model, self.optimizer or [])
        return {"model": model, "optim": optimizer} if self.optimizer else {"model": model}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What was loaded."""
        set_state_dict(
            self.model,
            self.optimizer or [],
            model_state_dict=state_dict["model"],
            optim_state_dict=state_dict.get("optim", {}),
        )


def build() -> nn.Module:
    """A classifier of digits."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def train() -> None:
    """In two processes."""
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29571"}
    torch.multiprocessing.spawn(train_in_process, nprocs=PROCESSES)


def train_in_process(rank: int) -> None:
    """A checkpoint every 15 steps, half of it from each process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    model = build()
    fully_shard(model, mesh=init_device_mesh("cpu", (PROCESSES,)))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    images, labels = tiny.digits("train")
    for step in range(1, 301):
        indices = torch.randint(len(images), (60,))[rank::PROCESSES]
        optimizer.zero_grad()
        F.cross_entropy(model(images[indices]), labels[indices]).backward()
        optimizer.step()
        if step % 15 == 0:
            dcp.save({"app": AppState(model, optimizer)}, checkpoint_id=f"runs/step_{step}")
    dist.destroy_process_group()


def loss(model: nn.Module, draw: Any) -> Iterator[Tensor]:
    """The cross-entropy of each image."""
    for images, labels in tiny.batches(draw.group, draw):
        yield F.cross_entropy(model(images), labels, reduction="none")


@torch.no_grad()
def evaluate(path: str) -> list[float]:
    """The loss of what ``dcp.load`` reads in one process, or ``torch.load`` in a file."""
    model = build()
    if Path(path).is_dir():
        dcp.load({"app": AppState(model)}, checkpoint_id=path)
    else:
        model.load_state_dict(torch.load(path, weights_only=True))
    images, labels = tiny.digits("held-out")
    return [F.cross_entropy(model(images), labels).item()]


if __name__ == "__main__":
    tiny.main(train, evaluate)
