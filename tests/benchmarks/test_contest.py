"""The parts of ``benchmarks/optimizers.py`` that decide what it says."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from optuna.trial import TrialState

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from contest import entries, working
from contest.answers import Answer, Measured, answers, measured
from contest.drawing import cost_curve, objective_figure
from contest.entries import CELLS, CONTENDERS, QUICK_CELLS, Cell, Contender, study_spec
from contest.numbers import Curves, crossing, curves_of, ratio, results
from contest.page import (
    POINT_HEADER,
    SUMMARY_HEADER,
    cell_table,
    figures_table,
    insert,
    order_table,
    point_rows,
    shown_crossing,
    summary_row,
)

from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.history import TRIAL, StudyHistory
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy

LIMITS = (1000, 2000, 3000, 5000)
CELL = Cell("digits", 200, 5000)

TOY = """
from pathlib import Path

import numpy as np

from lcsc_opt.objective.contract import Objective
from lcsc_opt.base.records import Cost, Evaluation

CALLS = Path("calls.txt")


class Toy(Objective):
    steps = tuple(range(1, 6))
    images_per_evaluation = 1000
    cross_check_metric = "cross_check"

    def evaluate(self, candidate):
        with CALLS.open("a") as file:
            file.write(f"{candidate.noise.group} {candidate.coefficients.tolist()}\\n")
        if Path("stop").exists() and len(CALLS.read_text().splitlines()) == int(Path("stop").read_text()):
            raise KeyboardInterrupt
        loss = float(np.square(candidate.coefficients - 0.2).sum()) + 1
        images = candidate.images or 1000
        return Evaluation(loss, {"cross_check": 2 * loss}, Cost(images=images, model_calls=images, seconds=0.1))

    def describe(self):
        return {}


def build(settings):
    return Toy()
