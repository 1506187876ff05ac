"""The answer: the best model that is known, and the same one wherever it is asked for."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import lcsc_opt
from lcsc_opt.base.errors import SearchFailedError
from lcsc_opt.base.jackknife import GROUPS, standard_error
from lcsc_opt.base.records import Evaluation
from lcsc_opt.cli import run as lcsc
from lcsc_opt.database.connection import open_storage, reading
from lcsc_opt.database.measurement import Measurement, Model
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.experiment.answer import OPTIMISM, best_of, choose, gain, is_vetoed, on_the_way
from tests.commands import Typed

JUDGE = "fid@other"


def column(value: float, *, shared: float = 0.0, own: float = 0.0, real: float = 0.0, seed: int = 0) -> list[float]:
    """Values without each group: ``shared`` is the same of all models, ``own`` and ``real`` are standard errors."""
    draws = np.random.default_rng(seed).standard_normal((2, GROUPS))
    scales = np.array([own, real]) / [standard_error(row.tolist()) for row in draws]
    of_samples = value + shared * np.linspace(-1, 1, GROUPS) + scales[0] * draws[0]
    return [*of_samples, *(value + scales[1] * draws[1])]


def measured(
    name: str,
    loss: float,
    judge: float | None = None,
    *,
    unseen: float | None = None,
    error_of_unseen: float = 0.0,
    **errors: Any,
) -> Measurement:
    """A model: its errors are those of differences from one without."""
    metrics, groups = {}, {"loss": column(loss, **errors)}
    if judge is not None:
        metrics[JUDGE] = judge
        groups[JUDGE] = column(judge, **errors)
    if unseen is not None:
        groups["unseen"] = column(unseen, real=error_of_unseen, seed=1)
    evaluation = Evaluation(loss, metrics, unseen=unseen, without_groups=groups)
    return Measurement.of(Model(name, np.ones(1)), evaluation, images=0, seed=0)


def without_error(name: str, loss: float) -> Measurement:
    return Measurement.of(Model(name, np.ones(1)), Evaluation(loss), images=0, seed=0)


def chosen(had: list[Measurement], *found: Measurement) -> str:
    return choose(had, found).model.name


def test_what_is_found_is_the_answer_only_if_it_is_certainly_better() -> None:
    had = [measured("last", 1.2, shared=0.3), measured("EMA*", 1.0, shared=0.3)]
    assert chosen(had, measured("found", 0.97, shared=0.3)) == "found", "what all share cancels"
    assert chosen(had, measured("found", 0.97, shared=0.3, own=0.01)) == "found"
    assert chosen(had, measured("found", 0.97, shared=0.3, own=0.02)) == "EMA*"
    assert chosen(had, measured("found", 1.1, shared=0.3)) == "EMA*"
    assert chosen(had) == "EMA*"
    assert chosen([], measured("a", 2.0), measured("b", 1.0)) == "b"
    assert chosen([measured("EMA*", 1.0)], measured("trial", 0.9), measured("½", 0.8)) == "½"


def test_the_real_images_that_a_search_has_fitted_are_less_certain_than_their_error() -> None:
    had = [measured("EMA*", 1.0)]
    assert chosen(had, measured("found", 0.9, own=0.04)) == "found"
    assert chosen(had, measured("found", 0.9, real=0.04)) == "EMA*", "the search has seen them"
    assert chosen(had, measured("found", 0.9, real=0.02)) == "found"


def test_real_images_that_no_search_sees_count_as_far_as_they_can_tell() -> None:
    had = [measured("EMA*", 1.0, unseen=3.0)]
    assert chosen(had, measured("found", 0.7, real=0.1, unseen=2.7, error_of_unseen=0.1)) == "found", "both say so"
    assert chosen(had, measured("found", 0.7, real=0.1, unseen=3.1, error_of_unseen=0.02)) == "EMA*", "it overfitted"
    assert chosen(had, measured("found", 0.7, real=0.02, unseen=3.1, error_of_unseen=2.0)) == "found", (
        "these cannot tell"
    )


def test_a_gain_is_weighed_by_both_errors() -> None:
    base = measured("EMA*", 2.0, unseen=5.0)
    model = measured("found", 1.0, real=0.2, unseen=4.8, error_of_unseen=0.1)
    of_seen, of_unseen = 0.1**2 * (1 + OPTIMISM**2), 0.05**2  # in shares of the loss
    weight = of_seen / (of_seen + of_unseen)
    found = gain(base, model)
    assert found.value == pytest.approx((1 - weight) * 0.5 + weight * 0.1)
    assert found.error == pytest.approx(math.sqrt((1 - weight) ** 2 * of_seen + weight**2 * of_unseen))


def test_of_a_path_the_latest_model_is_taken_that_is_within_one_error_of_the_best() -> None:
    path = [measured(str(number), loss) for number, loss in enumerate([1.0, 0.7, 0.71, 0.8])]
    assert best_of(path, path).model.name == "1", "nothing is uncertain"
    blurred = [path[0], measured("1", 0.7, own=0.03, seed=1), measured("2", 0.71, own=0.03, seed=2), path[3]]
    assert best_of(blurred, blurred).model.name == "2"
    blurred = [path[0], measured("1", 0.7, real=0.03), measured("2", 0.71, real=0.05), measured("3", 0.72, real=0.08)]
    assert best_of(blurred, blurred).model.name == "3", "the search has seen the real images"
    # behind by more than one standard error, and by less than two
    apart = [measured("0", 0.7, own=0.07), measured("1", 0.8)]
    model, base = apart
    found = gain(base, model)
    assert 1 < found.value / found.error < 2
    assert best_of(apart, apart).model.name == "0"
    off_the_path = measured("¾", 0.6)
    assert best_of([*path, off_the_path], path) is off_the_path
    assert best_of([*path, measured("¾", 0.69, own=0.1)], path).model.name == "1"


def test_a_judge_vetoes_what_is_certainly_worse_there() -> None:
    had = [measured("last", 1.5, 3.0), measured("EMA*", 1.0, 4.0)]
    assert is_vetoed(measured("cheats", 0.7, 6.0), had, [JUDGE])
    assert is_vetoed(measured("cheats", 0.7, 6.0), had, ["unknown", JUDGE])
    assert not is_vetoed(measured("honest", 0.9, 3.6), had, [JUDGE])
    assert not is_vetoed(measured("worse by chance", 0.9, 4.1, own=0.1), had, [JUDGE])
    assert not is_vetoed(measured("unknown", 0.7), had, [JUDGE])
    assert not is_vetoed(measured("cheats", 0.7, 6.0), had, [])
    assert not is_vetoed(measured("cheats", 0.7, 6.0), [], [JUDGE])


def one_number(name: str, *values: float, searched: float | None = None) -> Measurement:
    """A score without errors, on so many seeds of the choice, and on the search's data."""
    parts = [Measurement.of(Model(name, np.ones(1)), Evaluation(value), images=0, seed=0) for value in values]
    joined = Measurement.joined(parts)
    return dataclasses.replace(joined, model=dataclasses.replace(joined.model, searched=searched))


