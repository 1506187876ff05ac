from __future__ import annotations

from typing import Any

import nevergrad as ng
import numpy as np
import pytest

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.study_file import OptimizerSpec
from lcsc_opt.coefficients.plane import DEFAULT_MARGIN, Plane, default_corners, grid_positions
from lcsc_opt.coefficients.profiles import default_origin
from lcsc_opt.coefficients.spaces import AffineSpace
from lcsc_opt.optimizers import Landscape, build_optimizer, coefficient_array

STEPS = tuple(range(100, 2100, 100))
SPACE = AffineSpace(STEPS, default_origin(STEPS))


def build(**options: Any) -> Any:
    spec = OptimizerSpec(name="Landscape", options=options)
    return build_optimizer(spec, SPACE, budget=100, workers=1, seed=0)


@pytest.mark.parametrize("corners", [[100, 1000, 2000], ["ema:0.9", "ema:0.99", 500], None])
def test_it_asks_the_points_of_the_plane_in_order_and_is_finished(corners: list[Any] | None) -> None:
    optimizer = build(size=4, **({} if corners is None else {"corners": corners}))
    plane = Plane.through(corners or default_corners(STEPS), STEPS)
    for x, y in grid_positions(4, DEFAULT_MARGIN):
        assert not optimizer.finished
        candidate = optimizer.ask()
        np.testing.assert_allclose(candidate.value, plane.at(x, y), rtol=0, atol=1e-14)
        optimizer.tell(candidate, float(np.hypot(x - 1, y)))
    assert optimizer.finished
    np.testing.assert_allclose(optimizer.recommend().value, plane.at(1, 0), rtol=0, atol=1e-14)


def test_it_runs_with_plain_nevergrad_on_a_plain_array() -> None:
    optimizer = ng.optimizers.registry["Landscape"](ng.p.Array(shape=(20,)), budget=20)
    assert optimizer.minimize(lambda value: float(np.square(value).sum())).value.sum() == pytest.approx(1, abs=1e-12)
    assert Landscape(steps=STEPS, size=2)(coefficient_array(SPACE), budget=7).num_ask == 0


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"corners": [1, 2]}, "optimizers.Landscape.corners: expected three"),
        ({"corners": [100, 200, 250]}, "corners: no checkpoint was saved at step 250"),
        ({"size": 1}, r"optimizers.Landscape.size: expected a whole number from 2 to 501, got 1"),
        ({"margin": -0.1}, r"optimizers.Landscape.margin: expected a number from 0, got -0.1"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(StudySpecError, match=complaint):
        build(**options)
