"""Is what is handed out better than what the user had? Five small models, each searched on eight divisions of its data.

    python benchmarks/resplits.py [--quick] [--splits 8]

* ``classifier``: digits, two layers, trained on 900
* ``convolutions``: digits, trained on 300; its score has no gradient
* ``regression``: scikit-learn's Friedman 1 with noise, three layers, trained on 600
* ``language model``: the next character of lines of Python's help, a GRU, trained on 1,500 lines
* ``autoencoder``: digits through 12 numbers, trained on 900

Each is trained once with Adam at a constant learning rate, a checkpoint at each thirtieth of the way. The items that it
was not trained on are divided at random into three equal parts: one is searched, one chooses the answer, one is held
out; ``--splits`` times. ``lcsc_opt.search`` runs with its defaults. What is printed is the loss on the held-out part in
percent of that of the last checkpoint: of what the search found, of EMA*, and of the answer. The models were fixed
before any answer was looked at. Without ``--quick``, the table is written to ``results/resplits.md``.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import sys
from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import RESULTS, machine, markdown, parse
from sklearn.datasets import load_digits, make_friedman1
from torch import Tensor, nn

import lcsc_opt
from lcsc_opt.base.records import HELD_OUT, Candidate
from lcsc_opt.coefficients.profiles import last_alone

CHECKPOINTS = 30
PARTS = ("search", "selection", "held-out")
LINE = 64  # characters
WAYS = ("found", "EMA*", "answer")
Data = tuple[Tensor, Tensor]  # inputs and targets, by item


@dataclasses.dataclass(frozen=True)
class Model:
    """What is trained and searched.

    Attributes:
        data: all items, in an order that has no meaning.
        trained_on: the first so many of them.
        build: the network.
        losses: network, inputs and targets → the loss of each item.
        steps, rate, batch: of the training.
        has_gradient: whether its score has one.
    """

    data: Callable[[], Data]
    trained_on: int
    build: Callable[[], nn.Module]
    losses: Callable[[nn.Module, Tensor, Tensor], Tensor]
    steps: int = 750
    rate: float = 1e-2
    batch: int = 30
    has_gradient: bool = True


class Characters(nn.Module):
    """``[N, T]`` characters → logits ``[N, T, 128]`` of the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, 32)
        self.recurrent = nn.GRU(32, 64, batch_first=True)
        self.output = nn.Linear(64, 128)

    def forward(self, characters: Tensor) -> Tensor:
        """Each is predicted from those before it."""
        hidden, _ = self.recurrent(self.embedding(characters))
        logits: Tensor = self.output(hidden)
        return logits


def digits() -> Data:
    """Images ``[N, 1, 8, 8]`` and their classes."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.images))  # neighbours are of one writer
    images = torch.tensor(data.images[order], dtype=torch.float32)[:, None] / 16
    return images, torch.tensor(data.target[order])


def friedman() -> Data:
    """Ten numbers, of which five count, and a noisy function of them."""
    inputs, targets = make_friedman1(1500, noise=1.0, random_state=0)
    return torch.tensor(inputs, dtype=torch.float32), torch.tensor(targets, dtype=torch.float32)


def lines() -> Data:
    """``[N, 64]`` characters of lines, and the same: what follows is in the line itself."""
    texts = sorted({line.strip() for topic in topics.values() for line in topic.splitlines() if line.isascii()})
    long = [line[:LINE] for line in texts if len(line) >= LINE]
    order = np.random.default_rng(0).permutation(len(long))[:2400]
    characters = torch.tensor([list(long[index].encode()) for index in order])
    return characters, characters


def cross_entropy(net: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Of each image."""
    return F.cross_entropy(net(images), classes, reduction="none")


