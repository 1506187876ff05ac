from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.optimizers.options import check_count, check_numbers, check_positive, is_number, is_whole


@pytest.mark.parametrize(
    ("check", "value", "message"),
    [
        (check_count, 0, "generation_size: expected a whole number from 1, got 0"),
        (check_count, 2.0, "generation_size: expected a whole number from 1, got 2.0"),
        (check_count, True, "generation_size: expected a whole number from 1, got True"),
        (check_count, "many", "generation_size: expected a whole number from 1, got 'many'"),
        (check_positive, 0, "generation_size: expected a number above 0, got 0"),
        (check_positive, math.inf, "generation_size: expected a number above 0, got inf"),
        (check_positive, math.nan, "generation_size: expected a number above 0, got nan"),
        (check_positive, None, "generation_size: expected a number above 0, got None"),
        (check_numbers, [], "generation_size: expected a list of numbers, got []"),
        (check_numbers, "0.9", "generation_size: expected a list of numbers, got '0.9'"),
        (check_numbers, [0.9, True], r"generation_size: expected a list of numbers, got [0.9, True]"),
        (check_numbers, 0.9, "generation_size: expected a list of numbers, got 0.9"),
    ],
)
def test_what_an_option_does_not_take_is_said_with_its_name(
    check: Callable[..., None], value: Any, message: str
) -> None:
    with pytest.raises(StudySpecError) as caught:
        check("generation_size", value)
    assert str(caught.value) == message


def test_what_an_option_takes_is_let_pass() -> None:
    check_count("images", 2, least=2)
    check_positive("mutation", 1)
    check_positive("mutation", 1e-300)
    check_numbers("rates", None)
    check_numbers("rates", (0.9, 1))


def test_fewer_than_the_least_are_not_enough() -> None:
    with pytest.raises(StudySpecError, match="images: expected a whole number from 2, got 1"):
        check_count("images", 1, least=2)


def test_numbers_of_numpy_and_words_are_told_apart() -> None:
    assert is_number(np.float64(0.5))
    assert not is_number("0.5")
    assert not is_whole(np.float64(2))
