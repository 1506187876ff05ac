"""Evaluations that fail: what is said of them, when they end a search, and how they are evaluated again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from optuna.trial import TrialState

from lcsc_opt.base.errors import MetricError, SearchFailedError, TrajectoryError
from lcsc_opt.base.study_file import BudgetSpec, FailureSpec, OptimizerSpec
from lcsc_opt.coefficients.profiles import default_origin
from lcsc_opt.coefficients.spaces import AffineSpace
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.evaluation import InProcessEvaluator
from lcsc_opt.objective.contract import CoefficientFunction
from lcsc_opt.optimizers import build_optimizer
from lcsc_opt.search.runner import Search
from lcsc_opt.views.progress import failures_of, overview

STEPS = (100, 200, 300, 400)
TWICE = FailureSpec(retries=1)
PATIENT = FailureSpec(retries=0, stop_share=1.0)


def bowl(coefficients: np.ndarray) -> float:
    return float(np.square(coefficients - [0.7, -0.2, 0.1, 0.4]).sum())


class Breaking:
    """The bowl; the calls of these numbers raise."""

    def __init__(self, *broken: int, reason: str = "{call}") -> None:
        self.broken, self.reason, self.calls = broken, reason, 0

    def __call__(self, coefficients: np.ndarray) -> float:
        self.calls += 1
        if self.calls - 1 in self.broken:
            table: dict[str, float] = {}
            return table[self.reason.format(call=self.calls - 1)]
        return bowl(coefficients)


@pytest.fixture
def study(url: str) -> StoredStudy:
    return StoredStudy.open_or_create(open_storage(url, write=True), "e/LCSC/0", {"steps": STEPS})


def search(study: StoredStudy, function: Callable[[Any], float], evaluations: int = 8, **changes: Any) -> Search:
    space = AffineSpace(STEPS, default_origin(STEPS))
    options = {"optimizer": "LCSC", "failures": PATIENT, "on_tell": lambda _: None, **changes}
    on_tell = options.pop("on_tell")
    optimizer = build_optimizer(OptimizerSpec(name=options.pop("optimizer")), space, budget=8, workers=1, seed=0)
    evaluator = options.pop("evaluator", InProcessEvaluator(CoefficientFunction(function, STEPS, name="function")))
    found = Search(study, optimizer, evaluator, budget=BudgetSpec(evaluations=evaluations), **options)
    found.run(on_tell)
    return found


class Killed(BaseException):
    """The end of a process."""


def rows(study: StoredStudy) -> list[tuple[int, str, float | None, bytes]]:
    """Of each ask: its place, and how it ended, at its second try where it has one."""
    trials = study.trials()
    again = {t.user_attrs["retry_of"]: t for t in trials if "retry_of" in t.user_attrs}
    found = [again.get(t.number, t) for t in trials if "retry_of" not in t.user_attrs]
    return [(i, t.state.name, t.value, np.array(t.user_attrs["coefficients"]).tobytes()) for i, t in enumerate(found)]


@pytest.mark.parametrize("written", [1, 2, 3])  # attempts, reason, cost; the state comes last
def test_a_failure_that_a_crash_cut_off_is_not_evaluated_again(
    study: StoredStudy, written: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, names = study.storage.set_trial_user_attr, list[str]()

    def cut_off(trial_id: int, name: str, value: Any) -> None:
        write(trial_id, name, value)
        if names or (name == "attempts" and len(value) == 2):
            names.append(name)
        if len(names) == written:
            raise Killed

    twice = FailureSpec(retries=1, stop_share=1.0)
    monkeypatch.setattr(study.storage, "set_trial_user_attr", cut_off)
    with pytest.raises(Killed):
        search(study, Breaking(0, 1, reason="b"), failures=twice)
    monkeypatch.undo()
    going_on = Breaking()
    search(study, going_on, failures=twice)
    [first, *others] = study.trials()
    assert first.state == TrialState.FAIL
    assert len(first.user_attrs["attempts"]) == 2
    assert going_on.calls == len(others) == 7


class TestTracebacks:
    def test_the_database_keeps_them_and_everything_shows_them(self, study: StoredStudy) -> None:
        search(study, Breaking(2, reason="b"))
        text = study.trials()[2].user_attrs["attempts"][0]["traceback"]
        assert text.endswith("KeyError: 'b'\n")
        assert f'File "{__file__}"' in text
        assert "return table[self.reason.format(call=self.calls - 1)]" in text
        assert overview(study)["tracebacks"] == {"KeyError: 'b'": text}
        [history] = HistoryReader(study.storage).read_studies([study.name])
        assert [failure.traceback for failure in failures_of(history)] == [text]

    def test_the_terminal_says_where_it_was_once_for_each_reason(
        self, study: StoredStudy, capsys: pytest.CaptureFixture[str]
    ) -> None:
        search(study, Breaking(2, 4, 5, reason="b"))
        said = capsys.readouterr().err
        assert said.count("e/LCSC/0: trial 2: KeyError: 'b'") == said.count("KeyError") == 1
        assert "return table[self.reason" in said
        assert "in attempt" not in said, "of the library's own frames, nothing"


class TestNothingCanSucceed:
    def test_the_same_error_again_and_again_before_any_success_ends_the_search(self, study: StoredStudy) -> None:
        broken = Breaking(*range(99), reason="b")
        with pytest.raises(
            SearchFailedError, match=r"raised the same error at each attempt.*KeyError: 'b'.*--retry-failed"
        ):
            search(study, broken, failures=FailureSpec(retries=2))
        assert (broken.calls, len(study.trials())) == (3, 1)

    def test_other_errors_each_time_do_not(self, study: StoredStudy) -> None:
        search(study, Breaking(0, 1, 2), failures=FailureSpec(retries=2))
        assert [trial.state.name for trial in study.trials()] == ["FAIL"] + 7 * ["COMPLETE"]

    def test_a_file_that_is_gone_costs_a_resumed_study_two_candidates_and_not_its_budget(
        self, study: StoredStudy
    ) -> None:
        def moved(_: np.ndarray) -> float:
            raise TrajectoryError("runs.trajectory: no such file")

        search(study, bowl, evaluations=4)
        with pytest.raises(SearchFailedError, match=r"at each attempt, 2 in a row: TrajectoryError: runs.*no such"):
            search(study, moved, evaluations=20, failures=FailureSpec(retries=2))
        assert study.retry_failed() == (0, 2)
        search(study, bowl, evaluations=20)
        clean = StoredStudy.open_or_create(study.storage, "clean/LCSC/0", {})
        search(clean, bowl, evaluations=20)
        assert rows(study) == rows(clean)

    def test_one_candidate_that_always_fails_does_not_end_a_resumed_study(self, study: StoredStudy) -> None:
        search(study, bowl, evaluations=4)
        search(study, Breaking(0, 1, 2, reason="b"), failures=FailureSpec(retries=2))
        assert [trial.state.name for trial in study.trials()] == 4 * ["COMPLETE"] + ["FAIL"] + 3 * ["COMPLETE"]

    def test_candidates_that_are_not_finite_do_not(self, study: StoredStudy) -> None:
        values = iter(range(99))

        def diverging(coefficients: np.ndarray) -> float:
            if next(values) < 3:
                raise MetricError("samples are not finite")
            return bowl(coefficients)

        search(study, diverging)
        assert [trial.state.name for trial in study.trials()] == 3 * ["FAIL"] + 5 * ["COMPLETE"]

    def test_a_file_that_goes_during_a_search_costs_it_five_candidates(self, study: StoredStudy) -> None:
        with pytest.raises(SearchFailedError, match=r"raised the same error .* 5 in a row: KeyError: 'gone'"):
            search(study, Breaking(*range(7, 99), reason="gone"), 40, failures=TWICE)
        assert study.retry_failed() == (0, 5)
        search(study, bowl, 40)
        clean = StoredStudy.open_or_create(study.storage, "clean/LCSC/0", {})
        search(clean, bowl, 40)
        assert rows(study) == rows(clean)


class TestRetryFailed:
    def test_what_failed_at_the_end_is_forgotten_and_the_search_goes_on_as_if_it_had_not(
        self, study: StoredStudy
    ) -> None:
        search(study, Breaking(3, 4, 5, 6, 7))
        assert study.retry_failed() == (0, 5)
        assert [row[1] for row in rows(study)] == 3 * ["COMPLETE"]
        search(study, bowl)
        clean = StoredStudy.open_or_create(study.storage, "clean/LCSC/0", {})
        search(clean, bowl)
        assert rows(study) == rows(clean)

    @pytest.mark.parametrize("changes", [{}, {"in_flight": 3}, {"in_flight": 3, "tells": "as-completed"}])
    def test_what_failed_before_a_success_gets_its_result_and_the_search_stays_what_it_was(
        self, study: StoredStudy, changes: dict[str, Any]
    ) -> None:
        search(study, Breaking(1, 4), **changes)
        before = rows(study)
        assert study.retry_failed() == (2, 0)
        found = search(study, bowl, evaluations=12, **changes)
        after = rows(study)
        assert (found.told, found.failures) == (12, 0)
        assert [row[3] for row in after[:8]] == [row[3] for row in before], "the same candidates"
        assert [row[1] for row in after] == 12 * ["COMPLETE"]
        assert [after[number][2] for number in (1, 4)] == [
            bowl(np.frombuffer(after[number][3], dtype=np.float64)) for number in (1, 4)
        ]
        [history] = HistoryReader(study.storage).read_studies([study.name])
        assert (history.evaluations, len(history.failed)) == (12, 0)
        search(study, bowl, evaluations=14, **changes)  # and is replayed again
        assert rows(study)[:12] == after

    def test_a_second_try_that_a_crash_interrupted_is_evaluated_under_its_number(self, study: StoredStudy) -> None:
        def killed(coefficients: np.ndarray) -> float:
            raise Killed

        search(study, Breaking(1, 4))
        study.retry_failed()
        with pytest.raises(Killed):
            search(study, killed)
        assert [trial.state.name for trial in study.trials()[8:]] == ["RUNNING"]
        search(study, bowl)
        assert [trial.user_attrs["retry_of"] for trial in study.trials()[8:]] == [1, 4]
        assert [row[1] for row in rows(study)] == 8 * ["COMPLETE"]

    def test_one_that_fails_again_stays_failed_and_may_be_tried_once_more(self, study: StoredStudy) -> None:
        search(study, Breaking(1))
        study.retry_failed()
        search(study, Breaking(0), evaluations=9)
        assert [row[1] for row in rows(study)] == ["COMPLETE", "FAIL"] + 7 * ["COMPLETE"]
        search(study, bowl, evaluations=9)
        assert rows(study)[1][1] == "FAIL", "not without being asked"
        assert study.retry_failed() == (1, 0)
        search(study, bowl, evaluations=9)
        assert [row[1] for row in rows(study)] == 9 * ["COMPLETE"]

    def test_a_better_result_than_any_is_the_best(self, study: StoredStudy) -> None:
        values = iter([5.0, float("nan"), 4.0, 3.0, 2.0, 1.0, 7.0, 8.0])
        search(study, lambda _: next(values))
        study.retry_failed()
        found = search(study, lambda _: 0.5, evaluations=8)
        assert found.best == (0.5, 8)
        assert overview(study)["best_trial"] == 8

    def test_a_crash_on_the_way_leaves_a_study_that_goes_on(
        self, study: StoredStudy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        search(study, Breaking(1))
        study.set_attribute("search_ended", {"evaluations": 8, "exhausted": False})
        written, write = 0, study.set_attribute

        def interrupted(name: str, value: Any) -> None:
            nonlocal written
            written += 1
            if written == 3:
                raise Killed
            write(name, value)

        monkeypatch.setattr(study, "set_attribute", interrupted)
        with pytest.raises(Killed):
            study.retry_failed()
        assert study.attributes["search_ended"] is None