def squared_error(net: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Of each number."""
    errors: Tensor = net(inputs)[:, 0] - targets
    return errors**2


def next_character(net: nn.Module, lines: Tensor, _: Tensor) -> Tensor:
    """The mean cross-entropy of each line."""
    logits = net(lines[:, :-1])
    return F.cross_entropy(logits.transpose(1, 2), lines[:, 1:], reduction="none").mean(dim=1)


def reconstruction(net: nn.Module, images: Tensor, _: Tensor) -> Tensor:
    """The squared error of each image."""
    flat = images.flatten(1)
    errors: Tensor = (net(flat) - flat) ** 2
    return errors.mean(dim=1)


def layers(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    modules: list[nn.Module] = [nn.Flatten()]
    for width, out in itertools.pairwise(widths):
        modules += [nn.Linear(width, out), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def convolutions() -> nn.Sequential:
    """Two of them, and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )


MODELS = {
    "classifier": Model(digits, 900, lambda: layers(64, 64, 10), cross_entropy),
    "convolutions": Model(digits, 300, convolutions, cross_entropy, rate=5e-3, has_gradient=False),
    "regression": Model(friedman, 600, lambda: layers(10, 64, 64, 1), squared_error, steps=1500),
    "language model": Model(lines, 1500, Characters, next_character, steps=600, rate=5e-3),
    "autoencoder": Model(digits, 900, lambda: layers(64, 64, 12, 64, 64), reconstruction, steps=1500, rate=3e-3),
}


def train(model: Model, data: Data) -> dict[int, dict[str, Tensor]]:
    """Step → weights."""
    torch.manual_seed(0)
    net = model.build()
    optimizer = torch.optim.Adam(net.parameters(), model.rate)
    checkpoints = {}
    for step in range(1, model.steps + 1):
        items = torch.randint(model.trained_on, (model.batch,))
        optimizer.zero_grad()
        model.losses(net, *(column[items] for column in data)).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % (model.steps // CHECKPOINTS) == 0:
            checkpoints[step] = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    return checkpoints


def changes(model: Model, data: Data, checkpoints: dict[int, dict[str, Tensor]], split: int) -> dict[str, float]:
    """Held-out losses of one division, relative to that of the last checkpoint."""
    count = len(data[0])
    order = np.random.default_rng([split]).permutation(np.arange(model.trained_on, count))
    items = dict(zip(PARTS, np.array_split(order, len(PARTS)), strict=True))

    def score(net: nn.Module, draw: Any) -> Tensor:
        losses = model.losses(net, *(column[items[draw.group]] for column in data))
        return losses if model.has_gradient else losses.detach()

    result = lcsc_opt.search(checkpoints, build=model.build, score=score, storage=None)
    grid, search = result.studies
    found = {"found": search.coefficients, "EMA*": grid.coefficients, "answer": result.coefficients}

    def held_out(coefficients: Any) -> float:
        return search.objective.evaluate(Candidate(coefficients, noise=HELD_OUT)).loss

    last = held_out(last_alone(CHECKPOINTS))
    return {way: held_out(coefficients) / last - 1 for way, coefficients in found.items()}


def row(name: str, splits: list[dict[str, float]]) -> list[str]:
    """Mean and worst of each way."""
    cells = [name]
    for way in WAYS:
        values = [split[way] for split in splits]
        cells.append(f"{100 * statistics.fmean(values):+.1f} %, {100 * max(values):+.1f} %")
    return cells


def main() -> None:
    """Train, search each division, and write the table."""
    arguments = parse(__doc__, small={"splits": 1}, splits=8)
    table = [["mean, worst against the last checkpoint", "found", "EMA\\*", "the answer"]]
    everything = []
    for name, model in MODELS.items():
        data = model.data()
        checkpoints = train(model, data)
        splits = []
        for split in range(arguments.splits):
            splits.append(changes(model, data, checkpoints, split))
            print(name, split, *(f"{way} {splits[-1][way]:+.1%}" for way in WAYS), file=sys.stderr, flush=True)
        everything += splits
        table.append(row(name, splits))
    table.append(row("all", everything))
    lines = [
        "# Five scores, divided anew",
        "",
        machine(),
        "",
        f"`benchmarks/resplits.py`, {arguments.splits} divisions of each model's data. Held-out losses.",
        "",
        *markdown(table),
    ]
    print(*lines, sep="\n")
    if not arguments.quick:
        (RESULTS / "resplits.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
