"""Weights that a network has under two names: one parameter is merged with one row, and exported as it was scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import lcsc_opt
from lcsc_opt.base.paths import BuildContext
from lcsc_opt.base.records import Candidate
from lcsc_opt.base.study_spec import ObjectiveSpec
from lcsc_opt.objective.loading import load_objective
from lcsc_opt.trajectory import pack
from tests.commands import Typed
from tests.trajectory.trajectory_examples import same_bits

OWN = "tests.objectives.test_tied_weights"
STEPS = (10, 20, 30, 40)
TOKENS = torch.tensor([[1, 4, 2, 7, 3, 0, 5, 6], [2, 2, 1, 0, 7, 6, 3, 5]])


class TinyLanguageModel(nn.Module):
    """Like GPT-2: the head is the embedding, and a state dict names both."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(8, 6)
        self.wpe = nn.Embedding(8, 6)
        self.norm = nn.LayerNorm(6)
        self.mixing = nn.Linear(6, 6)
        self.lm_head = nn.Linear(6, 8, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        hidden = hidden + torch.tanh(self.mixing(self.norm(hidden)).cumsum(1))
        logits: Tensor = self.lm_head(hidden)
        return logits


class TiedLinear(nn.Module):
    """Two layers with one matrix, each with a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, tokens: Tensor) -> Tensor:
        inputs = F.one_hot(tokens, 8).float().flatten(0, 1)
        hidden = torch.tanh(self.first(inputs))
        logits: Tensor = self.second(hidden).view(*tokens.shape, 8)
        return logits


def loss(model: nn.Module) -> Tensor:
    logits = model(TOKENS)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())


TIED: dict[type[nn.Module], tuple[str, str]] = {
    TinyLanguageModel: ("lm_head.weight", "wte.weight"),
    TiedLinear: ("first.weight", "second.weight"),
}


def trained(network: type[nn.Module]) -> dict[int, dict[str, Tensor]]:
    """State dicts of a short training: step → a copy, in which the two names are two tensors, as in safetensors."""
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    states = {}
    for step in range(1, STEPS[-1] + 1):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
        if step in STEPS:
            states[step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return states


def write(folder: Path, network: type[nn.Module], kind: str) -> None:
    """Write the checkpoints: in files of torch the two names share a storage, in those of safetensors they do not."""
    for step, state in trained(network).items():
        if kind == "safetensors":
            save_file(state, folder / f"model{step}.safetensors")
        else:
            first, second = TIED[network]
            torch.save({**state, second: state[first]}, folder / f"model{step}.pt")


@pytest.mark.parametrize(("network", "kind"), [(TinyLanguageModel, "safetensors"), (TiedLinear, "pt")])
def test_what_is_scored_is_exported(workplace: Path, typed: Typed, network: type[nn.Module], kind: str) -> None:
    write(workplace, network, kind)
    result = lcsc_opt.search(
        f"model*.{kind}", build=network, score=loss, rows="layers", optimizers="LCSCGradient", budget=12, name="tied"
    )
    typed("export", "tied/LCSCGradient/0", "-o", "best.safetensors")
    exported = load_file("best.safetensors")
    first, second = TIED[network]
    assert same_bits({first: exported[first]}, {first: exported[second]})
    assert result.coefficients.ndim == 2
    for names in (list(exported), list(exported)[::-1]):  # whichever name is loaded last
        loaded = network()
        loaded.load_state_dict({name: exported[name] for name in names})
        assert loss(loaded.eval()).item() == pytest.approx(result.study.searched, rel=1e-5)


@pytest.mark.parametrize("network", list(TIED))
def test_the_gradient_reaches_the_row_of_both_names(folder: Path, network: type[nn.Module]) -> None:
    write(folder, network, "safetensors")
    settings = {"checkpoints": "*.safetensors", "model": f"{OWN}:{network.__name__}", "score": f"{OWN}:loss"}
    spec = ObjectiveSpec(file="score.py", settings={**settings, "device": "cpu"})
    objective: Any = load_objective(spec, BuildContext(folder))
    objective.merge_in_rows("layers")
    groups = objective.layer_groups
    first, second = TIED[network]
    row = groups.rows_of[first].first
    assert groups.rows_of[second].first == row
    middle = np.full((len(groups), len(STEPS)), 1 / len(STEPS))
    change = np.zeros_like(middle)
    change[row] = [-0.05, 0.0, 0.0, 0.05]
    gradient = objective.evaluate(Candidate(middle, gradient=True)).gradient
    ahead, behind = (objective.evaluate(Candidate(middle + sign * change)).loss for sign in (1, -1))
    assert (gradient * change).sum() == pytest.approx((ahead - behind) / 2, rel=0.05)
    assert abs(ahead - behind) > 1e-4


def test_only_weights_that_are_equal_in_all_checkpoints_are_one(folder: Path) -> None:
    for step in STEPS:
        weight = torch.full((3, 2), float(step))
        weights = {
            "a.weight": weight,
            "b.weight": weight.clone(),
            "b.flat": weight.flatten().clone(),
            "b.half": weight.half(),
            "c.weight": weight.clone() if step > STEPS[0] else -weight,
            "a.batches": torch.tensor(step),
            "b.batches": torch.tensor(step),
            "a.constant": torch.ones(2),
            "b.constant": torch.ones(2),
        }
        save_file(weights, folder / f"model{step}.safetensors")
    packed = pack(folder / "*.safetensors", folder / "run.trajectory")
    assert "b.batches" in packed.varying
    assert packed.tied == {"b.weight": "a.weight"}
    groups = packed.in_rows("layers").layer_groups
    assert groups is not None
    assert groups.names == ("a", "b", "c")
    assert groups.rows_of["b.weight"].first == 0
    assert groups.rows_of["b.batches"].first == 1
