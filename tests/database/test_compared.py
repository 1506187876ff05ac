"""Which losses compare: the same rule for the final choice, for curves and tables, and from the database."""

from __future__ import annotations

import math

import optuna
import pytest
from optuna.storages import RDBStorage

from lcsc_opt.base.records import HELD_OUT, SEARCH, Candidate, Cost, Evaluation, Noise
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.copying import copy_study
from lcsc_opt.database.history import StudyHistory
from lcsc_opt.database.names import compared_trials
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.views.curves import best_so_far, curves
from lcsc_opt.views.ranking import headline, ranking
from tests.study_examples import STEPS, coefficients

FRESH = Noise("search", 7)

# a study as a gradient or a race leaves it: number → loss, images, noise
ASKED = [
    (9.0, 10, SEARCH),
    (0.1, 10, FRESH),  # on noise of its own
    (0.2, 2, SEARCH),  # of few images
    (None, 10, SEARCH),
    (4.0, 10, SEARCH),
    (0.3, 40, HELD_OUT),  # of many
    (5.0, 10, SEARCH),
]


@pytest.fixture
def storage(url: str) -> RDBStorage:
    return open_storage(url, write=True)


def write(storage: RDBStorage, name: str, asked: list[tuple[float | None, int, Noise]]) -> StoredStudy:
    """As the runner does: images and noise with the candidate, where they are not the objective's own."""
    study = StoredStudy.open_or_create(storage, name, {"steps": STEPS, "budget": {"evaluations": 9, "images": None}})
    for number, (loss, images, noise) in enumerate(asked):
        own = images if images != 10 else None
        key = study.add_candidate(Candidate(coefficients(number), images=own, noise=noise))
        if loss is None:
            study.fail(key, [{"reason": "broken", "seconds": 0.5}], tell_index=number)
        else:
            evaluation = Evaluation(loss, {"fid": loss}, Cost(images=images, seconds=0.5))
            study.finish(key, evaluation, tell_index=number, compares=own is None and noise == SEARCH)
    return study


def read(storage: RDBStorage, study: StoredStudy) -> StudyHistory:
    return HistoryReader(storage).read_studies([study.name])[0]


def test_the_database_tells_which_losses_compare(storage: RDBStorage) -> None:
    study = write(storage, "digits/LCSC/0", ASKED)
    found = read(storage, study)
    losses = found.compared["loss"]
    assert [n for n, loss in enumerate(losses) if not math.isnan(loss)] == [0, 4, 6]
    assert [trial.number for trial in compared_trials(study.trials())] == [0, 4, 6]
    assert (found.best, found.searched, found.chosen) == (4, 4.0, 4)


def test_what_does_not_compare_is_paid_for_all_the_same(storage: RDBStorage) -> None:
    study = write(storage, "digits/LCSC/0", ASKED)
    found = read(storage, study)
    assert (found.searched, found.evaluations, found.images, found.seconds) == (4.0, 7, 82, 3.5)
    images = best_so_far(found, "images")
    assert (images.positions.tolist(), images.values.tolist(), images.end) == ([10, 32], [9, 4], 82)
    reach = ranking([found], value=4.0)[0].to_value
    assert (reach["images"].median, reach["evaluations"].median, reach["evaluation_seconds"].median) == (32, 5, 2.5)
    assert ranking([found], value=0.5)[0].to_value["images"].reached == 0


def test_plain_optuna_names_the_same_best_trial(storage: RDBStorage) -> None:
    """Trial 1, on noise of its own, has the lowest loss of all."""
    study = write(storage, "digits/LCSC/0", ASKED)
    plain = optuna.load_study(study_name=study.name, storage=storage)
    assert (plain.best_trial.number, plain.best_value) == (4, 4.0)
    other = plain.trials[1]
    assert (other.state.name, other.value) == ("PRUNED", 0.1)


def test_before_the_first_check_there_is_no_number(storage: RDBStorage) -> None:
    study = write(storage, "digits/LCSC/0", [(3.0, 2, FRESH), (2.0, 2, FRESH)])
    found = read(storage, study)
    assert (found.searched, found.chosen, found.metric) == (None, None, "loss")
    assert HistoryReader(storage).answer(found) is None
    assert (found.evaluations, found.images, found.state) == (2, 4, "unfinished")
    histories = [found]
    assert curves(histories, "images") == []
    assert headline(ranking(histories)) == "No result yet."
    assert ranking(histories)[0].searched is None


def test_trials_of_a_fork_keep_their_noise(storage: RDBStorage) -> None:
    copy_study(write(storage, "digits/LCSC/0", ASKED), "more/LCSC/0", {"steps": STEPS, "forked_from": "digits/LCSC/0"})
    assert read(storage, StoredStudy.open(storage, "more/LCSC/0")).best == 4
