"""Studies as they are compared: what of one study counts, by the same rule for the final choice, curves and tables."""

from __future__ import annotations

import dataclasses

import optuna
import pytest
from optuna.storages import RDBStorage

from lcsc_opt.base.records import HELD_OUT, SEARCH, Candidate, Evaluation, Noise
from lcsc_opt.database.experiment import YARDSTICK
from lcsc_opt.database.history import Standing, ema_grid
from lcsc_opt.database.measurement import Model, Sample
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.states import compared_trials
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.views import loss_title
from lcsc_opt.views.curves import best_so_far
from tests.history_examples import history, measured, report_of
from tests.study_examples import add_result, coefficients, write_experiment, write_study


def read(study: StoredStudy) -> Standing:
    return HistoryReader(study.storage).read_study(study.name)


# one study


@pytest.mark.parametrize(("running", "state"), [(0, "empty"), (2, "interrupted")])
def test_a_study_without_a_result(storage: RDBStorage, running: int, state: str) -> None:
    found = read(write_study(storage, "digits/LCSC/0", [], ended=False, running=running))
    answer = HistoryReader(storage).answer(found)
    assert (found.state, found.searched, answer, found.chosen) == (state, None, None, None)
    assert best_so_far(found, "images").values.size == 0


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        ("fid", "FID"),
        ("kid@clip", "KID@clip"),
        ("fid@my_package.my_module:features", "FID@features"),
        ("accuracy@own", "accuracy@own"),
        ("score.loss", "loss"),
        (None, "loss"),
    ],
)
def test_the_loss_has_the_name_of_the_metric_that_it_is(storage: RDBStorage, metric: str | None, name: str) -> None:
    study = write_study(storage, "digits/LCSC/0", [2.0, 1.0], metric=metric)
    assert loss_title(read(study).metric) == name
    described = {YARDSTICK: {"metrics": {}, "kept": "precision"}}
    candidate = Candidate(coefficients(0))
    model = Model(YARDSTICK, candidate.coefficients)
    experiment = write_experiment(storage, "digits")
    experiment.add(YARDSTICK, model, candidate, Sample(SEARCH, 100), Evaluation(1.0), **described)
    found = read(study)
    assert found.metric == "loss", "it may have a penalty"


# losses of other noise, and of other numbers of images

FRESH = Noise("search", 7)


@pytest.fixture
def asked(storage: RDBStorage) -> StoredStudy:
    """As a gradient or a race leaves it: 0, 4 and 6 compare, and 1 has the lowest loss of all."""
    study = write_study(storage, "digits/LCSC/0", [9.0], ended=False)
    add_result(study, 1, 0.1, noise=FRESH)
    add_result(study, 2, 0.2, asked=2)
    add_result(study, 3, None)
    add_result(study, 4, 4.0)
    add_result(study, 5, 0.3, asked=40, noise=HELD_OUT)
    add_result(study, 6, 5.0)
    return study


def test_losses_that_do_not_compare_are_not_chosen_but_paid_for(asked: StoredStudy) -> None:
    found = read(asked)
    assert [trial.number for trial in compared_trials(asked.trials())] == [0, 4, 6]
    assert (found.summary.best, found.searched, found.chosen) == (4, 4.0, 4)
    assert (found.summary.evaluations, found.summary.cost.images, found.seconds) == (7, 82, 3.5)
    images = best_so_far(found, "images")
    assert (images.positions.tolist(), images.values.tolist(), images.end) == ([10, 32], [9, 4], 82)


def test_plain_optuna_names_the_same_best_trial(asked: StoredStudy) -> None:
    plain = optuna.load_study(study_name=asked.name, storage=asked.storage)
    assert (plain.best_trial.number, plain.best_value) == (4, 4.0)
    assert (plain.trials[1].state.name, plain.trials[1].value) == ("PRUNED", 0.1)


# an experiment


def test_ema_star_is_of_the_reports_grid_else_of_the_finished_one_with_the_lowest_searched_loss() -> None:
    one, two = (history([loss], optimizer="EMAGrid", seed=seed) for seed, loss in enumerate((1.0, 0.5)))
    others = [
        history([0.1], optimizer="Grid"),
        history([0.2], optimizer="EMAGrid", ended=False),  # its best may be to come
        history([None], optimizer="EMAGrid"),
    ]
    assert ema_grid([*others, one, two]) is two
    assert ema_grid(others) is None
    reported = dataclasses.replace(one, report=report_of({one.study: measured(3.0)}))
    assert ema_grid([*others, two, reported]) is reported
