from __future__ import annotations

import dataclasses
import json
import statistics
from typing import Any

import numpy as np
import pytest
from optuna.storages import RDBStorage

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.coefficients.profiles import describe_coefficients
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.history import StudyHistory, best_ema
from lcsc_opt.database.names import is_ours, split_name
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.report import HeldOut, MetricRow
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.views.curves import best_so_far
from lcsc_opt.views.ranking import different_samples, ranking
from tests.history_examples import history
from tests.study_examples import STEPS, coefficients, write_study


@pytest.fixture
def storage(url: str) -> RDBStorage:
    return open_storage(url, write=True)


def read(storage: RDBStorage, study: StoredStudy) -> StudyHistory:
    return HistoryReader(storage).read_study(study.name)


def summary(searched: float | None = 1.0, held_out: float | None = None, **changes: Any) -> StudyHistory:
    """Made by hand: a finished study with one seed."""
    sample = changes.pop("sample", (None, (0,)))
    ema = changes.pop("ema", None)
    row = MetricRow("loss", 1, held_out or 0.0, against=None if ema is None else "EMA*", baseline=ema)
    answer = None if held_out is None else HeldOut(0, held_out, sample[0], sample[1], (row,))
    return dataclasses.replace(history([searched, *changes.pop("more", ())], **changes), held_out=answer)


# one study


def test_a_finished_study(storage: RDBStorage) -> None:
    study = write_study(storage, "digits/LCSC/3", [4.0, 2.0, None, 3.0, 1.0, 1.5])
    reader = HistoryReader(storage)
    found = reader.read_study(study.name)
    assert (found.study, found.optimizer, found.seed, found.state) == ("digits/LCSC/3", "LCSC", 3, "finished")
    assert (found.searched, found.held_out) == (1.0, None)
    assert (found.evaluations, len(found.failed), found.images, found.seconds) == (6, 1, 50, 3.0)
    assert (found.steps, found.budget) == (STEPS, {"evaluations": 9})
    assert found.chosen == 4
    assert (answer := reader.answer(found)) is not None
    assert answer.tobytes() == coefficients(4).tobytes()
    curve = best_so_far(found, "evaluations")
    assert (curve.positions.tolist(), curve.values.tolist(), curve.end) == ([1, 2, 5], [4, 2, 1], 6)


def test_a_row_is_what_the_command_line_prints(storage: RDBStorage) -> None:
    row = read(storage, write_study(storage, "digits/LCSC/3", [4.0, 2.0])).as_row()
    assert json.loads(json.dumps(row)) == {
        "study": "digits/LCSC/3",
        "optimizer": "LCSC",
        "seed": 3,
        "state": "finished",
        "searched": 2.0,
        "held_out": None,
        "held_out_images": None,
        "evaluations": 2,
        "images": 20,
        "seconds": 1.0,
        "held_out_rows": [],
    }


def test_the_trial_chosen_on_held_out_noise_is_the_answer(storage: RDBStorage) -> None:
    study = write_study(storage, "digits/LCSC/0", [4.0, 2.0, 1.0, 3.0], held_out={"trial": 1, "loss": 2.75})
    reader = HistoryReader(storage)
    found = reader.read_study(study.name)
    assert (found.searched, found.held_out_loss, found.chosen) == (1.0, 2.75, 1)
    assert (answer := reader.answer(found)) is not None
    assert answer.tolist() == coefficients(1).tolist()


def test_a_study_that_was_interrupted(storage: RDBStorage) -> None:
    found = read(storage, write_study(storage, "digits/LCSC/0", [4.0, 2.0], ended=False, running=3))
    assert (found.state, found.evaluations, found.images, found.searched) == ("unfinished", 2, 20, 2.0)


@pytest.mark.parametrize(("running", "state"), [(0, "empty"), (2, "unfinished")])
def test_a_study_without_a_result(storage: RDBStorage, running: int, state: str) -> None:
    reader = HistoryReader(storage)
    found = reader.read_study(write_study(storage, "digits/LCSC/0", [], ended=False, running=running).name)
    assert (found.state, found.searched, reader.answer(found), found.chosen) == (state, None, None, None)
    assert best_so_far(found, "images").values.size == 0


METRICS = [
    ("fid", "FID"),
    ("kid@clip", "KID@clip"),
    ("fid@my_package.my_module:features", "FID@features"),
    (None, "loss"),
]


@pytest.mark.parametrize(("metric", "name"), METRICS)
def test_the_loss_has_the_name_of_the_metric_that_it_is(storage: RDBStorage, metric: str | None, name: str) -> None:
    assert read(storage, write_study(storage, "digits/LCSC/0", [2.0, 1.0], metric=metric)).metric == name


def test_a_loss_that_may_have_a_penalty_is_no_metric(storage: RDBStorage) -> None:
    study = write_study(storage, "digits/LCSC/0", [2.0, 1.0])
    study.set_attribute("specification", {"objective": {"file": "digits.py", "settings": {"keep": "precision"}}})
    found = read(storage, study)
    assert (found.metric, found.keeps) == ("loss", True)


