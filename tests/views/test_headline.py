from __future__ import annotations

from typing import Any

import pytest

from lcsc_opt.views.ranking import headline, ranking
from tests.history_examples import history


def line(*studies: Any) -> str:
    return headline(ranking(list(studies)), "FID")


def seeds(optimizer: str, losses: list[float]) -> list[Any]:
    return [history([9.0, 5.0], optimizer=optimizer, seed=i, held_out=loss) for i, loss in enumerate(losses)]


def test_it_names_the_winner_how_far_ahead_it_is_and_who_may_be_as_good() -> None:
    studies = [*seeds("EMAGrid", [10.0, 10.0, 10.0]), *seeds("CMA", [1.9, 2.0, 2.1]), *seeds("LCSC", [2.2, 2.0, 1.95])]
    expected = "CMA is ahead: held-out FID 2 ± 0.1, 80 % below EMA*; LCSC not distinguishable over 3 seeds"
    assert line(*studies) == expected
    more = [*studies, *seeds("DE", [2.3, 1.9, 2.2])]
    assert line(*more).endswith("; LCSC and DE not distinguishable over 3 seeds")


def test_it_names_the_average_that_is_ema() -> None:
    found = [history([9.0, 5.0], optimizer="EMAGrid", held_out=4.0, average="average of the last 10")]
    assert "CMA is ahead: held-out FID 2, 50 % below EMA* (average of the last 10)" in line(
        *seeds("CMA", [2.0]), *found
    )
    found.append(history([9.0, 5.0], optimizer="EMAGrid", seed=1, held_out=4.0, average="last checkpoint"))
    assert "50 % below EMA*;" in line(*seeds("CMA", [2.0]), *found), "the seeds do not agree"


def test_a_clear_winner_has_no_one_beside_it() -> None:
    assert line(*seeds("CMA", [1.9, 2.0, 2.1]), *seeds("LCSC", [4.0, 4.1, 4.2])) == (
        "CMA is ahead: held-out FID 2 ± 0.1"
    )


def test_one_seed_may_be_chance() -> None:
    assert line(*seeds("CMA", [2.0]), *seeds("LCSC", [4.0])) == (
        "CMA is ahead: held-out FID 2; one seed each, so this may be chance"
    )
    assert line(*seeds("CMA", [2.0])) == "CMA is ahead: held-out FID 2"


def test_a_search_that_is_worse_than_ema_is_not_called_better() -> None:
    assert line(*seeds("EMAGrid", [2.0]), *seeds("LCSC", [4.0])).startswith("EMA* is ahead: held-out FID 2; one seed")


def test_without_held_out_values_it_says_that_they_are_searched_ones() -> None:
    text = line(history([5.0, 3.0], optimizer="CMA"), history([5.0, 2.0], optimizer="LCSC"))
    assert text.startswith("LCSC is ahead so far: searched FID 2; held-out values come at the end")


@pytest.mark.parametrize("losses", [[], [None]])
def test_without_results_it_says_so(losses: list[None]) -> None:
    assert line(history(losses)) == "No result yet."
    assert headline([]) == "No result yet."