@pytest.mark.parametrize("zero", [0.0, 1.0, -100.0])
def test_of_one_number_the_scatter_decides_and_not_where_its_zero_is(zero: float) -> None:
    """An error of .070 is an accuracy of .930, whose loss is −.930: the error minus one."""

    def model(name: str, *errors: float, searched: float | None = None) -> Measurement:
        if searched is not None:
            searched -= zero
        return one_number(name, *(error - zero for error in errors), searched=searched)

    had = [model("EMA*", 0.070, searched=0.071)]
    assert chosen(had, model("found", 0.055)) == "EMA*", "nothing is known of the error"
    assert chosen(had, model("found", 0.055, searched=0.0561)) == "found"
    assert chosen(had, model("found", 0.055, searched=0.046)) == "EMA*", "on the search's data it gained much more"
    had = [model("EMA*", 0.070, 0.080, 0.060, searched=0.071)]
    assert chosen(had, model("found", 0.0551, 0.0649, 0.045, searched=0.056)) == "found", "both scatter alike"
    assert chosen(had, model("found", 0.055, 0.085, 0.025, searched=0.056)) == "EMA*"
    # fixed data, of which repetitions tell nothing
    had = [model("EMA*", 0.070, 0.070, 0.070, searched=0.071)]
    assert chosen(had, model("found", 0.055, 0.055, 0.055, searched=0.046)) == "EMA*"


