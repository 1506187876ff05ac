"""One model against another: gains with the right sign, their intervals, and what counts as lost."""

from __future__ import annotations

import statistics

import numpy as np
import pytest

from lcsc_opt.base.jackknife import GROUPS, group_of_each
from lcsc_opt.base.records import Evaluation, ReportedMetrics
from lcsc_opt.database.measurement import Measurement, Model
from lcsc_opt.database.metric_rows import MetricRow, metric_rows

SIGNS = {"precision": -1, "near": 1}
NOTHING = ReportedMetrics()
CLIP = "fid@clip"


def on_groups(evaluations: list[Evaluation]) -> Measurement:
    """A model on a group of noise for each evaluation."""
    ema = Model("EMA*", np.ones(1))
    groups = [Measurement.of(ema, one, images=0, seed=seed) for seed, one in enumerate(evaluations)]
    return Measurement.joined(groups)


def model(losses: list[float], **metrics: list[float]) -> Measurement:
    """A model on a group of noise for each number."""
    evaluations = []
    for seed, loss in enumerate(losses):
        evaluations.append(Evaluation(loss, {metric: values[seed] for metric, values in metrics.items()}))
    return on_groups(evaluations)


EMA = model([28.0], precision=[0.62], near=[2.87])


def rows(found: Measurement, ema: Measurement = EMA, real: dict[str, float] | None = None) -> list[MetricRow]:
    signs = {name: sign for name, sign in {**SIGNS, CLIP: 1}.items() if name in found.metrics}
    reported = ReportedMetrics(signs=signs, real_halves=real or {}, cross_check=CLIP)
    return [*metric_rows(found, ema, reported=reported)]


def lost(found: list[MetricRow]) -> list[str]:
    return [row.metric for row in found if row.lost]


@pytest.mark.parametrize(("held_out", "tells"), [(14, False), (50, True), (0, True)])
def test_a_distance_to_few_held_out_images_says_nothing(held_out: int, tells: bool) -> None:
    """It prefers samples that vary less; ``0`` is not known."""
    reported = ReportedMetrics(signs={"fid_held_out@own": 1, "near": 1}, real_count=held_out)
    values = {"near": [3.0]}
    had, found = model([2.0], **values), model([1.0], **values)
    had.values["fid_held_out@own"], found.values["fid_held_out@own"] = (752.5,), (792.5,)  # type: ignore[index]
    of_metric = {row.metric: row for row in metric_rows(found, had, reported=reported)}
    row = of_metric["fid_held_out@own"]
    assert (row.lost, row.is_judge, row.tells) == (tells, tells, tells)
    assert row.gain == -40.0, "it is shown"
    assert of_metric["near"].tells


def test_gains_are_positive_where_the_answer_is_better() -> None:
    loss, precision, near = rows(model([2.5], precision=[0.64], near=[3.05]), real={"near": 2.2})
    assert (loss.metric, loss.value, loss.baseline, loss.gain) == ("loss", 2.5, 28.0, 25.5)
    assert (precision.gain, precision.lost, precision.real_halves) == (pytest.approx(0.02), False, None)
    assert (near.gain, near.lost, near.real_halves) == (pytest.approx(-0.18), True, 2.2)
    assert (near.value, near.baseline, near.against) == (3.05, 2.87, "EMA*")


@pytest.mark.parametrize(
    ("precision", "near", "expected"),
    [
        (0.557, 3.05, ["precision", "near"]),
        (0.61, 2.86, ["precision"]),
        (0.70, 2.5, []),
        (0.60, 2.87, ["precision"]),
    ],
)
def test_without_an_interval_whatever_is_worse_is_said(precision: float, near: float, expected: list[str]) -> None:
    found = rows(model([2.5], precision=[precision], near=[near]))
    assert lost(found) == expected