@pytest.mark.parametrize(
    ("name", "parts"), [("digits/LCSC/0", ("digits", "LCSC", 0)), ("a/b/EMAGrid/12", ("a/b", "EMAGrid", 12))]
)
def test_names_of_ours_have_three_parts(name: str, parts: tuple[str, str, int]) -> None:
    assert split_name(name) == parts
    assert is_ours(name)


@pytest.mark.parametrize("name", ["digits", "digits/LCSC", "digits/LCSC/x", "digits/LCSC/-1", "digits/LCSC/", ""])
def test_other_names_are_not_ours(name: str) -> None:
    assert not is_ours(name)
    with pytest.raises(StudyStoreError, match="their names are experiment/optimizer/seed"):
        split_name(name)


# an experiment


def test_the_best_ema_is_the_grid_with_the_lowest_held_out_loss() -> None:
    one = summary(optimizer="EMAGrid", study="one", searched=1.0, held_out=3.0)
    two = summary(optimizer="EMAGrid", study="two", searched=2.0, held_out=2.5)
    three = summary(optimizer="EMAGrid", study="three", searched=0.5)
    power = summary(optimizer="PowerEMAGrid", study="power", searched=0.1, held_out=0.1)
    empty = summary(optimizer="EMAGrid", study="empty", searched=None)
    assert best_ema([power, empty, one, two, three]) is two
    assert best_ema([one, summary(optimizer="EMAGrid", searched=0.7)]) is one
    assert best_ema([three, summary(optimizer="EMAGrid", searched=0.7)]) is three
    assert best_ema([power, empty]) is None
    stopped = summary(optimizer="EMAGrid", searched=0.2, held_out=0.1, ended=False)  # its best may be to come
    assert best_ema([stopped, one]) is one
    assert best_ema([stopped]) is None


def test_over_seeds_are_means_and_sample_standard_deviations() -> None:
    studies = [
        summary(searched, held_out, seed=seed, more=[7.0] * (evaluations - 1), seconds=0.5)
        for seed, searched, held_out, evaluations in ((0, 1.0, 2.0, 3), (1, 2.0, 4.0, 5), (2, 6.0, 9.0, 4))
    ]
    (row,) = ranking(studies)
    assert (row.optimizer, row.label, row.seeds) == ("LCSC", "LCSC", 3)
    assert row.searched == (3.0, pytest.approx(statistics.stdev([1, 2, 6])))
    assert row.held_out == (5.0, pytest.approx(statistics.stdev([2, 4, 9])))  # type: ignore[unreachable]
    assert (row.evaluations, row.images, row.seconds) == (4.0, 40.0, 2.0)
    assert row.below_ema is None


def test_a_single_seed_has_no_spread_and_a_missing_value_is_left_out() -> None:
    (one,) = ranking([summary(searched=2.0)])
    assert (one.searched, one.held_out) == ((2.0, None), None)
    (two,) = ranking([summary(searched=2.0, held_out=3.0), summary(seed=1, searched=None, held_out=None)])
    assert (two.seeds, two.searched, two.held_out) == (2, (2.0, None), (3.0, None))


def test_losses_are_compared_with_the_best_ema() -> None:
    rows = ranking(
        [
            summary(optimizer="EMAGrid", searched=9.0, held_out=10.0),
            summary(optimizer="LCSC", seed=0, held_out=3.0),
            summary(optimizer="LCSC", seed=1, held_out=5.0),
            summary(optimizer="CMA", held_out=None, searched=0.1),
        ]
    )
    assert {row.optimizer: row.below_ema for row in rows} == {
        "LCSC": pytest.approx(-0.6),
        "EMAGrid": 0.0,
        "CMA": None,
    }
    assert [row.optimizer for row in rows] == ["LCSC", "EMAGrid", "CMA"], "the best held-out first"


def test_a_table_compares_losses_of_the_same_noise_only() -> None:
    ema = summary(study="digits/EMAGrid/0", optimizer="EMAGrid", held_out=10.0, sample=(10_000, (0,)))
    alike = summary(optimizer="CMA", held_out=3.0, sample=(10_000, (0,)))
    other = summary(held_out=2.0, sample=(50_000, (0,)))
    beside = summary(optimizer="DE", held_out=2.0, sample=(50_000, (0,)), ema=8.0)
    rows = {row.optimizer: row.below_ema for row in ranking([ema, alike, other, beside])}
    assert rows == {"EMAGrid": 0, "CMA": pytest.approx(-0.7), "LCSC": None, "DE": pytest.approx(-0.75)}
    assert "lcsc evaluate" in (different_samples([ema, other]) or "")
    assert different_samples([ema, alike]) is None


# patterns


def test_coefficients_are_described_by_a_few_numbers() -> None:
    found = describe_coefficients(np.array([-0.5, 0.25, 2.0, -0.75]), (10, 20, 30, 40))
    assert found == {
        "sum_abs": 3.5,
        "negative": pytest.approx(1.25 / 3.5),
        "effective": pytest.approx(3.5**2 / (0.25 + 0.0625 + 4 + 0.5625)),
        "largest": 2.0,
        "largest_step": 30,
    }
    json.dumps(found)
