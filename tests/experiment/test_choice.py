"""The race of the choice: what is worse leaves, what is left is measured on more images, and a share of the search."""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from lcsc_opt.base.jackknife import GROUPS
from lcsc_opt.base.records import SEARCH, Evaluation, Noise, ReportedMetrics
from lcsc_opt.coefficients.profiles import average_name
from lcsc_opt.database.arrays import coefficients_of, stored_array
from lcsc_opt.database.measurement import Measurement, Model
from lcsc_opt.experiment.choice import FEWEST_IMAGES, MOST_IMAGES, SHARE_OF_SEARCH, Race
from lcsc_opt.experiment.finalists import Searched
from tests.commands import become_a_terminal

STEPS = (1, 2, 3)
NAME = functools.partial(average_name, steps=STEPS)
PER_EVALUATION = 2000
GRID, PATH = "small/EMAGrid/0", "small/LCSCGradient/0"


def trial(number: int, place: float, *, gradient: bool = False, images: int | None = None) -> FrozenTrial:
    """A model at a place of a line, whose true loss is the distance from 1."""
    coefficients = np.array([place, 1 - place, 0.0])
    attributes: dict[str, Any] = {"coefficients": stored_array(coefficients)}
    if images is not None:
        attributes["images"] = images
    if gradient:
        attributes["gradient"] = stored_array(coefficients)
    state = TrialState.PRUNED if gradient else TrialState.COMPLETE
    found = create_trial(
        state=state,
        value=abs(place - 1),
        params={"x": 0.0},
        distributions={"x": FloatDistribution(0, 1)},
        user_attrs=attributes,
    )
    found.number = number
    return found


def path(checks: Sequence[float], *, steps: int = 10, images: int = 100) -> Searched:
    """A search with so many steps before each check, which is where they end."""
    trials: list[FrozenTrial] = []
    for place in checks:
        trials += [trial(len(trials) + step, place, gradient=True, images=images) for step in range(steps)]
        trials.append(trial(len(trials), place))
    return Searched(PATH, trials)


GRID_SEARCH = Searched(GRID, [trial(0, 0.0), trial(1, 0.2)])


class Measuring:
    """Stands for a measurer: losses are the distance from 1, with this error of each model's own."""

    def __init__(self, error: Callable[[float], float] = lambda _: 0.0) -> None:
        self.images = 10_000
        self.fails_after_first_round = False
        self.judges_from_round = 0
        self.reported = ReportedMetrics()
        self.objective = SimpleNamespace(
            sampler=object(), samples=SimpleNamespace(per_evaluation=PER_EVALUATION), average_name=NAME
        )
        self.experiment = SimpleNamespace(name="small")
        self.error = error
        self.asked: list[tuple[str, int, Noise]] = []

    @staticmethod
    def fid_of(model: Model) -> float:
        return 1 + max(float(model.coefficients[0]) - 0.5, 0.0)

    def changed(self, images: int) -> Any:
        other = copy.copy(self)
        other.images = images
        return other

    def possible(self, noises: Sequence[Noise], models: Iterable[Model]) -> list[Measurement]:
        measured = []
        for model in models:
            place = float(model.coefficients[0])
            self.asked += [(model.name, self.images, noise) for noise in noises]
            if self.fails_after_first_round and noises[0].seed > 0:
                continue
            draws = np.random.default_rng(abs(hash(model.key)) % 2**32).standard_normal(GROUPS)
            column = 1 + abs(place - 1) + self.error(place) * draws / np.sqrt(GROUPS)
            # what the searches found is worse in the network of their loss
            fid = self.fid_of(model) if noises[0].seed >= self.judges_from_round else 1.0
            groups = {"loss": [*column, *np.full(GROUPS, 1.0)], "fid": np.full(2 * GROUPS, fid).tolist()}
            evaluation = Evaluation(1 + abs(place - 1), {"fid": fid}, without_groups=groups)
            measured.append(Measurement.of(model, evaluation, images=self.images, seed=noises[0].seed))
        return measured