def test_a_score_that_is_the_same_number_on_all_data_is_taken_at_its_word() -> None:
    had = [one_number("EMA*", 1.0, searched=1.0)]
    assert chosen(had, one_number("found", 0.999, searched=0.999)) == "found"
    assert chosen(had, one_number("found", 1.001, searched=1.001)) == "EMA*"
    assert gain(without_error("EMA*", 0.0), without_error("found", -0.5)).value == 0.5


@pytest.mark.parametrize("seed", range(3))
def test_a_mean_has_the_answer_of_its_single_outcomes_where_the_data_agree(seed: int) -> None:
    """A loss of which 4,000 outcomes find a model better by one, with an error of about .02."""
    draws = np.random.default_rng(seed)
    base, model = [], []
    for _ in ("search", "selection"):
        shared = 300 * draws.standard_normal(4000)
        base.append(1200 + shared)
        model.append(1199 + shared + draws.standard_normal(4000))
    single = []
    for name, (_, outcomes) in {"had": base, "found": model}.items():
        groups = [float(np.delete(outcomes, np.s_[group::GROUPS]).mean()) for group in range(GROUPS)]
        evaluation = Evaluation(float(outcomes.mean()), without_groups={"loss": groups})
        single.append(Measurement.of(Model(name, np.ones(1)), evaluation, images=0, seed=0))
    assert chosen(single[:1], single[1]) == "found"
    means = [
        one_number(name, float(chosen_on.mean()), searched=float(searched.mean()))
        for name, (searched, chosen_on) in {"had": base, "found": model}.items()
    ]
    assert chosen(means[:1], means[1]) == "found"


def test_points_on_the_way_sum_to_one_also_between_one_row_and_several() -> None:
    start, end = np.array([0.2, 0.3, 0.5]), np.array([[1.5, -1.0, 0.5], [0.0, 0.0, 1.0]])
    points = on_the_way(Model("EMA*", start, label="EMA 0.9"), Model("LCSC, trial 3", end))
    assert [point.name for point in points] == [f"{part} of the way from EMA* to LCSC, trial 3" for part in "¼½¾"]
    for point in points:
        np.testing.assert_allclose(point.coefficients.sum(axis=1), 1)
    np.testing.assert_allclose(points[1].coefficients, (start + end) / 2)


# a regression with few items is overfitted, so that what was there before is better

TRUTH = torch.linspace(-1, 1, 12)


def data(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 12, generator=generator)
    return x, x @ TRUTH + 2 * torch.randn(count, generator=generator)


TRAIN, SEARCHED, UNSEEN = data(400, 1), data(14, 2), data(600, 3)