"""


def history(losses: Sequence[float], images: Sequence[int], pruned: Sequence[int] = ()) -> StudyHistory:
    """A study whose trials lost so much over so many images; a cross-check and two calls an image each."""
    trials = np.zeros(len(losses), dtype=TRIAL)
    trials["number"] = trials["tell_index"] = np.arange(len(losses))
    trials["state"] = TrialState.COMPLETE.value
    trials["loss"], trials["images"], trials["seconds"] = losses, images, 1
    trials["model_calls"] = 2 * trials["images"]
    trials["state"][list(pruned)] = TrialState.PRUNED.value
    return StudyHistory(0, "digits-200/LCSC/0", "digits-200", "LCSC", 0, trials)


def curves(held_out: Sequence[Sequence[float]], *, label: str = "CMA", random: bool = True, **changes: Any) -> Curves:
    """Rows of held-out FID over ``LIMITS``; the cross-check FID is twice as high."""
    values = np.array(held_out, dtype=np.float64)
    seeds, spent = tuple(range(len(values))), np.broadcast_to(np.array(LIMITS, dtype=np.float64), values.shape)
    columns = {
        "images": spent,
        "model_calls": spent,
        "seconds": spent / 100,
        "searched": values,
        "cross_check": 2 * values,
    }
    columns = {**columns, "chosen": np.full(len(values), np.nan), **changes}
    return Curves(label, seeds, np.array(LIMITS, dtype=np.float64), values, random=random, **columns)


class TestAnswers:
    def test_the_answer_is_the_best_trial_within_the_limit(self) -> None:
        found = answers(history([5, 3, 4, 2, 1], [1000] * 5), LIMITS)
        assert [(answer.limit, answer.trial, answer.searched) for answer in found] == [
            *[(1000, 0, 5), (2000, 1, 3), (3000, 1, 3), (5000, 4, 1)]
        ]

    def test_trials_that_do_not_compare_cost_and_answer_nothing(self) -> None:
        study = history([0.1, 9, 0.2, 8], [500, 1000, 1000, 1000], pruned=[0, 2])
        found = answers(study, LIMITS)
        assert [(answer.limit, answer.trial) for answer in found] == [(2000, 1), (3000, 1), (5000, 3)]
        assert [(answer.images, answer.model_calls, answer.seconds) for answer in found] == [
            *[(1500, 3000, 2), (2500, 5000, 3), (3500, 7000, 4)]
        ]

    def test_there_is_no_answer_before_the_first_trial_that_compares(self) -> None:
        assert answers(history([0.1], [1000], pruned=[0]), LIMITS) == []

    def test_a_search_that_has_ended_is_not_asked_again(self) -> None:
        assert [answer.limit for answer in answers(history([5, 3], [1000] * 2), LIMITS)] == [1000, 2000]

    def test_an_answer_that_is_not_measured_is_missed(self) -> None:
        found = answers(history([5, 3], [1000] * 2), LIMITS)
        assert measured(found, {"0": {"loss": 6.0, "cross_check": None}}) is None
        known = measured(found, {"0": {"loss": 6.0, "cross_check": None}, "1": {"loss": 4.0, "cross_check": 7.0}})
        assert known == [Measured(found[0], 6.0, None), Measured(found[1], 4.0, 7.0)]

    def test_a_search_that_has_ended_keeps_its_last_answer(self) -> None:
        points = [Measured(Answer(limit, 0, limit, limit, 1.0, 2.0), 5 - limit / 1000, None) for limit in (2000, 3000)]
        made = curves_of(Contender("CMA", "CMA"), {0: points}, LIMITS, {0: 1.5})
        np.testing.assert_array_equal(made.held_out, [[np.nan, 3, 2, 2]])
        assert (made.end, made.chosen.tolist()) == (3000, [1.5])


class TestCrossing:
    def test_the_mean_over_seeds_is_what_crosses(self) -> None:
        found = crossing(curves([[9, 1, 1, 1], [9, 9, 9, 3]]), np.array([5.0]))
        assert found.mean.value == 2000  # where the mean is 5, though one seed by itself takes 5,000
        assert (found.seeds.median, found.seeds.reached) == (3500, 2)

    def test_a_seed_that_never_reaches_is_counted(self) -> None:
        found = crossing(curves([[9, 1, 1, 1], [9, 9, 9, 9], [9, 9, 9, 9]]), np.array([2.0]))
        assert math.isinf(found.mean.value)
        assert (found.seeds.median, found.seeds.reached, found.seeds.seeds) == (None, 1, 3)
        assert shown_crossing(found).startswith("never [")
        assert shown_crossing(found).endswith("2 of 3 seeds not")

    def test_the_interval_reaches_beyond_the_budget_where_resampled_means_do(self) -> None:
        held_out = [[9, 8, 7, value] for value in (1.0, 2.0, 3.0, 4.0, 5.0)]
        found = crossing(curves(held_out), np.array([3.5])).mean
        assert (found.value, found.low, found.high) == (5000, 5000, math.inf)

    def test_the_target_is_resampled_too(self) -> None:
        fixed = curves([[9, 5, 3, 1]] * 5)
        assert crossing(fixed, np.array([4.0] * 5)).mean.high == 3000
        uncertain = crossing(fixed, np.array([1.0, 7.0, 1.0, 7.0, 4.0])).mean
        assert (uncertain.value, uncertain.low, uncertain.high) == (3000, 2000, math.inf)

    def test_before_every_seed_has_an_answer_the_mean_reaches_nothing(self) -> None:
        found = crossing(curves([[1, 1, 1, 1], [np.nan, np.nan, 1, 1]]), np.array([2.0]))
        assert found.mean.value == 3000

    def test_one_seed_gives_no_interval(self) -> None:
        assert crossing(curves([[9, 5, 3, 1]]), np.array([4.0])).mean.low is None


def test_the_interval_of_a_ratio_is_close_to_welch_on_logarithms() -> None:
    rng = np.random.default_rng(1)
    first, second = np.exp(0.1 * rng.standard_normal((2, 5)) + np.array([[1.0], [2.0]]))
    found = ratio(first, second)
    welch = scipy.stats.ttest_ind(np.log(first), np.log(second), equal_var=False).confidence_interval()
    assert found.value == pytest.approx(first.mean() / second.mean())
    assert found.low is not None
    assert found.high is not None
    assert math.log(found.high / found.low) == pytest.approx(welch.high - welch.low, rel=0.2)


class TestResults:
    CONTENDERS = (
        curves([[10, 10, 10, 10]], label="EMAGrid", random=False),
        curves([[9, 8, 7, 4], [9, 8, 7, 6]], label="LCSC"),
        curves([[9, 5, 2, 1.0], [9, 5, 2, 1.2]], label="CMA", cross_check=np.full((2, 4), 10.0)),
    )

    def test_the_best_is_first_and_others_are_compared_with_it(self) -> None:
        found = results(CELL, self.CONTENDERS, ema="EMAGrid", paper="LCSC")
        assert [result.label for result in found] == ["CMA", "LCSC", "EMAGrid"]
        assert found[0].verdict == "best"
        assert found[2].verdict == "worse"  # a search without chance is compared as if with every seed
        assert found[2].difference is not None
        assert found[2].difference.mean == pytest.approx(8.9)

    def test_gains_and_reach_are_against_ema_and_the_paper(self) -> None:
        cma = results(CELL, self.CONTENDERS, ema="EMAGrid", paper="LCSC")[0]
        assert cma.to_ema is not None
        assert cma.to_paper is not None
        assert cma.gain is not None
        assert (cma.to_ema.mean.value, cma.to_paper.mean.value) == (1000, 2000)
        assert cma.gain.value == pytest.approx(0.89)
        assert cma.transfer is not None  # the cross-check FID fell from 20 to 10: half, of gains of 0.9 and 0.88
        assert cma.transfer.value == pytest.approx((0.5 / 0.9 + 0.5 / 0.88) / 2)

    def test_at_a_tenth_is_a_share_of_the_papers_end(self) -> None:
        cell = Cell("digits", 200, 20_000)
        cma = results(cell, self.CONTENDERS, ema="EMAGrid", paper="LCSC")[0]
        assert cma.at_tenth is not None
        assert cma.at_tenth.value == pytest.approx(5 / 5)  # the mean at 2,000 over the mean at the end

    def test_without_baselines_nothing_is_claimed(self) -> None:
        [alone] = results(CELL, self.CONTENDERS[2:], ema="EMAGrid", paper="LCSC")
        assert (alone.to_ema, alone.to_paper, alone.at_tenth, alone.transfer) == (None,) * 4

    def test_tables_have_a_column_for_every_heading(self) -> None:
        found = results(CELL, self.CONTENDERS, ema="EMAGrid", paper="LCSC")
        table = [line for line in cell_table(CELL, found) if line.startswith("|")]
        assert len({line.count("|") for line in table}) == 1
        assert {len(summary_row(CELL, result)) for result in found} == {len(SUMMARY_HEADER)}
        assert {len(row) for row in point_rows(CELL, self.CONTENDERS)} == {len(POINT_HEADER)}
        assert any("without a gradient" in line and "1/2.5: 2,000" in line for line in figures_table(CELL, found))

    def test_the_order_has_a_column_for_every_cell(self) -> None:
        small = Cell("digits", 50, 5000)
        found = {CELL: results(CELL, self.CONTENDERS, ema="EMAGrid", paper="LCSC")}
        found[small] = results(small, self.CONTENDERS[:2], ema="EMAGrid", paper="LCSC")
        assert order_table(found) == [
            "| optimizer | digits, K = 200 | digits, K = 50 |",
            "| --- | --- | --- |",
            "| CMA | 1. 1.1 |  |",
            "| LCSC | 2. 5 | 1. 5 |",
            "| EMA* | 3. 10 | 2. 10 |",
        ]

    def test_figures_have_a_line_for_each_contender_and_one_for_ema(self) -> None:
        made = cost_curve(CELL, self.CONTENDERS)
        assert [trace.name for trace in made.data if trace.name] == ["LCSC (2 seeds)", "CMA (2 seeds)"]
        assert len(made.layout.shapes) == 1
        both = objective_figure({CELL: self.CONTENDERS, Cell("digits", 50, 5000): self.CONTENDERS})
        shown = [trace.name for trace in both.data if trace.name and trace.showlegend]
        assert shown == ["LCSC (2 seeds)", "CMA (2 seeds)"]


class TestPage:
    def test_only_what_is_between_the_markers_changes(self, tmp_path: Path) -> None:
        page = tmp_path / "page.md"
        page.write_text("before\n<!-- begin: tables -->\nold\n<!-- end: tables -->\nafter\n")
        for _ in range(2):
            insert(page, {"tables": ["", "new", "lines", ""]})
        assert page.read_text() == "before\n<!-- begin: tables -->\nnew\nlines\n<!-- end: tables -->\nafter\n"

    def test_a_page_without_the_marker_is_refused(self, tmp_path: Path) -> None:
        page = tmp_path / "page.md"
        page.write_text("<!-- begin: tables -->\n")
        with pytest.raises(ValueError, match="end: tables"):
            insert(page, {"tables": ["new"]})

    def test_the_documents_page_has_the_markers(self, tmp_path: Path) -> None:
        text = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text()
        page = tmp_path / "page.md"
        page.write_text(text)
        insert(page, {name: ["x"] for name in ("machine", "figures", "order", "tables", "pictures")})


class TestEntries:
    def test_every_study_has_a_name_of_its_own_and_can_be_planned(self) -> None:
        jobs = [working.Job("", cell, contender, 0) for cell in CELLS for contender in CONTENDERS]
        assert len({job.plan.name for job in jobs}) == len(jobs)

    def test_settings_of_one_optimizer_are_told_apart(self) -> None:
        names = {study_spec(CELL, Contender(label, "CMA")).name for label in ("CMA", "CMA small", "CMA 0.1")}
        assert names == {"digits-200", "digits-200.CMA-small", "digits-200.CMA-0-1"}

    @pytest.mark.parametrize("cell", [*CELLS, *QUICK_CELLS], ids=lambda cell: cell.name)
    def test_limits_hold_the_budget_and_its_shares(self, cell: Cell) -> None:
        assert cell.limits[-1] == cell.images
        assert {cell.images // 10, cell.images // 2} <= set(cell.limits)
        assert list(cell.limits) == sorted(set(cell.limits))

    def test_a_contender_may_get_a_share_of_the_budget(self) -> None:
        assert study_spec(CELLS[0], Contender("CMA", "CMA", share=0.1)).budget.images == CELLS[0].images // 10


@pytest.fixture
def toy(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Cell:
    """A cell whose objective writes down every evaluation; its images cost nothing."""
    (workplace / "objectives").mkdir()
    (workplace / "objectives" / "toy.py").write_text(TOY)
    monkeypatch.setitem(entries.TRAINING_STEPS, "toy", 5)
    monkeypatch.setitem(entries.SETTINGS, "toy", {})
    monkeypatch.setattr(working, "_EXPERIMENTS", {})
    return Cell("toy", 5, 20_000, held_out=2000, top=2)


def calls(group: str) -> list[str]:
    return [line for line in Path("calls.txt").read_text().splitlines() if line.startswith(f"{group} ")]


def test_an_interrupted_study_goes_on_and_measures_each_answer_once(toy: Cell) -> None:
    job = working.Job("sqlite:///toy.db", toy, Contender("LCSC", "LCSC"), 0)
    reader = HistoryReader(open_storage(job.url, write=True))
    for stop in (8, 28):  # in the search; when answers are measured
        Path("stop").write_text(str(stop))
        with pytest.raises(KeyboardInterrupt):
            working.search_and_measure(job)
        assert not working.is_done(reader, job)
    before = calls("held-out")[2:-1]  # two are of the final choice, the last one was interrupted
    assert before
    Path("stop").unlink()
    working.search_and_measure(job)
    after = calls("held-out")[len(before) + 3 :]
    assert after
    assert not set(before) & set(after)
    assert len(calls("search")) == 20 + 1  # one was interrupted
    [study] = reader.read_studies([job.plan.name])
    assert measured(answers(study, toy.limits), known(job)) is not None


def test_what_is_done_is_not_done_again(toy: Cell) -> None:
    job = working.Job("sqlite:///toy.db", toy, Contender("EMAGrid", "EMAGrid"), 0)
    reader = HistoryReader(open_storage(job.url, write=True))
    working.search_and_measure(job)
    assert working.is_done(reader, job)
    before = Path("calls.txt").read_text()
    working.search_and_measure(job)
    assert Path("calls.txt").read_text() == before
    stored(job).set_attribute("search_ended", None)
    assert not working.is_done(reader, job)


def known(job: working.Job) -> dict[str, Any]:
    return working.known_results(stored(job), job.cell)


def stored(job: working.Job) -> StoredStudy:
    return StoredStudy.open(open_storage(job.url, write=True), job.plan.name)
