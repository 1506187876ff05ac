"""The standard error of a statistic from its values without a group, and the intervals made of it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lcsc_opt.base.jackknife import GROUPS, group_of_each, half_width, standard_error


def test_groups_are_of_one_size_random_and_the_same_for_every_model() -> None:
    labels = group_of_each(105)
    np.testing.assert_array_equal(np.sort(np.bincount(labels)), [10] * 5 + [11] * 5)
    np.testing.assert_array_equal(labels, group_of_each(105))
    assert (np.diff(labels) != 1).sum() > 50, "images may be ordered by class, and these are not"


def test_for_a_mean_of_groups_of_one_it_is_the_standard_error_of_the_mean() -> None:
    values = np.random.default_rng(0).standard_normal(GROUPS)
    without = (values.sum() - values) / (GROUPS - 1)
    assert standard_error(without) == pytest.approx(values.std(ddof=1) / math.sqrt(GROUPS))


def test_half_widths_are_those_of_student_and_gauss() -> None:
    assert half_width(2.0, 9) == pytest.approx(2 * 2.262157)
    assert half_width(2.0, math.inf) == pytest.approx(2 * 1.959964)