def test_with_groups_of_noise_the_spread_of_differences_is_the_noise() -> None:
    ema = model([28.0, 29.0], precision=[0.62, 0.64], near=[2.87, 2.80])
    _, precision, near = rows(model([2.5, 2.6], precision=[0.61, 0.63], near=[2.97, 2.70]), ema)
    assert (precision.gain, precision.gain_interval) == (pytest.approx(-0.01), pytest.approx((-0.01, -0.01)))
    assert precision.lost, "a small loss, but on the same noise a certain one"
    assert (near.gain, near.lost) == (pytest.approx(0), False)


def test_a_metric_of_unknown_direction_has_no_gain_and_the_loss_under_its_name_no_row() -> None:
    answer = model([2.5], fid=[2.5], kid=[0.1])
    measured = metric_rows(answer, model([28.0], kid=[0.2]), reported=NOTHING)
    found = [(row.metric, row.sign, row.baseline, row.gain) for row in measured]
    assert found == [("loss", 1, 28.0, 25.5), ("kid", None, 0.2, None)]


def test_standard_errors_give_intervals_and_have_no_rows() -> None:
    answer, ema = (model([-hits], hits=[hits], hits_stderr=[error]) for hits, error in ((0.9, 0.03), (0.8, 0.04)))
    loss, hits = rows(answer, ema)
    assert loss.metric == "loss"
    assert loss.interval == pytest.approx((-0.9 - 1.95996 * 0.03, -0.9 + 1.95996 * 0.03))
    assert (hits.metric, hits.sign) == ("hits", -1), "it is the loss times -1"
    for row in (loss, hits):
        assert row.gain_interval == pytest.approx((0.1 - 1.95996 * 0.05, 0.1 + 1.95996 * 0.05), abs=1e-5)
    assert [row.lost for row in rows(ema, answer)] == [True, True]
    [alone] = metric_rows(model([2.5]), reported=NOTHING)
    assert alone.interval is None


def resampled(loss: float, without: list[float]) -> Evaluation:
    return Evaluation(loss, without_groups={"loss": without})


def test_an_interval_is_of_the_images_noise_and_that_of_the_gain_of_differences_on_the_same_images() -> None:
    without = [2.0 + 0.1 * number for number in range(10)]
    answer = on_groups([resampled(2.5, without)])
    ema = on_groups([resampled(3.5, [value + 1 for value in without])])
    [loss] = metric_rows(answer, ema, reported=NOTHING)
    error = statistics.pstdev(without) * 3  # the root of (G − 1) times their variance
    assert loss.interval == pytest.approx((2.5 - 2.262157 * error, 2.5 + 2.262157 * error))
    assert loss.baseline_interval == pytest.approx((3.5 - 2.262157 * error, 3.5 + 2.262157 * error))
    assert loss.gain_interval == pytest.approx((1.0, 1.0)), "both models have the same noise"


@pytest.mark.parametrize(("change", "is_lost"), [(0.02, True), (0.001, False)])
def test_a_metric_is_lost_if_the_interval_of_its_gain_is_below_zero(change: float, is_lost: bool) -> None:
    """A gain's interval of ± 0.0103, where two per cent would be 0.5."""
    noise = [0.001 * (number % 2) for number in range(10)]
    ema = on_groups([resampled(25.0, [25.0] * 10)])
    answer = on_groups([resampled(25 + change, [25 + change + value for value in noise])])
    [loss] = metric_rows(answer, ema, reported=NOTHING)
    assert loss.lost is is_lost


def test_groups_of_noise_make_the_interval_narrower() -> None:
    without = [2.0 + 0.1 * number for number in range(10)]
    groups = [resampled(2.5 + shift, [value + shift for value in without]) for shift in (-0.1, 0.1, -0.2, 0.2)]
    [loss] = metric_rows(on_groups(groups), reported=NOTHING)
    assert loss.interval is not None
    low, high = loss.interval
    error = statistics.pstdev(without) * 3 / 2
    assert high - low == pytest.approx(2 * 2.028094 * error), "36 degrees of freedom"
    groups = [resampled(2.5, without), Evaluation(2.6), *[resampled(2.5, without)] * 2]
    [loss] = metric_rows(on_groups(groups), reported=NOTHING)
    assert loss.interval == pytest.approx((2.525 - 3.182446 * 0.025, 2.525 + 3.182446 * 0.025)), "of four groups"


