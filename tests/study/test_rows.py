"""A study with a row of coefficients for each layer: searched, stored, continued, started at, exported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
from torch import Tensor, nn

import lcsc_opt
from lcsc_opt.database.arrays import coefficients_of
from lcsc_opt.experiment.result import Result
from tests.commands import Typed
from tests.model_studies import write_model_study

LAYERS = ("conv", "norm", "steps")  # "steps" is a counter, which no merge combines


@pytest.fixture
def study_file(workplace: Path) -> Path:
    return write_model_study(workplace, space={"rows": "layers"}, optimizers=["LCSC", "CMA"], held_out={"images": 20})


def asked(name: str) -> list[bytes]:
    study = optuna.load_study(study_name=name, storage="sqlite:///studies.db")
    return [coefficients_of(trial).tobytes() for trial in study.get_trials(deepcopy=False)]


def test_it_is_searched_and_continued_as_if_it_had_not_stopped(study_file: Path, typed: Typed) -> None:
    said = typed("run", str(study_file), "budget={evaluations: 8}").err
    assert "without a gradient, more rows do not help" in said
    before = {}
    for name in ("small/LCSC/0", "small/CMA/0"):
        study = lcsc_opt.load_study(name)
        assert study.layer_groups == dict.fromkeys(LAYERS, 1)
        assert study.coefficients.shape == (3, 5)
        np.testing.assert_allclose(study.coefficients.sum(axis=1), 1, rtol=0, atol=1e-12)
        assert study.held_out is not None
        before[name] = asked(name)
    typed("run", str(study_file), "budget={evaluations: 12}")
    for name, candidates in before.items():
        assert len(asked(name)) == 12
        assert asked(name)[:8] == candidates
    typed("run", str(study_file), "--optimizer", "LCSC", "name=whole", "budget={evaluations: 12}")
    assert asked("small/LCSC/0") == asked("whole/LCSC/0"), "CMA plans with its first budget"


class Net(nn.Module):
    """A convolution of each kind, and a normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3)
        self.up = nn.ConvTranspose2d(6, 3, 2)
        self.norm = nn.GroupNorm(3, 6)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.up(self.norm(self.conv(x)))
        return output


def distance(net: Net) -> Tensor:
    """To what a network of fixed random weights gives."""
    generator = torch.Generator().manual_seed(5)
    x, target = torch.randn(4, 2, 5, 5, generator=generator), torch.randn(4, 3, 4, 4, generator=generator)
    return (net(x) - target).square().mean()


def searched(storage: Path, *, stop_after: int | None = None) -> Result:
    def interrupt(_: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        if trial.number + 1 == stop_after:
            raise KeyboardInterrupt

    generator = torch.Generator().manual_seed(0)
    shapes = {name: weight.shape for name, weight in Net().state_dict().items()}
    checkpoints = {
        step: {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for step in (10, 20, 30)
    }
    return lcsc_opt.search(
        checkpoints,
        build=Net,
        score=distance,
        optimizers=["LCSCGradient"],
        rows="channels",
        budget=30,
        callbacks=[interrupt],
        storage=storage,
        name="channels",
    )


def test_a_search_of_channels_is_continued_as_if_it_had_not_stopped_though_its_steps_are_not_stored(
    tmp_path: Path,
) -> None:
    whole = searched(tmp_path / "whole.db")
    with pytest.raises(KeyboardInterrupt):
        searched(tmp_path / "parts.db", stop_after=11)
    parts = searched(tmp_path / "parts.db")
    trials = []
    for result in (whole, parts):
        study = optuna.load_study(study_name=result.study.name, storage=result.storage)
        trials.append([(trial.value, trial.user_attrs.get("gradient")) for trial in study.trials])
        kinds = [{"coefficients", "coefficients_sha256"} & trial.user_attrs.keys() for trial in study.trials]
        assert [kind == {"coefficients"} for kind in kinds] == ["unbiased" not in t.user_attrs for t in study.trials]
    assert len(trials[0]) == 30
    assert trials[0] == trials[1]
    assert parts.study.coefficients.shape == (6 + 6 + 3 + 3 + 6 + 6, 3)
    best = parts.study.merge()
    net = Net()
    net.load_state_dict(best)
    assert distance(net).item() == pytest.approx(parts.study.searched, rel=1e-5)
    assert parts.study.searched < 0.95, "the last checkpoint has 1.10"
