from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.storages import RDBStorage

from lcsc_opt.base.records import Candidate, Evaluation
from lcsc_opt.coefficients.profiles import effective_count, sum_abs
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.history import StudyHistory
from lcsc_opt.database.inheriting import copy_study
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.database.summary import describe_coefficients
from lcsc_opt.views.patterns import (
    MOST_COLUMNS,
    as_heights,
    distances_of,
    improved_trials,
    movement_of,
    negative_share,
    profile_of,
    shape_of,
)
from tests.study_examples import STEPS, coefficients, write_study


@pytest.fixture
def storage(url: str) -> RDBStorage:
    return open_storage(url, write=True)


def read(storage: RDBStorage, experiment: str = "digits") -> tuple[HistoryReader, tuple[StudyHistory, ...]]:
    reader = HistoryReader(storage)
    return reader, reader.read(experiment)


def test_the_profile_of_a_study_is_its_answer(storage: RDBStorage) -> None:
    write_study(storage, "digits/LCSC/0", [4.0, 2.0, 1.0], held_out={"trial": 1, "loss": 2.75})
    reader, (study,) = read(storage)
    found = profile_of(reader, study)
    assert found is not None
    assert (found.trial, found.loss, found.held_out, found.label) == (1, 2.75, True, "LCSC")
    assert found.coefficients.tolist() == coefficients(1).tolist()
    assert found.steps.tolist() == list(STEPS)
    described = describe_coefficients(coefficients(1), STEPS)
    assert (found.sum_abs, found.effective, found.negative) == tuple(
        described[name] for name in ("sum_abs", "effective", "negative")
    )


def test_a_study_without_a_result_has_no_profile(storage: RDBStorage) -> None:
    write_study(storage, "digits/LCSC/0", [None], ended=False)
    reader, (study,) = read(storage)
    assert profile_of(reader, study) is None
    assert movement_of(reader, study).values.shape == (0, 3)
    assert len(shape_of(reader, study).trials) == 0
    assert distances_of(reader, [study]).labels == ()


def test_heights_are_densities_where_checkpoints_are_not_equally_far_apart() -> None:
    values = np.array([0.25, 0.25, 0.5])
    assert as_heights(values, np.array([100.0, 200, 300]))[1] is False
    heights, density = as_heights(values, np.array([100.0, 200, 400]))
    assert (density, heights.tolist()) == (True, [0.0025, 0.0025, 0.0025])


@given(st.integers(2, 12), st.data())
def test_the_area_of_a_density_is_the_coefficient(count: int, data: st.DataObject) -> None:
    intervals = np.array(data.draw(st.lists(st.integers(1, 50), min_size=count, max_size=count)), dtype=float)
    values = np.array(data.draw(st.lists(st.floats(-1, 1, allow_subnormal=False), min_size=count, max_size=count)))
    intervals[0] = intervals[1]
    heights, density = as_heights(values, np.cumsum(intervals))
    np.testing.assert_allclose(heights * intervals if density else heights, values, atol=1e-15)


def test_the_movement_shows_the_improvements_in_their_order(storage: RDBStorage) -> None:
    write_study(storage, "digits/LCSC/0", [4.0, 5.0, 3.0, None, 2.0, 2.0])
    reader, (study,) = read(storage)
    assert improved_trials(study) == [0, 2, 4]
    found = movement_of(reader, study)
    assert (found.trials.tolist(), found.losses.tolist(), found.improvements) == ([0, 2, 4], [4, 3, 2], 3)
    assert found.values.tolist() == [coefficients(number).tolist() for number in (0, 2, 4)]
    assert (found.width, found.steps.tolist()) == (1, list(STEPS))
    few = movement_of(reader, study, most=2)
    assert (few.trials.tolist(), few.improvements) == ([0, 4], 3)


def test_many_checkpoints_are_grouped_and_the_largest_stays_visible(storage: RDBStorage) -> None:
    count = 2 * MOST_COLUMNS + 1
    values = np.full(count, 0.001)
    values[[10, 11, 12, 13]] = [0.2, -0.3, 0.3, -0.2]
    values[-1] += 1 - values.sum()
    study = StoredStudy.open_or_create(storage, "digits/LCSC/0", {"steps": list(range(1, count + 1))})
    study.finish(study.add_candidate(Candidate(values)), Evaluation(1.0), tell_index=0)
    reader, (history,) = read(storage)
    found = movement_of(reader, history)
    assert found.width == 3
    assert found.values.shape == (1, 167)
    assert found.values[0, 3:5].tolist() == [-0.3, 0.3], "checkpoints 9 to 11 and 12 to 14"
    assert found.values[0, -1] == values[-1]
    assert found.steps[[0, -1]].tolist() == [3, count]


def test_the_shape_over_the_search_needs_no_coefficients(storage: RDBStorage) -> None:
    write_study(storage, "digits/LCSC/0", [4.0, 5.0, 3.0, None])
    reader, (study,) = read(storage)
    reader.coefficients = None  # type: ignore[method-assign,assignment]
    found = shape_of(reader, study)
    expected = [coefficients(number) for number in (0, 2, 2)]
    assert found.evaluations.tolist() == [1, 3, 4], "the last one is the end of the search"
    assert found.trials.tolist() == [0, 2, 2]
    np.testing.assert_allclose(found.sum_abs, [sum_abs(row) for row in expected])
    np.testing.assert_allclose(found.effective, [effective_count(row) for row in expected])
    np.testing.assert_allclose(found.negative, [negative_share(row) for row in expected], atol=1e-12)


def test_the_shape_of_inherited_trials_is_told_by_their_coefficients(storage: RDBStorage) -> None:
    copy_study(write_study(storage, "digits/LCSC/0", [4.0, 3.0]), "more/LCSC/0", {"steps": STEPS, "forked_from": "x"})
    reader, (study,) = read(storage, "more")
    np.testing.assert_allclose(shape_of(reader, study).sum_abs[:2], [sum_abs(coefficients(n)) for n in (0, 1)])


def test_distances_are_between_answers_over_the_same_checkpoints(storage: RDBStorage) -> None:
    write_study(storage, "digits/LCSC/0", [1.0])
    write_study(storage, "digits/CMA/0", [2.0, 1.0])
    write_study(storage, "digits/LCSC/1", [3.0, 2.0, 1.0])
    other = StoredStudy.open_or_create(storage, "digits/LCSC/2", {"steps": [1, 2]})
    other.finish(other.add_candidate(Candidate(np.array([0.5, 0.5]))), Evaluation(1.0), tell_index=0)
    reader, studies = read(storage)
    found = distances_of(reader, studies)
    assert found.labels == ("LCSC/0", "LCSC/1", "CMA/0")
    rows = [coefficients(number) for number in (0, 2, 1)]
    expected = [[float(np.linalg.norm(one - two)) for two in rows] for one in rows]
    np.testing.assert_allclose(found.matrix, expected, atol=1e-12)
