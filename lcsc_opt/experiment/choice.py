"""Chooses the answer: a race of the finalists of all searches and what the user had, on the noise of the choice.

All are measured on some images, and what is certainly worse than the answer of now leaves. The rest is measured on
more, until one is left or a fifth of what the searches have cost is spent. Every round has noise of its own, and all
real images that may choose; :mod:`~lcsc_opt.experiment.answer` says who is ahead. The best that the user had stays
where judges compare with it, also when it cannot win any more.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence

from lcsc_opt.base.errors import SearchFailedError
from lcsc_opt.base.progress import progress
from lcsc_opt.base.records import SEARCH, SELECTION, Noise
from lcsc_opt.database.measurement import Measurement, Model
from lcsc_opt.database.names import EMA
from lcsc_opt.experiment.answer import LOSS, WAY, Gain, best_of, choose, gain, is_vetoed, lowest, on_the_way
from lcsc_opt.experiment.finalists import Searched
from lcsc_opt.experiment.measuring import Measurer

ENOUGH_IMAGES = 500  # of each model in the first round: where they cost too much, fewer models are in it
FEWEST_IMAGES = 250  # of each model in a round
MOST_IMAGES = 5000  # of each model in a round: then real images are what limits a choice
SHARE_OF_SEARCH = 0.2  # of what all searches have cost, in images; of a score in evaluations
SHARE_OF_FIRST = 0.5  # of these, for the first round
FINAL = 4  # models in all rounds but the first: more are not told apart by a few thousand images


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was chosen on the noise of the choice.

    Attributes:
        answer: the best model that is known.
        had: what the user had, as far as it could be measured.
        found: study → its best model.
        measured: the name of a model → what was measured of it, in the last round that it was in.
        equals: the names of what was found and cannot be told from the answer.
        knows_errors: whether images or outcomes tell the error of a difference; of a score that returns one number,
            only the scatter between its repetitions, and between the search's data and those of the choice, does.
        rounds: how many images each model had, and the seed of the noise.
        is_on_path: whether the answer stands on the path of its search, where the latest of several equals is taken.
        gain: of the best that was found, over the best that the user had, when it was last measured; ``None`` if there
            is only one of both.
    """

    answer: Model
    had: Sequence[Model]
    found: Mapping[str, Model]
    measured: Mapping[str, Measurement]
    rounds: tuple[tuple[int, int], ...] = ()
    equals: tuple[str, ...] = ()
    knows_errors: bool = True
    is_on_path: bool = False
    gain: Gain | None = None

    @property
    def models(self) -> list[Model]:
        """What the user had, the best of each search, and the answer, each once."""
        of_name = {model.name: model for model in (*self.had, *self.found.values(), self.answer)}
        return list(of_name.values())


