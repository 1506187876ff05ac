"""A cross-check at the final choice: measured beside a baseline, stored, and shown where the loss is."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.records import HELD_OUT, SEARCH, SELECTION, Candidate, Coefficients, Cost, Evaluation, Noise
from lcsc_opt.cli import run as lcsc
from lcsc_opt.coefficients.profiles import default_origin
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.history import HeldOut
from lcsc_opt.database.judges import CrossCheck, cross_check_of, warning_of
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.objective.contract import Objective
from lcsc_opt.search.held_out import HeldOutPlan, best_trials, score_held_out
from lcsc_opt.views.progress import overview
from lcsc_opt.views.ranking import headline, ranking
from tests.model_studies import EMA_STUDY, OBJECTIVE, STUDY, write_model_study
from tests.study_examples import coefficients, write_study

STEPS = (100, 200, 300)
CROSS_CHECK = "fid@cross_check"


def follows(loss: float) -> float:
    return 2 * loss


def cheats(loss: float) -> float:
    return 30 - loss


class TwoSpaces(Objective):
    """A loss that is lowest at the best trial of the studies below, and a metric that follows it or does not."""

    steps = STEPS

    def __init__(self, cross_check: Callable[[float], float] | None = follows) -> None:
        self.asked: list[tuple[tuple[float, ...], str, int]] = []
        self._cross_check = cross_check

    @property
    def cross_check_metric(self) -> str | None:
        return None if self._cross_check is None else CROSS_CHECK

    def evaluate(self, candidate: Candidate, *, gradient: bool = False) -> Evaluation:
        noise = candidate.noise
        self.asked.append((tuple(candidate.coefficients), noise.group, noise.seed))
        loss = 0.5 + float(((candidate.coefficients - coefficients(1)) ** 2).sum()) + noise.seed / 100
        cross_check = {} if self._cross_check is None else {CROSS_CHECK: self._cross_check(loss)}
        return Evaluation(loss, {"fid": loss, **cross_check}, Cost())

    def describe(self) -> dict[str, Any]:
        return {}

    def measured(self, model: Coefficients) -> list[tuple[str, int]]:
        return [(group, seed) for known, group, seed in self.asked if known == tuple(model)]


@pytest.fixture
def study(url: str) -> StoredStudy:
    return write_study(open_storage(url, write=True), STUDY, [3.0, 1.0, 2.0])


PLAN = HeldOutPlan(images=20, top=1)
EMA = default_origin(STEPS)


def test_where_no_ema_is_known_the_one_that_searches_start_from_is_measured(study: StoredStudy) -> None:
    objective = TwoSpaces()
    report = score_held_out(study, objective, PLAN)
    assert objective.measured(EMA) == [("held-out", 0)]
    beside = report["baselines"]["default EMA"]
    expected = 1 - report["loss"] / beside["loss"]
    assert report["cross_check"] == {
        "metric": CROSS_CHECK,
        "value": report["metrics"][CROSS_CHECK],
        "against": "default EMA",
        "gain": pytest.approx(expected),
        "cross_check_gain": pytest.approx(expected),
        "gain_spread": None,
        "cross_check_gain_spread": None,
    }
    assert study.attributes["held_out"] == report


def test_the_baseline_is_not_measured_twice(study: StoredStudy) -> None:
    first = score_held_out(study, TwoSpaces(), PLAN)
    study.set_attribute("held_out", None)  # as a higher budget does
    again = TwoSpaces()
    assert score_held_out(study, again, PLAN) == first
    assert again.asked == []
    more = TwoSpaces()
    score_held_out(study, more, HeldOutPlan(images=20, top=1, groups=2))
    assert more.measured(EMA) == [("held-out", 1)]
    other = TwoSpaces()
    score_held_out(study, other, HeldOutPlan(images=30, top=1))
    assert other.measured(EMA) == [("held-out", 0)], "other images are another measurement"


def test_ema_star_comes_before_it_and_costs_nothing_where_it_was_reported(study: StoredStudy) -> None:
    grid = write_study(study.storage, EMA_STUDY, [5.0, 4.0])
    measured = score_held_out(grid, TwoSpaces(), PLAN)
    assert "baselines" not in measured, "a grid has none but itself"
    assert measured["cross_check"] == {
        "metric": CROSS_CHECK,
        "value": measured["metrics"][CROSS_CHECK],
        "against": None,
        "gain": None,
        "cross_check_gain": None,
        "gain_spread": None,
        "cross_check_gain_spread": None,
    }
    objective = TwoSpaces()
    report = score_held_out(study, objective, PLAN)
    assert report["cross_check"]["against"] == "EMA*"
    assert report["baselines"]["EMA*"]["loss"] == measured["loss"]
    assert {known for known, *_ in objective.asked} == {tuple(coefficients(1))}, "no model but the answer was sampled"


def test_what_was_measured_before_there_was_a_cross_check_is_measured_again(study: StoredStudy) -> None:
    before = score_held_out(study, TwoSpaces(None), PLAN)
    assert not {"cross_check", "baselines", "warning"} & set(before)
    objective = TwoSpaces()
    report = score_held_out(study, objective, PLAN)
    assert objective.measured(coefficients(1)) == [("held-out", 0)], "and not chosen again"
    assert report["cross_check"]["value"] == follows(report["loss"])
    kept = score_held_out(study, TwoSpaces(None), PLAN)
    assert kept["metrics"] == report["metrics"], "what cannot be measured now is not lost"


def test_only_trials_that_compare_are_chosen_from(url: str) -> None:
    study = StoredStudy.open_or_create(
        open_storage(url, write=True), STUDY, {"steps": STEPS, "fingerprint": {"objective": {}}}
    )
    asked = [(5.0, 10, SEARCH), (0.1, 10, Noise("search", 3)), (0.2, 2, SEARCH), (4.0, 10, SEARCH)]
    for number, (loss, images, noise) in enumerate(asked[1:2]):
        key = study.add_candidate(Candidate(coefficients(number), noise=noise))
        study.finish(key, Evaluation(loss, {}, Cost(images=images)), tell_index=number, compares=False)
    with pytest.raises(StudyStoreError, match="no complete trial on the search's noise"):
        score_held_out(study, TwoSpaces(), PLAN)
    for number, (loss, images, noise) in enumerate(asked, start=1):
        key = study.add_candidate(Candidate(coefficients(number), images=images, noise=noise))
        compares = images == 10 and noise == SEARCH
        study.finish(key, Evaluation(loss, {}, Cost(images=images)), tell_index=number, compares=compares)
    assert [trial.number for trial in best_trials(study.trials(), 5)] == [4, 1]


def test_a_gain_that_the_second_space_does_not_show_is_a_warning(
    study: StoredStudy, capsys: pytest.CaptureFixture[str]
) -> None:
    report = score_held_out(study, TwoSpaces(cheats), PLAN)
    gain, cross_check = report["cross_check"]["gain"], report["cross_check"]["cross_check_gain"]
    assert gain > 0 > cross_check
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "compare the images" in line]
    assert line == f"lcsc: {STUDY}: {report['warning']}"
    assert f"{100 * gain:.1f} % below default EMA's" in line
    assert f"but {CROSS_CHECK} {-100 * cross_check:.1f} % above" in line


@pytest.mark.parametrize(
    ("loss", "cross_check", "warned"),
    [(1.0, 3.0, False), (1.0, 4.0, True), (1.0, 5.0, True), (2.0, 9.0, False), (3.0, 3.0, False), (3.0, 9.0, False)],
)
def test_it_warns_where_the_loss_gained_and_the_other_did_not(loss: float, cross_check: float, warned: bool) -> None:
    beside = {"loss": 2.0, "metrics": {"fid": 2.0, CROSS_CHECK: 4.0}}
    report = {"loss": loss, "metrics": {"fid": loss, CROSS_CHECK: cross_check}, "baselines": {"EMA*": beside}}
    found = cross_check_of(report, CROSS_CHECK, "EMA*")
    assert found is not None
    assert (found.gain, found.cross_check_gain) == (pytest.approx(1 - loss / 2), pytest.approx(1 - cross_check / 4))
    assert (warning_of(report, found) is not None) is warned


def grouped(losses: list[float], others: list[float]) -> dict[str, Any]:
    """A part of a report: means, and a group of noise for each pair of numbers."""
    groups = [
        {"seed": seed, "loss": loss, "metrics": {CROSS_CHECK: cross_check}}
        for seed, (loss, cross_check) in enumerate(zip(losses, others, strict=True))
    ]
    return {"loss": statistics.fmean(losses), "metrics": {CROSS_CHECK: statistics.fmean(others)}, "groups": groups}


@pytest.mark.parametrize(
    ("losses", "others", "phrase"),
    [
        # the noise of a group moves the answer and its baseline alike, so that differences are all but exact
        ([1.0, 1.3], [3.9, 5.9], None),
        ([1.0, 1.3], [4.1, 6.1], "2.0 % above: this may please"),
        ([1.0, 1.3], [3.7, 6.2], "1.0 % below, within its spread over 2 groups"),
        ([1.0, 1.3], [3.8, 6.3], "1.0 % above, within its spread over 2 groups"),
        ([1.9, 2.35], [4.1, 6.1], "neither is a certain gain"),
        ([1.9, 2.35], [3.9, 5.9], None),
        ([2.1, 2.3], [4.1, 6.1], None),  # nothing gained, nothing to warn of
    ],
)
def test_a_gain_within_its_spread_over_groups_of_noise_is_no_certain_gain(
    losses: list[float], others: list[float], phrase: str | None
) -> None:
    report = {**grouped(losses, others), "baselines": {"EMA*": grouped([2.0, 2.3], [4.0, 6.0])}}
    found = warning_of(report, cross_check_of(report, CROSS_CHECK, "EMA*"))
    assert found is None if phrase is None else phrase in (found or "")


def test_gains_are_shown_with_their_spread_on_the_same_noise() -> None:
    report = {**grouped([1.0, 1.3], [3.7, 6.2]), "baselines": {"EMA*": grouped([2.0, 2.4], [4.0, 6.0])}}
    found = cross_check_of(report, CROSS_CHECK, "EMA*")
    assert found is not None
    assert found.gain_spread == pytest.approx(statistics.stdev([1.0, 1.1]) / 2.2)
    assert found.cross_check_gain_spread == pytest.approx(statistics.stdev([0.3, -0.2]) / 5.0)
    assert found.text == "against EMA*: loss -47.7 ± 3.2 %, fid@cross_check -1.0 ± 7.1 %"
    assert CrossCheck.parse(dataclasses.asdict(found)) == found


def test_gains_of_losses_below_zero_have_no_share_and_warn_all_the_same() -> None:
    beside = {"loss": -1.0, "metrics": {CROSS_CHECK: 4.0}}
    report = {"loss": -2.0, "metrics": {CROSS_CHECK: 4.5}, "baselines": {"EMA*": beside}}
    found = cross_check_of(report, CROSS_CHECK, "EMA*")
    assert found == CrossCheck(CROSS_CHECK, 4.5, "EMA*", None, pytest.approx(-0.125))  # type: ignore[arg-type]
    assert found.text is None
    assert "the loss is below EMA*'s, but fid@cross_check 12.5 % above" in (warning_of(report, found) or "")


def test_without_a_baseline_there_is_a_value_and_no_warning() -> None:
    report = {"loss": 1.0, "metrics": {CROSS_CHECK: 4.5}}
    assert cross_check_of(report, CROSS_CHECK, None) == CrossCheck(CROSS_CHECK, 4.5)
    assert warning_of(report, CrossCheck(CROSS_CHECK, 4.5)) is None
    assert cross_check_of(report, "kid@clip", None) is None


def test_what_is_stored_is_read_again(study: StoredStudy) -> None:
    report = score_held_out(study, TwoSpaces(cheats), PLAN)
    found = HeldOut.parse(json.loads(json.dumps(report)))
    assert found is not None
    assert found.cross_check == CrossCheck(**report["cross_check"])
    assert found.warning == report["warning"]
    assert HeldOut.parse({"loss": 1.0}) == HeldOut(None, 1.0)
    row = HistoryReader(study.storage).read_study(study.name).as_row()
    assert row["cross_check"] == report["cross_check"]
    assert overview(study)["warning"] == report["warning"]


def test_the_headline_tells_in_how_many_seeds_it_gained_nothing(url: str) -> None:
    storage = open_storage(url, write=True)
    for seed, cross_check in enumerate((cheats, follows, cheats)):
        one = write_study(storage, f"{STUDY[:-1]}{seed}", [3.0, 1.0, 2.0])
        score_held_out(one, TwoSpaces(cross_check), PLAN)
    (row,) = ranking(HistoryReader(storage).read("small"))
    assert (row.doubtful, row.cross_check_metric, row.seeds) == (2, CROSS_CHECK, 3)
    assert row.cross_check is not None
    assert "but fid@cross_check gained nothing in 2 of 3 seeds: compare the images" in headline([row], "FID")


PROPERTY = """
    @property
    def cross_check_metric(self):
        return "fid@cross_check"