def race(measuring: Measuring, *searches: Searched, top: int = 3) -> Any:
    trained = [Model("last checkpoint", np.array([-0.1, 1.1, 0.0]))]
    return Race(list(searches), trained, measuring, top=top).run()  # type: ignore[arg-type]


def test_what_is_certainly_worse_is_measured_once_and_the_rest_on_more_images() -> None:
    measuring = Measuring(lambda place: 0.02 if place > 0.8 else 0.0)
    choice = race(measuring, GRID_SEARCH, path([0.5, 0.88, 0.9, 0.89], images=2000))
    first = {name for name, _, noise in measuring.asked if noise.seed == 0}
    later = {name for name, _, noise in measuring.asked if noise.seed > 0}
    assert {"last checkpoint", "LCSCGradient, trial 10"} <= first - later
    assert later
    assert choice.answer.name in later
    assert choice.answer.name not in choice.equals
    assert set(choice.equals) < later
    assert choice.knows_errors
    assert choice.is_on_path
    assert [model.name for model in choice.had] == ["last checkpoint", "EMA*"]


def test_each_seed_of_a_search_has_a_best_model_of_its_own_and_ema_star_is_one_model() -> None:
    seed_1 = dataclasses.replace(path([0.6, 0.8]), study="small/LCSCGradient/1")
    choice = race(Measuring(), GRID_SEARCH, path([0.5, 0.9]), seed_1)
    assert choice.found[PATH].name.startswith("LCSCGradient, ")
    assert choice.found[seed_1.study].name.startswith("LCSCGradient (seed 1), ")
    assert [model.name for model in choice.models].count("EMA*") == 1


@pytest.mark.parametrize("searches", [[GRID_SEARCH], [path([0.5, 0.9])], [GRID_SEARCH, path([0.5, 0.9])]])
def test_as_many_models_are_announced_as_are_measured(
    searches: list[Searched], monkeypatch: pytest.MonkeyPatch
) -> None:
    measuring = Measuring()
    measuring.objective.samples.per_evaluation = (
        100_000  # no model is left out of the first round because images are few
    )
    terminal = become_a_terminal(monkeypatch)
    race(measuring, *searches)
    announced = re.findall(r"small: choosing: .* 0/(\d+) ", terminal.getvalue())
    assert {int(total) for total in announced} == {len([name for name, _, noise in measuring.asked if noise.seed == 0])}


def test_where_one_model_is_left_nothing_more_is_measured() -> None:
    measuring = Measuring()
    choice = race(measuring, GRID_SEARCH, path([0.5, 0.9], images=2000))
    assert {noise.seed for _, _, noise in measuring.asked} == {0}
    assert (choice.equals, choice.answer.study) == ((), PATH)


def test_where_a_later_round_fails_for_all_models_the_one_before_chooses() -> None:
    measuring = Measuring(lambda place: 0.02 if place > 0.8 else 0.0)
    measuring.fails_after_first_round = True
    choice = race(measuring, GRID_SEARCH, path([0.5, 0.88, 0.9, 0.89], images=2000))
    assert {noise.seed for _, _, noise in measuring.asked} == {0, 1}
    assert choice.answer.study == PATH


@pytest.mark.parametrize("images", [100, 1000, 20_000])
@pytest.mark.parametrize("error", [0.5, 0.05])
def test_a_choice_costs_a_fifth_of_the_searches(images: int, error: float) -> None:
    """But for the fewest images of a model; a gradient costs as much as four images."""
    searches = [GRID_SEARCH, path([0.8, 0.85, 0.9], images=images)]
    measuring = Measuring(lambda place: error if place > 0.3 else 0.0)
    race(measuring, *searches)
    cost = sum(count for _, count, _ in measuring.asked)
    searched = 4 * 30 * images + (3 + 2) * PER_EVALUATION
    assert sum(search.images(PER_EVALUATION) for search in searches) == searched
    assert cost <= SHARE_OF_SEARCH * searched
    assert all(FEWEST_IMAGES <= count <= MOST_IMAGES for _, count, _ in measuring.asked)
    rounds = len({noise.seed for _, _, noise in measuring.asked})
    assert images < 20_000 or rounds > 2