def sampled(generator: np.random.Generator, kind: str, shift: float) -> Evaluation:
    """An evaluation whose metric is the mean of 200 normal numbers, with what its interval is computed from."""
    values = generator.normal(10 + shift, 1, 200)
    if kind == "groups of noise alone":
        return Evaluation(1.0, {"near": values.mean()})
    if kind == "standard errors":
        return Evaluation(1.0, {"near": values.mean(), "near_stderr": values.std(ddof=1) / 200**0.5})
    group = group_of_each(200)
    without = [float(values[group != number].mean()) for number in range(GROUPS)]
    return Evaluation(1.0, {"near": values.mean()}, without_groups={"near": without})


def share_called_worse(kind: str, groups: int, *, reports: int, shift: float = 0.0) -> float:
    """The share of reports that call an answer worse, which is worse than the baseline by ``shift``."""
    generator = np.random.default_rng(54)
    worse = 0
    for _ in range(reports):
        answer = on_groups([sampled(generator, kind, shift) for _ in range(groups)])
        ema = on_groups([sampled(generator, kind, 0.0) for _ in range(groups)])
        _, near = metric_rows(answer, ema, reported=ReportedMetrics(signs={"near": 1}))
        worse += near.lost
    return worse / reports


@pytest.mark.parametrize(
    ("kind", "groups"),
    [
        ("groups of noise alone", 2),
        ("groups of noise alone", 5),
        ("standard errors", 1),
        ("standard errors", 2),
        ("groups of images", 1),
        ("groups of images", 3),
    ],
)
def test_models_that_are_alike_are_rarely_called_worse(kind: str, groups: int) -> None:
    assert 0.005 < share_called_worse(kind, groups, reports=200) < 0.06
    assert share_called_worse(kind, groups, reports=5, shift=5.0) == 1


@pytest.mark.parametrize(("levels", "expected"), [(0.9, False), (1.2, True)])
def test_a_grey_level_more_outside_is_not_called_worse(levels: float, expected: bool) -> None:
    found = metric_rows(
        model([1.0], outside=[0.1 + levels]),
        model([2.0], outside=[0.1]),
        reported=ReportedMetrics(signs={"outside": 1}),
    )
    assert [row.lost for row in found if row.metric == "outside"] == [expected]


@pytest.mark.parametrize("metric", [CLIP, "fid_held_out", "fid_held_out@pixels"])
def test_features_and_real_images_that_no_search_saw_are_judges(metric: str) -> None:
    found = metric_rows(model([1.0], **{metric: [3.0]}), reported=ReportedMetrics(signs={metric: 1}, cross_check=CLIP))
    assert [row.is_judge for row in found] == [False, True]


@pytest.mark.parametrize("of_outcomes", ["columns", "errors", "nothing"])
def test_the_same_data_under_several_seeds_are_no_more_data(of_outcomes: str) -> None:
    """A score without a draw gives the same outcomes in each group of noise."""
    values = np.random.default_rng(0).normal(5.0, 1.0, 200)
    groups = group_of_each(len(values))
    columns = [float(values[groups != group].mean()) for group in range(GROUPS)]
    error = float(values.std(ddof=1) / np.sqrt(len(values)))
    metrics = {"score": float(values.mean())} | ({"score_stderr": error} if of_outcomes == "errors" else {})
    without = {"loss": columns} if of_outcomes == "columns" else {}
    evaluation = Evaluation(metrics["score"], metrics, without_groups=without)
    once, often = (on_groups([evaluation] * count) for count in (1, 16))
    [of_one], [of_many] = (metric_rows(found, reported=NOTHING)[:1] for found in (once, often))
    assert of_many.interval == of_one.interval
    assert (of_many.interval is None) == (of_outcomes == "nothing")
