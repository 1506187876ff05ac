"""Evaluations that fail: what is said of them, when they end a search, and how they are evaluated again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lcsc_opt.base.errors import ObjectiveError, SearchFailedError, TrajectoryError
from lcsc_opt.base.records import Candidate
from lcsc_opt.base.study_spec import BudgetSpec, FailureSpec, OptimizerSpec
from lcsc_opt.coefficients.profiles import default_origin
from lcsc_opt.coefficients.spaces import AffineSpace
from lcsc_opt.database.arrays import coefficients_of
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.evaluation.base import Failure, InProcessEvaluator
from lcsc_opt.objective.contract import CoefficientFunction
from lcsc_opt.optimizers import build_optimizer
from lcsc_opt.optimizers.driver import Driver
from lcsc_opt.study.loop import Loop
from lcsc_opt.views.study_status import overview

STEPS = (100, 200, 300, 400)
TWICE = FailureSpec(retries=1)
PATIENT = FailureSpec(retries=0, in_a_row=None)


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


def search(study: StoredStudy, function: Callable[[Any], float], evaluations: int = 8, **changes: Any) -> Loop:
    space = AffineSpace(STEPS, default_origin(STEPS))
    optimizer = build_optimizer(OptimizerSpec(name="LCSC"), space, budget=8, workers=1, seed=0)
    evaluator = InProcessEvaluator(CoefficientFunction(function, STEPS, name="function"))
    options = {"failures": PATIENT, **changes}
    found = Loop(
        study, Driver(lambda: optimizer, "a test"), evaluator, budget=BudgetSpec(evaluations=evaluations), **options
    )
    found.run()
    return found


def test_a_lowered_budget_that_only_reaches_failures_hides_no_later_success(study: StoredStudy) -> None:
    search(study, Breaking(0, 1), evaluations=4)
    assert search(study, bowl, evaluations=2).failed == 2
    assert states(study) == ["FAIL", "FAIL", "COMPLETE", "COMPLETE"]


class Killed(BaseException):
    """The end of a process."""


def rows(study: StoredStudy) -> list[tuple[int, str, float | None, bytes]]:
    """Of each ask: its place, and how it ended."""
    trials = enumerate(study.trials())
    return [(i, t.state.name, t.value, coefficients_of(t).tobytes()) for i, t in trials]


def undisturbed(study: StoredStudy, evaluations: int) -> list[tuple[int, str, float | None, bytes]]:
    """The rows of the same search without a failure."""
    clean = StoredStudy.open_or_create(study.storage, "clean/LCSC/0", {})
    search(clean, bowl, evaluations)
    return rows(clean)


def states(study: StoredStudy) -> list[str]:
    return [trial.state.name for trial in study.trials()]


def test_where_it_was_raised_repeats_no_line_of_a_reason_of_several_lines() -> None:
    def refuse(_: Any) -> float:
        raise ValueError("Error(s) in loading:\n\tMissing key\nUnexpected key")

    function = CoefficientFunction(refuse, STEPS, name="function")
    outcome = InProcessEvaluator(function).submit(Candidate(np.full(4, 0.25))).result()
    assert isinstance(outcome, Failure)
    place, *code = outcome.raised_at.splitlines()
    assert place.startswith(f'  File "{__file__}", line')
    assert code[0].strip().startswith("raise ValueError(")
    assert not [line for line in code if line.startswith(("ValueError", "\t"))]


def test_the_database_keeps_tracebacks_and_the_terminal_says_once_for_each_reason_where_it_was(
    study: StoredStudy, capsys: pytest.CaptureFixture[str]
) -> None:
    search(study, Breaking(2, 4, 5, reason="b"))
    said, line = capsys.readouterr().err, "return table[self.reason.format(call=self.calls - 1)]"
    assert said.count("e/LCSC/0: trial 2: KeyError: 'b'") == said.count("KeyError") == said.count(line) == 1
    assert "in attempt" not in said, "of the library's own frames, nothing"
    text = study.trials()[2].user_attrs["attempts"][0]["traceback"]
    assert text.endswith("KeyError: 'b'\n")
    assert f'File "{__file__}"' in text
    assert line in text
    reader = HistoryReader(study.storage)
    found = reader.read_study(study.name)
    assert overview(reader, found)["tracebacks"] == {"KeyError: 'b'": text}
    failures = reader.failures(found)
    assert [failure.traceback for failure in failures] == [text]


class TestManyInARow:
    @pytest.mark.parametrize("begun", [True, False])
    def test_a_file_that_is_gone_costs_five_candidates_and_not_the_budget(
        self, study: StoredStudy, begun: bool
    ) -> None:
        def moved(_: np.ndarray) -> float:
            raise TrajectoryError("runs.trajectory: no such file")

        if begun:
            search(study, bowl, evaluations=4)
        broken, said = (moved, "TrajectoryError: runs") if begun else (Breaking(*range(7, 99), reason="b"), "KeyError")
        with pytest.raises(SearchFailedError, match=rf"5 trials in a row failed .*; the last failed with: {said}"):
            search(study, broken, 16, failures=TWICE)
        assert study.retry_failed() == 5
        search(study, bowl, 16)
        assert rows(study) == undisturbed(study, 16)

    def test_a_success_in_between_lets_a_search_go_on(self, study: StoredStudy) -> None:
        search(study, Breaking(0, 1, 3, 4, 6, 7), failures=FailureSpec(retries=0, in_a_row=3))
        assert states(study) == ["FAIL", "FAIL", "COMPLETE"] * 2 + ["FAIL", "FAIL"]

    def test_failures_of_an_earlier_run_do_not_count(self, study: StoredStudy) -> None:
        policy = FailureSpec(retries=0, in_a_row=3)
        with pytest.raises(SearchFailedError, match="3 trials in a row"):
            search(study, Breaking(2, 3, 4), failures=policy)
        search(study, Breaking(0, 1), failures=policy)
        assert states(study) == ["COMPLETE"] * 2 + ["FAIL"] * 5 + ["COMPLETE"]


class TestRetryFailed:
    def test_what_had_no_result_yet_is_forgotten_too_and_is_no_failure(self, study: StoredStudy) -> None:
        search(study, Breaking(6, 7))
        study.add_candidate(Candidate(np.full(4, 0.25)))  # it was running when a crash came
        assert study.retry_failed() == 2
        assert states(study) == 6 * ["COMPLETE"]
        search(study, bowl)
        assert rows(study) == undisturbed(study, 8)

    def test_what_failed_before_a_success_stays_failed(self, study: StoredStudy) -> None:
        search(study, Breaking(1, 4))
        assert study.retry_failed() == 0
        assert states(study).count("FAIL") == 2

    def test_a_crash_on_the_way_leaves_a_study_that_goes_on(
        self, study: StoredStudy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        search(study, Breaking(7))
        study.set_attribute("search_ended", {"evaluations": 8, "exhausted": False})
        written, write = iter(range(9)), study.storage.set_study_user_attr

        def interrupted(key: int, name: str, value: Any) -> None:
            if next(written) == 2:
                raise Killed
            write(key, name, value)

        monkeypatch.setattr(study.storage, "set_study_user_attr", interrupted)
        with pytest.raises(Killed):
            study.retry_failed()
        assert study.attributes["search_ended"] is None


def test_an_error_of_ours_prints_one_line_without_the_code_that_raised_it(
    study: StoredStudy, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(coefficients: np.ndarray) -> float:
        raise ObjectiveError("no model")

    with pytest.raises(SearchFailedError):
        search(study, refuse)
    printed = capsys.readouterr().err
    assert "ObjectiveError: no model" in printed
    assert "  File" not in printed