class Race:
    """One choice.

    Args:
        searches: those with a result.
        trained: models that the trainer has made.
        measurer: of the report.
        top: how many trials of each search are in it.
    """

    def __init__(self, searches: Sequence[Searched], trained: Sequence[Model], measurer: Measurer, *, top: int) -> None:
        self._searches = searches
        self._trained = trained
        self._measurer = measurer
        self._top = top
        self._judges = measurer.reported.judges
        self._had: list[Measurement] = []
        self._found: dict[str, list[Measurement]] = {}  # study → what is still in the race
        self._ways: list[Measurement] = []
        self._path: list[str] = []  # the names of the models on paths, in the order of time
        self._way: dict[str, float] = {}  # part of a way → share
        if len({search.is_ema_grid for search in searches}) == 2:  # a way leads from EMA* to what another search found
            self._way = dict(WAY)
        self._searched = 0  # images, or evaluations of a score
        self._spent = 0  # of the choice, in the same unit
        self._noted: dict[str, Measurement] = {}  # the name of a model → what the last round with it has measured
        self._rounds: list[tuple[int, int]] = []  # images of each model, and the seed of the noise

    def run(self) -> Choice:
        """Measure and choose.

        Raises:
            SearchFailedError: none of the best trials can be evaluated.
            ObjectiveError: what losses are relative to cannot be measured.
        """
        self._first_round()
        had = [measured.model for measured in self._had]
        # also of searches whose models will all leave the race
        best = {study: self._best(models).model for study, models in self._found.items()}
        gain_over_had = self._gain()
        if self._is_of_images or not self._knows_errors:  # more images, or repetitions, tell more
            self._more_rounds()
        answer = self._answer()
        for study, models in self._found.items():
            if models:
                best[study] = self._best(models).model
        found = self._all_found
        if not any(answer is way for way in self._ways):  # points on the way to what is handed out are of no use
            found = [*itertools.chain.from_iterable(self._of_searches.values())]
        rivals = [entrant for entrant in self._without_vetoed(found) if entrant is not answer]
        equals = tuple(rival.model.name for rival in rivals if not gain(rival, answer).is_certain)
        return Choice(
            answer.model,
            had,
            best,
            self._noted,
            tuple(self._rounds),
            equals,
            knows_errors=LOSS in answer.without_groups,
            is_on_path=answer.model.name in self._path,
            gain=self._gain() or gain_over_had,
        )

    @property
    def _is_of_images(self) -> bool:
        return self._measurer.objective.sampler is not None

    @property
    def _knows_errors(self) -> bool:
        """Whether images or outcomes tell the errors of losses."""
        return all(LOSS in entrant.without_groups for entrant in (*self._had, *self._all_found))

    def _gain(self) -> Gain | None:
        """What the best that was found gains over the best that the user had and that is still in the race."""
        if not self._had or not self._all_found:
            return None
        return gain(lowest(self._had), self._best(self._all_found))

    @property
    def _all_found(self) -> list[Measurement]:
        """What was found by searches, and the ways to it; averages of a grid are what the user had."""
        return [*itertools.chain.from_iterable(self._of_searches.values()), *self._ways]

    @property
    def _of_searches(self) -> dict[str, list[Measurement]]:
        """Study → what is left of it, without grids of averages and checkpoints."""
        grids = {search.study for search in self._searches if search.is_baseline}
        return {study: models for study, models in self._found.items() if study not in grids}

    def _best(self, models: Sequence[Measurement]) -> Measurement:
        """The best model of one or more searches: one that no judge vetoes, if there is such."""
        allowed = self._without_vetoed(models) or models
        of_name = {measured.model.name: measured for measured in allowed}
        return best_of(allowed, [of_name[name] for name in self._path if name in of_name])

    def _answer(self) -> Measurement:
        """What would be the answer if the race ended now: a way only if it is certainly better than where it leads."""
        best_of_each = self._without_vetoed(self._best(models) for models in self._of_searches.values() if models)
        ways = self._without_vetoed(self._ways)
        if ways and (not best_of_each or gain(lowest(best_of_each), lowest(ways)).is_certain):
            return choose(self._had, ways)
        return choose(self._had, best_of_each)

    def _without_vetoed(self, models: Iterable[Measurement]) -> list[Measurement]:
        """Without models that a judge finds certainly worse than what the user had."""
        return [measured for measured in models if not is_vetoed(measured, self._had, self._judges)]

    def _first_round(self) -> None:
        """Measure all finalists, the trainer's models, EMA*, and points on the way from it to the best."""
        finalists, images = self._entrants()
        measurer = self._measurer.changed(images=images)
        self._rounds.append((images, SELECTION.seed))
        entrants = self._count(finalists)
        self._spent = self._cost_of(images) * entrants
        with progress(f"{self._measurer.experiment.name}: choosing", entrants) as measurer.advance:
            for search in self._searches:
                measured = self._measured(measurer, finalists[search.study])
                if measured:
                    self._found[search.study] = measured
                self._note(measured)
            if not self._found:
                raise SearchFailedError("none of the best trials can be evaluated on other noise than the search's")
            self._had = self._measured(measurer, self._trained)
            self._note(self._had)
            self._add_ema(measurer)
            self._add_baselines()

    def _measured(self, measurer: Measurer, models: Sequence[Model]) -> list[Measurement]:
        """On the noise of the first round; where a loss has no error, on the search's noise, too, as trials are."""
        measured = measurer.possible([SELECTION], models)
        as_searched = self._measurer.changed(images=0)
        cost = self._cost_of(as_searched.objective.samples.per_evaluation)
        for index, entrant in enumerate(measured):
            if LOSS in entrant.without_groups or entrant.model.searched is not None:
                continue
            for on_search in as_searched.possible([SEARCH], [entrant.model]):
                model = dataclasses.replace(entrant.model, searched=on_search.loss)
                measured[index] = dataclasses.replace(entrant, model=model)
                self._spent += cost
        return measured

    def _cost_of(self, images: int) -> int:
        """What a measurement of so many images costs: these; of a score, one evaluation."""
        if self._is_of_images:
            return images
        return 1

    def _entrants(self) -> tuple[dict[str, list[Model]], int]:
        """Study → its models of the first round, and how many images each has.

        Where images for all cost more than the round may, fewer models of each search are in it; where one of each is
        still too many, the ways are left out. What the searches have cost is noted, and so are the models on paths.
        """
        finalists = self._finalists(self._top)
        if not self._is_of_images:
            self._searched = sum(search.evaluations for search in self._searches)
            return finalists, self._measurer.images
        per_evaluation = self._measurer.objective.samples.per_evaluation
        self._searched = sum(search.images(per_evaluation) for search in self._searches)
        affordable = SHARE_OF_FIRST * SHARE_OF_SEARCH * self._searched
        for top in range(self._top, 0, -1):
            finalists = self._finalists(top)
            count = self._count(finalists)
            if affordable >= ENOUGH_IMAGES * count:
                break
        else:  # even one of each is too many
            self._way = {}
            count = self._count(finalists)
        images = int(affordable / count)
        return finalists, min(max(images, FEWEST_IMAGES), MOST_IMAGES, self._measurer.images)

    def _count(self, finalists: Mapping[str, Sequence[Model]]) -> int:
        """How many models the first round measures with these of the searches; ways to what was found are to come."""
        return sum(map(len, finalists.values())) + len(self._trained) + len(self._way)

    def _finalists(self, top: int) -> dict[str, list[Model]]:
        """Study → so many of its models, and notes which of them stand on paths."""
        finalists = {}
        self._path = []
        for search in self._searches:
            path = search.path_models(top)
            self._path += [model.name for model in path]
            finalists[search.study] = path or search.best_models(top, self._measurer.objective.average_name)
        return finalists

    def _add_baselines(self) -> None:
        """The best of every other grid, such as an epoch, is something that the user had, unless a judge vetoes it."""
        for search in self._searches:
            if search.is_baseline and not search.is_ema_grid:
                allowed = self._without_vetoed(self._found.get(search.study, ()))
                if allowed:
                    self._had.append(lowest(allowed))

    def _add_ema(self, measurer: Measurer) -> None:
        """The best average gets the name by which everybody knows it; a way leads from it to what was found."""
        averages = [search.study for search in self._searches if search.is_ema_grid and search.study in self._found]
        if not averages:
            return
        of_grids = (measured for study in averages for measured in self._found[study])
        best = min(of_grids, key=lambda measured: measured.loss)  # EMA* is the average of the lowest loss
        ema = dataclasses.replace(best, model=dataclasses.replace(best.model, name=EMA))
        self._had.append(ema)
        del self._noted[best.model.name]
        self._note([ema])
        for study in averages:
            self._found[study] = [ema if measured is best else measured for measured in self._found[study]]
        if self._all_found:
            target = self._best(self._all_found).model
            self._ways = self._measured(measurer, on_the_way(ema.model, target, self._way))
            self._note(self._ways)

    def _more_rounds(self) -> None:
        """Measure what is still in the race again, on more images, or on other seeds of a score that is one number."""
        rounds: dict[str, list[Measurement]] = {}  # name of a model → what each of these rounds has measured
        if not self._is_of_images:  # the first round had as many items
            rounds = {entrant.model.name: [entrant] for entrant in (*self._had, *self._all_found)}
        number = 0  # of the round, and the seed of its noise; the first round of all had the seed 0
        images = self._measurer.images
        while self._drop_the_worse():
            entrants = [*self._had, *self._all_found]
            number += 1
            if self._is_of_images and number == 1:  # all rounds have as many, so that they can be joined
                images = self._images_of_a_round(len(entrants))
                affordable = images >= FEWEST_IMAGES
            else:
                cost = self._cost_of(images) * len(entrants)
                affordable = self._spent + cost <= SHARE_OF_SEARCH * self._searched
            if not affordable:
                return
            self._spent += self._cost_of(images) * len(entrants)
            measurer = self._measurer.changed(images=images)
            self._rounds.append((images, number))
            title = f"{self._measurer.experiment.name}: choosing among {len(entrants)}"
            with progress(title, len(entrants)) as measurer.advance:
                noise = Noise(SELECTION.group, number)
                measured = measurer.possible([noise], [entrant.model for entrant in entrants])
            if not measured:
                return  # what fails for all says nothing about any: the round before decides
            before = {entrant.model.name: entrant.values[LOSS][-1] for entrant in entrants}
            if not self._is_of_images and all(before[again.model.name] == again.loss for again in measured):
                return  # the score does not depend on the seed, and would say the same again
            for again in measured:
                rounds.setdefault(again.model.name, []).append(again)
            whole = max(map(len, rounds.values()))
            joined = {model: Measurement.joined(parts) for model, parts in rounds.items() if len(parts) == whole}
            self._keep(
                {id(entrant): joined[entrant.model.name] for entrant in entrants if entrant.model.name in joined}
            )
            self._note(joined.values())

    def _images_of_a_round(self, entrants: int) -> int:
        """How many each of so many models has, if one more round may spend the rest of a fifth of the searches."""
        affordable = int((SHARE_OF_SEARCH * self._searched - self._spent) / entrants)
        return min(affordable, MOST_IMAGES, self._measurer.images)

    def _drop_the_worse(self) -> bool:
        """Take out of the race what cannot win, and of the rest all but the best.

        That is what a judge vetoes, and what is certainly worse than the answer of now. The best that the user had
        stays for the judges, who compare with it.

        Returns:
            Whether more than one model may still win.
        """
        answer = self._answer()
        had = [lowest(self._had)] if self._had else []
        rivals = [entrant for entrant in (*had, *self._without_vetoed(self._all_found)) if entrant is not answer]
        may_win = [rival for rival in rivals if not gain(rival, answer).is_certain]
        may_win.sort(key=lambda rival: gain(rival, answer).value)  # first those that it gains least over
        may_win.insert(0, answer)
        if not self._judges:
            had = [entrant for entrant in had if any(entrant is one for one in may_win)]
        found = [entrant for entrant in may_win if not any(entrant is one for one in had)]
        self._keep({id(entrant): entrant for entrant in (*had, *found[: FINAL - len(had)])})
        return len(may_win) > 1

    def _keep(self, remaining: Mapping[int, Measurement]) -> None:
        """Take all models out of the race but these: identity → what stands for it from now on.

        EMA* is the same object in what the user had and in its grid, and stays so.
        """
        self._had = [remaining[id(entrant)] for entrant in self._had if id(entrant) in remaining]
        self._ways = [remaining[id(entrant)] for entrant in self._ways if id(entrant) in remaining]
        for study, models in self._found.items():
            self._found[study] = [remaining[id(entrant)] for entrant in models if id(entrant) in remaining]

    def _note(self, measured: Iterable[Measurement]) -> None:
        """Remember what was measured, which a later round replaces."""
        self._noted |= {entrant.model.name: entrant for entrant in measured}