@pytest.mark.parametrize(("error", "answer"), [(0.0, 1.025), (3.0, 1.3)])
def test_a_point_on_the_way_is_the_answer_where_it_is_certainly_better_than_the_end(
    error: float, answer: float
) -> None:
    """A search went too far, to 1.3: three quarters of the way from 0.2 are nearly right."""
    choice = race(Measuring(lambda place: error if 0.9 < place < 1.1 else 0.0), GRID_SEARCH, path([1.3], images=20_000))
    assert choice.found[PATH].coefficients[0] == pytest.approx(1.3)
    assert choice.answer.coefficients[0] == pytest.approx(answer)


def test_another_round_begins_where_each_model_would_have_the_fewest_images() -> None:
    asked = set()
    for per_evaluation in range(230, 250):
        measuring = Measuring(lambda _: 3.0)
        measuring.objective.samples.per_evaluation = per_evaluation
        rounds = race(measuring, GRID_SEARCH, path([0.5, 0.7, 0.8, 0.9], steps=3)).rounds
        asked.add(rounds[1][0] if len(rounds) > 1 else 0)
    assert min(asked - {0}) == FEWEST_IMAGES
    assert 0 in asked


def test_where_images_are_few_so_are_models() -> None:
    measuring = Measuring(lambda _: 0.5)
    race(measuring, GRID_SEARCH, path([0.5, 0.7, 0.8, 0.9], steps=5, images=100))
    assert [name for name, _, noise in measuring.asked if noise.seed == 0] == [
        "EMAGrid, trial 1",
        "LCSCGradient, mean of the last half",
        "LCSCGradient, trial 23",
        "last checkpoint",
    ]


def test_of_a_score_all_are_measured_once_and_only_what_is_as_good_is_called_so() -> None:
    measuring = Measuring()
    measuring.objective.sampler = None
    choice = race(measuring, GRID_SEARCH, path([0.5, 0.9]))
    assert {noise.seed for _, _, noise in measuring.asked} == {0}
    assert choice.equals == ()


def test_where_nothing_can_tell_the_answer_is_what_the_user_had_and_the_gain_is_known() -> None:
    choice = race(Measuring(lambda _: 3.0), GRID_SEARCH, path([0.7, 0.8]))
    assert choice.answer.name == "EMA*"
    assert choice.gain is not None
    assert not choice.gain.is_certain


@pytest.mark.parametrize("judged", [{"judges": ("fid",)}, {"judges": ("unknown", "fid")}])
def test_what_a_judge_finds_worse_is_no_answer(judged: dict[str, Any]) -> None:
    measuring = Measuring()
    assert race(measuring, GRID_SEARCH, path([0.9])).answer.name == "LCSCGradient, trial 10"
    measuring.reported = ReportedMetrics(**judged)
    assert race(measuring, GRID_SEARCH, path([0.9])).answer.name == "EMA*"


def test_the_best_of_another_grid_is_something_that_the_user_had() -> None:
    """An epoch that nobody had to search for, so what is no better is no find."""
    epochs = Searched("small/Grid/0", [trial(0, 0.7), trial(1, 0.95), trial(2, 0.6)])
    choice = race(Measuring(), GRID_SEARCH, epochs, path([0.8, 0.9]))
    assert [model.name for model in choice.had] == ["last checkpoint", "EMA*", "Grid, trial 1"]
    assert choice.answer.name == "Grid, trial 1"
    assert choice.found["small/Grid/0"].name == "Grid, trial 1", "one model"
    assert race(Measuring(), GRID_SEARCH, epochs, path([0.99])).answer.name == "LCSCGradient, trial 10"


