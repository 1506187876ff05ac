"""The losses that an optimizer is told."""

from __future__ import annotations

import numpy as np
import pytest

from lcsc_opt.base.records import Evaluation
from lcsc_opt.optimizers.told_losses import FIRST_FAILURE_LOSS, LARGEST_LOSS, ToldLosses


@pytest.mark.parametrize("first", [3.0, -3.0, 1e300, 1e-300, 5e-324, -1.7e308, 1.0])
def test_the_first_loss_is_told_as_a_number_from_one_to_two_with_its_sign(first: float) -> None:
    told = ToldLosses().of_success(Evaluation(first)).loss
    assert 1 <= abs(told) < 2
    assert np.sign(told) == np.sign(first)


def test_everything_in_the_unit_of_the_loss_is_told_in_the_same_unit_exactly() -> None:
    told_losses = ToldLosses()
    told_losses.of_success(Evaluation(5e30))
    unit = 2.0**101
    gradient = np.array([1e30, -3e28])
    told = told_losses.of_success(Evaluation(7e29, {"fid": 7e29}, gradient=gradient))
    assert told.loss * unit == 7e29
    assert told.gradient is not None
    assert np.array_equal(told.gradient * unit, gradient)
    assert told.metrics == {"fid": 7e29}


def test_a_loss_of_zero_sets_no_unit() -> None:
    told_losses = ToldLosses()
    assert told_losses.of_success(Evaluation(0.0)).loss == 0
    assert told_losses.of_success(Evaluation(6e-12)).loss == pytest.approx(6e-12 * 2**38)


def test_a_failure_is_as_bad_as_the_worst_so_far() -> None:
    told_losses = ToldLosses()
    assert told_losses.of_failure == FIRST_FAILURE_LOSS
    told_losses.of_success(Evaluation(-4e-9))
    assert -2 < told_losses.of_failure <= -1
    told_losses.of_success(Evaluation(1e300))
    assert told_losses.of_failure == LARGEST_LOSS
