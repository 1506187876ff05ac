from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lcsc_opt.views.curves import (
    AXES,
    best_so_far,
    curves,
    default_axis,
)
from tests.history_examples import history

losses = st.lists(st.one_of(st.none(), st.floats(0.1, 100)), min_size=1, max_size=25)


@given(losses)
def test_best_so_far_is_the_minimum_of_all_that_was_told(values: list[float | None]) -> None:
    study = history(values)
    for axis, unit in (("evaluations", 1), ("images", 10), ("model_calls", 20), ("seconds", 1)):
        steps = best_so_far(study, axis)
        assert steps.end == unit * len(values)
        for count in range(1, len(values) + 1):
            known = [value for value in values[:count] if value is not None]
            found = steps.at(np.array([float(unit * count)]))[0]
            assert found == min(known) if known else np.isnan(found)


# over seeds


@given(st.lists(losses.filter(any), min_size=1, max_size=4), st.sampled_from(list(AXES)))
def test_a_curve_is_the_mean_of_what_each_seed_has_found(seeds: list[list[float | None]], axis: str) -> None:
    studies = [history(values, seed=seed, seconds=seed + 1.0) for seed, values in enumerate(seeds)]
    (found,) = curves(studies, axis)
    steps = [best_so_far(study, axis) for study in studies]
    assert found.positions[-1] == max(step.end for step in steps)
    assert (np.diff(found.positions) > 0).all()
    values = np.array([[step.values[step.positions <= at].min() for at in found.positions] for step in steps])
    np.testing.assert_allclose(found.mean, values.mean(axis=0))
    np.testing.assert_array_equal([found.lowest, found.highest], [values.min(axis=0), values.max(axis=0)])


def test_a_seed_that_still_searches_does_not_cut_the_others_off() -> None:
    studies = [history([4.0, 3.0]), history([6.0, 1.0], seed=1), history([9.0], seed=2, ended=False, running=1)]
    both, running = curves(studies, "images")
    assert (both.seeds, both.finished, both.label) == ((0, 1), True, "LCSC (2 seeds)")
    assert both.mean.tolist() == [5, 2]
    assert (running.seeds, running.finished, running.label) == ((2,), False, "LCSC, seed 2, unfinished")
    searches = [history([5.0, 4.0, 3.0], held_out=4.5), history([6.0, 2.0, 5.0], seed=1)]
    (found,) = curves([*searches, history([], optimizer="CMA", ended=False)], "images")
    assert found.optimizer == "LCSC"


def test_curves_are_drawn_against_images_where_there_are_any() -> None:
    assert default_axis([history([3.0]), history([])]) == "images"
    without = history([3.0], images=0)
    assert default_axis([without]) == default_axis([]) == "evaluations"