"""
MEASURED = OBJECTIVE.replace('metrics["kid"] = loss / 7', 'metrics["fid@cross_check"] = CROSS_CHECK')
CHECKED_OBJECTIVE = MEASURED.replace("\n    def describe(self):", f"{PROPERTY}\n    def describe(self):")


def test_run_compare_show_and_evaluate_say_it(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_model_study(workplace, held_out={"images": 20, "top": 1}, budget={"evaluations": 40})
    (workplace / "small_model.py").write_text(CHECKED_OBJECTIVE.replace("CROSS_CHECK", "9 - loss"))
    assert lcsc(["run", str(path)]) == 0
    ran = capsys.readouterr().err
    assert lcsc(["compare", "small"]) == 0
    compared = capsys.readouterr()
    assert CROSS_CHECK in compared.out
    for text in (ran, compared.err):
        (line,) = [line for line in text.splitlines() if "compare the images" in line]
        assert f"{STUDY}: the loss is" in line
        assert "below EMA*'s, but fid@cross_check" in line
    assert lcsc(["compare", "small", "--format", "json"]) == 0
    rows = {row["study"]: row for row in json.loads(capsys.readouterr().out)}
    found = rows[STUDY]["cross_check"]
    assert list(rows[STUDY])[-3:] == ["cross_check", "judges", "warnings"]
    assert (found["metric"], found["against"]) == (CROSS_CHECK, "EMA*")
    assert found["value"] == pytest.approx(9 - rows[STUDY]["held_out"])
    assert lcsc(["show", STUDY]) == 0
    assert "this may please the loss's own features" in " ".join(capsys.readouterr().out.split())
    assert lcsc(["evaluate", STUDY]) == 0
    assert f"against EMA*: loss -{100 * found['gain']:.1f} %, fid@cross_check +" in capsys.readouterr().out


def test_the_noise_of_baselines_decides_nothing(study: StoredStudy) -> None:
    objective = TwoSpaces()
    score_held_out(study, objective, HeldOutPlan(images=20, top=3))
    assert {(group, seed) for _, group, seed in objective.asked} == {
        (SELECTION.group, SELECTION.seed),
        (HELD_OUT.group, HELD_OUT.seed),
    }
    assert [group for group, _ in objective.measured(EMA)] == ["held-out"]
