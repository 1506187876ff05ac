"""Averages are found by what they are, wherever a trainer keeps them; which are rows of a report, and what is said."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as distributed

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.inventory import rate_in
from lcsc_opt.checkpoints.reading import read_checkpoint
from lcsc_opt.checkpoints.table import table_of
from lcsc_opt.trajectory.trajectory import Trajectory
from tests.checkpoints.checkpoint_examples import saved
from tests.trajectory.trajectory_examples import open_or_pack

STEPS = (100, 200, 300)
Weights = dict[str, torch.Tensor]


def weights(number: float) -> Weights:
    return {"net.weight": torch.full((3, 2), float(number)), "net.bias": torch.full((3,), float(number))}


@dataclasses.dataclass
class Shadow:
    """A trainer's own class of an average."""

    shadow: Weights
    decay: float = 0.9


def write(root: Path, content: Callable[[int], Mapping[Any, Any]], name: str = "step_{}.pt") -> Path:
    for step in STEPS:
        saved(root / "run" / name.format(step), content(step))
    return root / "run"


def packed(run: Path, **options: Any) -> Trajectory:
    return open_or_pack([run], folder=run.parent / "files", **options)


def values(trajectory: Trajectory) -> dict[str, float]:
    """Name → the number that fills an average."""
    found = {}
    for index, name in enumerate(trajectory.averages):
        average = trajectory.trainer_ema(index)
        assert average is not None
        (number,) = {value for tensor in average.values() for value in tensor.unique().tolist()}
        found[name] = number
    return found


ONE: dict[str, Any] = {
    "in a list": lambda step, mean: {"ema_models": [mean]},
    "in a list of lists": lambda step, mean: {"ema": [[*mean.values()]]},
    "in an object": lambda step, mean: {"averager_ema": Shadow(mean)},
    "as parameters in an optimizer's list": lambda step, mean: {
        "optimizer_states": [{"opt": {"state": {}, "param_groups": []}, "ema": tuple(mean.values()), "decay": 0.99}]
    },
    "for each parameter of an optimizer": lambda step, mean: {
        "optimizer": {
            "state": {
                index: {"exp_avg": tensor * 0, "ax": tensor, "step": torch.tensor(1.0)}
                for index, tensor in enumerate(mean.values())
            },
            "param_groups": [{"params": [0, 1]}],
        }
    },
    "under its rate alone": lambda step, mean: {"ema": {0.999: mean}},
    "of stochastic weight averaging": lambda step, mean: {"swa_model": mean},
}


@pytest.mark.parametrize("kind", ONE)
def test_an_average_is_a_row_wherever_the_file_keeps_it(tmp_path, kind):
    run = write(tmp_path, lambda step: {"model": weights(step), **ONE[kind](step, weights(step + 0.5))})
    trajectory = packed(run)
    assert trajectory.metadata["key"] == "model"
    assert values(trajectory) == {"trainer's EMA": 300.5}
    assert trajectory.merge([0, 0, 0, 1])["net.bias"].tolist() == [300.5] * 3