def squared(net: nn.Module, pairs: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    x, y = pairs
    return (net(x)[:, 0] - y) ** 2


@functools.cache
def trained() -> dict[int, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    net, states = nn.Linear(12, 1), {}
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    for step in range(1, 401):
        rows = torch.randint(400, (16,))
        F.mse_loss(net(TRAIN[0][rows])[:, 0], TRAIN[1][rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            states[step] = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    return states


def loss_of(weights: dict[str, torch.Tensor]) -> float:
    net = nn.Linear(12, 1)
    net.load_state_dict(weights)
    return float(squared(net, UNSEEN).mean().detach())


def search(checkpoints: Any, **changed: Any) -> Any:
    """Few data, which a search overfits."""
    functions: dict[str, Any] = {
        "build": lambda: nn.Linear(12, 1),
        "score": lambda net: squared(net, SEARCHED),
        "held_out": lambda net: squared(net, UNSEEN),
    }
    return lcsc_opt.search(checkpoints, **{**functions, "name": "few", **changed})


@pytest.fixture(scope="module")
def searched_few(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("overfitted")
    return search(trained(), budget=30, storage=f"sqlite:///{folder / 'studies.db'}")


@pytest.fixture
def overfitted(searched_few: Any, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The result of a finished search, whose database commands find."""
    monkeypatch.setenv("LCSC_STORAGE", searched_few.storage)
    return searched_few


def test_a_search_that_overfits_hands_out_what_was_there_before(overfitted: Any, typed: Typed, workplace: Path) -> None:
    searched = overfitted.studies[-1]
    answer = overfitted.merge()
    lowest = min(searched.trials, key=lambda trial: math.inf if trial["loss"] is None else trial["loss"])
    assert loss_of(answer) < 0.95 * loss_of(searched.merge(lowest["coefficients"]))
    assert loss_of(answer) <= 1.01 * min(loss_of(trained()[400]), loss_of(overfitted.studies[0].merge()))
    sentence = repr(overfitted).splitlines()[0]
    assert sentence.startswith("The answer is EMA* (average of the last ")
    assert "nothing certainly better was found" in sentence
    assert sentence.split(",")[0] in typed("compare", "few").err
    said = typed("export", "few", "-o", "answer.safetensors")
    assert "answer.safetensors: EMA*" in said.err
    for name, tensor in load_file(workplace / "answer.safetensors").items():
        torch.testing.assert_close(tensor, answer[name])
    own = typed("export", searched.name, "-o", "own.safetensors")
    assert "is not the answer, EMA* is. Worse than the answer: loss" in own.err
    assert "lcsc export few" in own.err
    torch.testing.assert_close(load_file(workplace / "own.safetensors")["weight"], searched.merge()["weight"])


def test_half_of_what_held_out_returns_chooses_and_the_other_half_is_reported(overfitted: Any) -> None:
    [last] = [row for row in overfitted.compare() if row["study"] == overfitted.studies[0].name]
    net = nn.Linear(12, 1)
    net.load_state_dict(overfitted.studies[0].merge())
    values = squared(net, UNSEEN).detach()
    assert last["held_out"] == pytest.approx(float(values[1::2].mean()), rel=1e-5)
    with reading(overfitted.storage) as storage:
        report = HistoryReader(storage).read_study(overfitted.studies[0].name).report
    assert report is not None
    assert report.selection[report.answer] <= float(values[0::2].mean()) * (1 + 1e-5)


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize("maximize", [False, True])
def test_a_model_that_alone_solves_every_item_is_certainly_better(maximize: bool) -> None:
    """Where all items have the same outcome, they tell an error: none."""
    target = torch.linspace(-1, 1, 12)
    states = {step: {"weight": target[None] * step / 3, "bias": torch.zeros(1)} for step in (1, 2)}

    def score(net: nn.Module) -> Any:
        distances = (net.weight[0] - target).square()
        return -distances if maximize else distances

    def held_out(net: nn.Module) -> Any:
        is_solved = (net.weight[0] - target).abs() < 0.05
        return (is_solved if maximize else ~is_solved).float().repeat(3)

    options = {"budget": 40, "optimizers": ["LCSCQuadratic"], "maximize": maximize}
    found = search(states, score=score, held_out=held_out, **options)
    assert str(found).startswith("The answer is LCSCQuadratic")


@pytest.mark.usefixtures("workplace")
def test_a_held_out_number_cannot_choose_and_that_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    search(trained(), held_out=lambda net: squared(net, UNSEEN).mean(), budget=5)
    assert "held_out: returned fewer than 20 single outcomes, so the answer is chosen by" in capfd.readouterr().err


def test_a_search_begins_at_ema_star_where_that_is_known(workplace: Path) -> None:
    torch.manual_seed(0)
    target, far = torch.randn(1, 40), torch.randn(1, 40)
    states = {step: {"weight": target + 300 * far * 0.6**step + 0.05 * torch.randn(1, 40)} for step in range(1, 21)}

    def score(net: nn.Module) -> float:  # flat far away, and without a gradient
        return float(1 - torch.exp(-(net.weight - target).square().sum().sqrt()).detach())

    result = lcsc_opt.search(states, build=lambda: nn.Linear(40, 1, bias=False), score=score, budget=10)
    ema, found = result.studies
    assert found.name.split("/")[1] == "LCSCQuadratic"
    np.testing.assert_allclose(found.trials[0]["coefficients"], ema.coefficients, atol=1e-12)
    assert found.searched <= ema.searched


@pytest.mark.usefixtures("impatient")
def test_a_search_waits_for_the_grid_that_another_process_runs(workplace: Path) -> None:
    def score(net: nn.Module) -> float:
        if (workplace / "studies.db").exists() and not (workplace / "whole").exists():
            raise KeyboardInterrupt
        return float((net.weight - 2).square().sum().detach())

    states = {step: {"weight": torch.full((1, 4), step / 5)} for step in range(1, 11)}
    models: dict[str, Any] = {
        "build": lambda: nn.Linear(4, 1, bias=False),
        "score": score,
        "name": "shared",
        "budget": 4,
        "resume": True,
    }
    with pytest.raises(KeyboardInterrupt):
        lcsc_opt.search(states, **models)
    (workplace / "whole").touch()
    grid = StoredStudy.open(open_storage("sqlite:///studies.db", write=True), "shared/EMAGrid/0")
    with grid.hold(), pytest.raises(SearchFailedError, match="LCSCQuadratic/0: begins at the best of shared/EMAGrid/0"):
        lcsc_opt.search(states, **models)
    ema, found = lcsc_opt.search(states, **models).studies
    np.testing.assert_allclose(found.trials[0]["coefficients"], ema.coefficients, atol=1e-12)


def save_averages(folder: Path, key: str) -> torch.Tensor:
    """Write checkpoints with their averages under a key; gives the weight of the last average, which is the best."""
    folder.mkdir()
    best = torch.linalg.lstsq(UNSEEN[0], UNSEEN[1]).solution[None]
    for step, weights in trained().items():
        average = {"weight": best + 0.01 * (400 - step), "bias": torch.zeros(1)}
        torch.save({"model": weights, key: average, "step": step}, folder / f"model{step}.pt")
    return best


def test_of_several_averages_of_the_trainers_the_best_can_be_the_answer(workplace: Path) -> None:
    best = torch.linalg.lstsq(UNSEEN[0], UNSEEN[1]).solution[None]
    (workplace / "runs").mkdir()
    for step, weights in trained().items():
        rates = {0.9: best + 1 + 0.01 * (400 - step), 0.99: best + 0.01 * (400 - step)}
        ema = {rate: {"weight": weight, "bias": torch.zeros(1)} for rate, weight in rates.items()}
        torch.save({"model": weights, "ema": ema, "step": step}, workplace / "runs" / f"model{step}.pt")
    result = search("runs/*.pt", settings={"key": "model"}, budget=4)
    assert "The answer is the trainer's EMA 0.99" in repr(result)
    assert "trainer's EMA 0.9 " in repr(result)
    torch.testing.assert_close(result.merge()["weight"], best)
    assert lcsc(["export", "few", "-o", "answer.safetensors"]) == 0
    torch.testing.assert_close(load_file(workplace / "answer.safetensors")["weight"], best)
    assert lcsc(["apply", "answer.safetensors", "runs/", "--key", "model", "-o", "again.safetensors"]) == 0
    torch.testing.assert_close(load_file(workplace / "again.safetensors")["weight"], best)


@pytest.mark.parametrize(("key", "settings"), [("ema", {}), ("smooth", {"trainer_ema": "smooth"})])
def test_the_trainers_own_average_can_be_the_answer_also_under_a_key_that_only_its_user_knows(
    workplace: Path, key: str, settings: dict[str, str]
) -> None:
    best = save_averages(workplace / "runs", key)
    result = search("runs/*.pt", settings={"key": "model", **settings}, budget=4)
    assert "The answer is the trainer's EMA" in repr(result)
    torch.testing.assert_close(result.merge()["weight"], best)
    assert lcsc(["export", "few", "-o", "answer.safetensors"]) == 0
    torch.testing.assert_close(load_file(workplace / "answer.safetensors")["weight"], best)
    if not settings:
        assert lcsc(["apply", "answer.safetensors", "runs/", "--key", "model", "-o", "again.safetensors"]) == 0
        torch.testing.assert_close(load_file(workplace / "again.safetensors")["weight"], best)