def test_a_judge_vetoes_an_epoch_of_a_grid_as_what_was_found() -> None:
    measuring = Measuring()
    measuring.reported = ReportedMetrics(judges=("fid",))
    epochs = Searched(
        "small/Grid/0", [trial(index, place, images=20_000) for index, place in enumerate((0.3, 0.95, 0.4))]
    )
    choice = race(measuring, epochs)
    assert choice.answer.name == "Grid, trial 2", "the best of those that are not worse in the judge's eyes"
    assert race(Measuring(), epochs).answer.name == "Grid, trial 1"


@pytest.mark.parametrize("found", [[0.9], [0.9, 0.95], [0.9, 0.1]])
def test_a_veto_holds_also_when_what_the_user_had_cannot_win_any_more(found: list[float]) -> None:
    """In the judge's eyes all that is far from the start is worse; by the loss, the user's models lose at once."""
    measuring = Measuring(lambda place: 0.02 if place > 0.8 else 0.0)
    measuring.reported = ReportedMetrics(judges=("fid",))
    choice = race(measuring, GRID_SEARCH, path(found, images=20_000))
    assert measuring.fid_of(choice.answer) == 1.0
    assert all(measuring.fid_of(model) == 1.0 for model in choice.models if model.name in choice.equals)


def test_what_a_judge_vetoes_only_on_more_images_is_no_answer_and_no_equal() -> None:
    measuring = Measuring(lambda place: 0.02 if place > 0.8 else 0.0)
    measuring.reported = ReportedMetrics(judges=("fid",))
    measuring.judges_from_round = 1
    choice = race(measuring, GRID_SEARCH, path([0.3, 0.9, 0.95], images=20_000))
    asked = {noise.seed for name, _, noise in measuring.asked if name == "EMA*"}
    assert asked >= {1}, "it stays, since the judge compares with it"
    assert measuring.fid_of(choice.answer) == 1.0
    names = {model.name: model for model in choice.models}
    assert all(measuring.fid_of(names[name]) == 1.0 for name in choice.equals if name in names)


def test_without_judges_what_the_user_had_leaves_when_it_cannot_win() -> None:
    measuring = Measuring(lambda place: 0.02 if place > 0.8 else 0.0)
    race(measuring, GRID_SEARCH, path([0.5, 0.88, 0.9, 0.89], images=20_000))
    assert "EMA*" not in {name for name, _, _ in measuring.asked}, "that is its name after the first round"


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("best", range(6))
def test_the_best_check_of_a_search_is_a_candidate_and_checks_are_no_more_than_before(count: int, best: int) -> None:
    places = [0.1, 0.2, 0.3, 0.25, 0.15, 0.2]
    places[best] = 0.9
    checks = [model for model in path(places).path_models(count) if model.trial is not None]
    numbers = [model.trial or 0 for model in checks]
    assert 10 + 11 * best in numbers
    assert numbers == sorted(numbers)
    assert len(numbers) <= count
    assert count == 1 or numbers[-1] == 10 + 11 * 5, "the last one, too"
    assert [model.searched for model in checks if model.trial == 10 + 11 * best] == [pytest.approx(0.1)]


def test_the_best_check_is_measured_where_images_are_few_too() -> None:
    measuring = Measuring(lambda _: 0.5)
    race(measuring, GRID_SEARCH, path([0.5, 0.9, 0.8, 0.7], steps=5, images=100))
    assert "LCSCGradient, trial 11" in {name for name, _, _ in measuring.asked}


class Scoring(Measuring):
    """Of a score that is one number: it is this function of the place and the noise."""

    def __init__(self, score: Callable[[float, Noise], float]) -> None:
        super().__init__()
        self.objective.sampler = None
        self.score = score

    def possible(self, noises: Sequence[Noise], models: Iterable[Model]) -> list[Measurement]:
        measured = []
        for model in models:
            self.asked += [(model.name, self.images, noise) for noise in noises]
            evaluation = Evaluation(self.score(float(model.coefficients[0]), noises[0]))
            measured.append(Measurement.of(model, evaluation, images=self.images, seed=noises[0].seed))
        return measured


def draw(noise: Noise) -> float:
    """A standard normal number of a group and a seed."""
    return float(np.random.default_rng([len(noise.group), noise.seed]).standard_normal())