SEVERAL: dict[str, Any] = {
    "under rates as numbers": (
        lambda slow, fast: {"ema": {0.9999: slow, 0.9: fast}},
        {"trainer's EMA 0.9": 301.0, "trainer's EMA 0.9999": 300.5},
    ),
    "under rates as text": (
        lambda slow, fast: {"ema": {"0.9999": slow, "0.9": fast}},
        {"trainer's EMA 0.9": 301.0, "trainer's EMA 0.9999": 300.5},
    ),
    "with rates in their keys": (
        lambda slow, fast: {"ema_0.9999": slow, "ema_0.9": fast},
        {"trainer's EMA 0.9": 301.0, "trainer's EMA 0.9999": 300.5},
    ),
    "in a list beside their widths": (
        lambda slow, fast: {"ema": {"stds": [0.05, 0.1], "emas": [fast, slow]}},
        {"trainer's EMA 0.05": 301.0, "trainer's EMA 0.1": 300.5},
    ),
    "of two kinds": (
        lambda slow, fast: {"swa_model": slow, "ema": {"decay": 0.9, "shadow": fast}},
        {"trainer's EMA swa_model": 300.5, "trainer's EMA 0.9": 301.0},
    ),
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_several_averages_are_rows_each_with_its_name(tmp_path, kind):
    content, expected = SEVERAL[kind]
    run = write(tmp_path, lambda step: {"model": weights(step), **content(weights(step + 0.5), weights(step + 1))})
    trajectory = packed(run)
    assert values(trajectory) == expected
    assert trajectory.merge([0, 0, 0, 0, 1])["net.bias"].tolist() == [[*expected.values()][1]] * 3
    uses = [held.use for held in table_of(run).held]
    assert {f"row of the report: {name}" for name in expected} < {*uses}


def test_equal_averages_are_one_and_that_is_said(tmp_path, caplog):
    caplog.set_level("INFO", logger="lcsc_opt")
    run = write(tmp_path, lambda step: {"model": weights(step), "ema": weights(step + 1), "swa": weights(step + 1)})
    assert values(packed(run)) == {"trainer's EMA": 301.0}
    assert "step_300.pt (swa) is bit for bit step_300.pt (ema)" in caplog.text


@pytest.mark.parametrize("rates", [(0.9, 0.9999), (0.9999, 0.9)])
def test_a_key_around_averages_of_several_rates_asks_which(tmp_path, rates):
    run = write(tmp_path, lambda step: {"net": weights(step), "ema": {rate: weights(step + rate) for rate in rates}})
    with pytest.raises(TrajectoryError, match=r"several state dicts under 'ema' \(ema\.0\.9+, ema\.0\.9+\): choose"):
        packed(run, key="ema")
    assert packed(run, key="ema.0.9").checkpoint(-1)["net.bias"][0] == torch.tensor(300.9)


def test_without_other_weights_averages_of_several_rates_are_asked_about(tmp_path):
    run = write(tmp_path, lambda step: {"ema": {rate: weights(step + rate) for rate in (0.9, 0.9999)}})
    with pytest.raises(TrajectoryError, match=r"several state dicts \(ema\.0\.9, ema\.0\.9999\): choose one"):
        packed(run)


def torch_ema(step: int, collected: Weights | None) -> dict[str, Any]:
    kept = None if collected is None else [*collected.values()]
    return {"decay": 0.9, "shadow_params": [*weights(step + 0.5).values()], "collected_params": kept}


def test_raw_weights_that_torch_ema_set_aside_are_combined_where_the_model_is_the_average(tmp_path, caplog):
    caplog.set_level("INFO", logger="lcsc_opt")
    run = write(tmp_path, lambda step: {"model": weights(step + 0.5), "ema": torch_ema(step, weights(step))})
    trajectory = packed(run)
    assert trajectory.metadata["key"] == "ema.collected_params"
    assert trajectory.checkpoint(-1)["net.bias"].tolist() == [300.0] * 3
    assert values(trajectory) == {"trainer's EMA": 300.5}
    assert "'model' is bit for bit the average 'ema': using the raw weights, 'ema.collected_params'" in caplog.text


def test_raw_weights_that_were_set_aside_and_put_back_are_not_read(tmp_path):
    """The model is no average then: torch-ema does not empty its list."""
    run = write(tmp_path, lambda step: {"model": weights(step), "ema": torch_ema(step, weights(step - 1))})
    trajectory = packed(run)
    assert trajectory.metadata["key"] == "model"
    assert values(trajectory) == {"trainer's EMA": 300.5}


@pytest.mark.parametrize("is_list", [True, False])
def test_a_model_that_is_the_average_bit_for_bit_is_said_to_be(tmp_path, caplog, is_list):
    caplog.set_level("INFO", logger="lcsc_opt")

    def content(step: int) -> dict[str, Any]:
        return {"model": weights(step + 0.5), "ema": torch_ema(step, None) if is_list else weights(step + 0.5)}

    trajectory = packed(write(tmp_path, content))
    assert "'model' is bit for bit the average 'ema', which is combined: the files hold no other weights" in caplog.text
    assert "using the raw weights" not in caplog.text
    assert trajectory.averages == ()


@pytest.mark.parametrize(
    ("name", "rate"), [("net-1.3b-0.9999.pt", "0.9999"), ("net-0.5b-0.99.pt", "0.99"), ("net-10.9b-ema.pt", "")]
)
def test_the_rate_in_a_name_is_its_largest_decimal_below_one(name, rate):
    assert rate_in(name) == rate


def test_what_has_the_models_names_and_no_averages_name_is_said(tmp_path, caplog):
    caplog.set_level("INFO", logger="lcsc_opt")
    run = write(
        tmp_path, lambda step: {"model": weights(step), "ema": weights(step + 1), "model_best": weights(7 * step)}
    )
    assert values(packed(run)) == {"trainer's EMA": 301.0}
    assert "'model_best' has names and shapes of the weights, and is called no average" in caplog.text
    held = {held.key: held.what for held in table_of(run).held}
    assert held["model_best"] == "of the model's names and shapes, but called no average"


def test_raw_weights_beside_averages_are_said(tmp_path, caplog):
    """As EDM saves: the average in a snapshot, the network in the state of the training."""
    caplog.set_level("INFO", logger="lcsc_opt")
    write(tmp_path, lambda step: {"ema": weights(step + 1)}, "network-snapshot-{:06}.pt")
    run = write(tmp_path, lambda step: {"net": weights(step), "optimizer_state": {}}, "training-state-{:06}.pt")
    packed(run)
    assert "network-snapshot-000300.pt is an average; weights of its names and" in caplog.text
    assert "are in training-state-000300.pt (net): name those files to combine them" in caplog.text


FOLDERS = {
    "one file of torch": "step-{}/state.pt",
    "a file of a usual name": "step-{}/pytorch_model.bin",
    "a file in a component": "step-{}/unet/diffusion_pytorch_model.bin",
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_raw_weights_and_average_inside_a_folder_are_told_apart(tmp_path, caplog, kind):
    caplog.set_level("INFO", logger="lcsc_opt")
    run = write(tmp_path, lambda step: {"model": weights(step), "ema": weights(step + 1)}, FOLDERS[kind])
    trajectory = packed(run)
    assert trajectory.checkpoint(-1)["net.bias"].tolist() == [300.0] * 3
    assert values(trajectory) == {"trainer's EMA": 301.0}
    assert "using the raw weights" in caplog.text


@pytest.mark.parametrize("key", [None, "app.ema", "app.model"])
@pytest.mark.filterwarnings("ignore")
def test_a_distributed_checkpoint_with_both_has_rows_for_both(tmp_path, key):
    for step in STEPS:
        content = {"app": {"model": weights(step), "ema": weights(step + 1), "step": step}}
        distributed.save(content, checkpoint_id=tmp_path / f"run/step-{step}", no_dist=True)
    trajectory = packed(tmp_path / "run", key=key)
    assert trajectory.metadata["key"] == (key or "app.model")
    if key != "app.ema":
        assert values(trajectory) == {"trainer's EMA": 301.0}
    assert trajectory.merges_averages == (key == "app.ema")


@pytest.mark.parametrize("name", ["step_{}.pt", "checkpoint-{}/state.pt"])
def test_an_average_that_catches_up_with_weights_at_rest_is_no_obstacle(tmp_path, caplog, name):
    caplog.set_level("INFO", logger="lcsc_opt")
    run = write(tmp_path, lambda step: {"model": weights(1 + step / 1e6), "ema": weights(step / 1e3)}, name)
    trajectory = packed(run)
    assert trajectory.metadata["key"] == "model"
    assert trajectory.averages == ("trainer's EMA",)
    assert "'ema' moves more than 'model' from file to file: the weights rest" in caplog.text


def test_an_export_keeps_rates_that_are_numbers(tmp_path):
    from lcsc_opt.checkpoints.rewriting import with_weights

    run = write(tmp_path, lambda step: {"net": weights(step), "ema": {0.9: weights(step + 1), 0.99: weights(step + 2)}})
    document = with_weights(run / "step_300.pt", "net", weights(7), earlier=run / "step_200.pt")
    assert [*document.entries["ema"]] == [0.9, 0.99]
    assert document.entries["ema"][0.99]["net.bias"].tolist() == [7.0] * 3


def test_floats_whose_hashes_are_equal_cost_no_more_than_others(tmp_path):
    """As keys of a dict they would be compared with each other."""
    colliding = {2.0 ** (61 * power): {"w": torch.ones(2)} for power in range(-16, 17)}
    assert len({*map(hash, colliding)}) == 1
    torch.save({"model": weights(1), "ema": colliding}, tmp_path / "m.pt")
    assert read_checkpoint(tmp_path / "m.pt").key == "model"