def scored(score: Callable[[float, Noise], float]) -> tuple[Scoring, Any]:
    """A race of two hundred evaluations, in which trials have their score on the search's noise."""
    measuring = Scoring(score)
    found = [trial(number, place) for number, place in enumerate([0.0] * 190 + [0.5, 0.9])]
    for one in found:
        one.value = score(coefficients_of(one)[0], SEARCH)
    grid = [trial(0, 0.0), trial(1, 0.2)]
    for one in grid:
        one.value = score(coefficients_of(one)[0], SEARCH)
    return measuring, race(measuring, Searched(GRID, grid), Searched("small/LCSCQuadratic/0", found))


@pytest.mark.parametrize("zero", [0.0, -1.0, 1000.0])
@pytest.mark.parametrize(("scatter", "is_found"), [(0.0, True), (1e-4, True), (0.3, False)])
def test_a_score_of_one_number_has_the_same_answer_wherever_its_zero_is(
    zero: float, scatter: float, is_found: bool
) -> None:
    def score(place: float, noise: Noise) -> float:
        return zero + 0.07 - 0.015 * place + scatter * draw(noise) * place

    _, choice = scored(score)
    assert (choice.answer.study == "small/LCSCQuadratic/0") == is_found
    assert not choice.knows_errors


def test_repetitions_that_say_the_same_again_are_not_gone_on_with() -> None:
    """The data of the search and those of the choice differ, and no seed changes them: two values decide."""
    agree = {"search": 0.0, "selection": 0.001}
    measuring, choice = scored(lambda place, noise: 5 - place * (1 + agree[noise.group]))
    assert choice.answer.study == "small/LCSCQuadratic/0"
    differ = {"search": 1.0, "selection": 0.0}
    measuring, choice = scored(lambda place, noise: 5 - place * (1 + differ[noise.group]))
    assert choice.answer.name == "EMA*", "as far as the search was wrong, this may be"
    assert max(noise.seed for _, _, noise in measuring.asked) == 1
    assert len(measuring.asked) <= SHARE_OF_SEARCH * 194


def test_repetitions_tell_what_one_value_cannot_and_cost_a_fifth_of_the_searches() -> None:
    measuring, choice = scored(lambda place, noise: 5 - place * (1 + 0.1 * draw(noise)))
    assert choice.answer.study == "small/LCSCQuadratic/0"
    assert max(noise.seed for _, _, noise in measuring.asked) > 1
    assert len(measuring.asked) <= SHARE_OF_SEARCH * 194


def test_a_path_has_evenly_spaced_checks_and_means_of_its_last_steps_in_the_order_of_time() -> None:
    search = path([0.1, 0.2, 0.3, 0.4, 0.5])
    models = search.path_models(3)
    names = [model.name.removeprefix("LCSCGradient, ") for model in models]
    assert names == ["trial 10", "trial 32", "mean of the last half", "trial 54", "mean of the last third"]
    half = np.mean([coefficients_of(one) for one in search.trials if "gradient" in one.user_attrs][-25:], axis=0)
    np.testing.assert_allclose(models[2].coefficients, half)
    assert [model.name for model in path([0.3], steps=3).path_models(3)] == ["LCSCGradient, trial 3"]
    assert GRID_SEARCH.path_models(3) == []


def test_what_a_grid_found_says_which_checkpoint_it_is() -> None:
    singles = Searched("small/Grid/0", [trial(0, 0.0), trial(1, 1.0)])
    assert [model.title for model in singles.best_models(2, NAME)] == [
        "Grid, trial 1 (step 1)",
        "Grid, trial 0 (step 2)",
    ]


def test_points_on_the_way_to_the_answer_are_no_equals_of_it() -> None:
    """They differ from it by less than the error, and nobody can do anything with that."""
    measuring = Measuring(lambda place: 0.5 if place > 0.2 else 0.0)
    choice = race(measuring, GRID_SEARCH, path([0.9, 0.95], images=20_000))
    assert " of the way " not in choice.answer.name
    assert not [name for name in choice.equals if " of the way " in name]
