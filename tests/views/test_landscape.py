"""Landscapes: read, drawn, and shown on the dashboard's page."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from optuna.storages import RDBStorage

from lcsc_opt.coefficients.plane import Plane, plane_grid
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.views.landscape import landscape_figure, landscapes
from tests.dashboard_site import Site
from tests.history_examples import measured
from tests.study_examples import STEPS, add_result, coefficients, write_mean, write_study

NAME, HOSTILE = "digits/Landscape/0", "<script>alert(1)</script>%{x}"


def bowl(x: float, y: float) -> float:
    """Lowest at (0.5, 1)."""
    return 1 + (x - 0.5) ** 2 + (y - 1) ** 2


def write_landscape(
    storage: RDBStorage,
    name: str = NAME,
    *,
    loss: Callable[[float, float], float | None] = bowl,
    size: int = 3,
    points: int | None = None,
) -> None:
    """A landscape as the runner writes it, of which ``points`` are evaluated; where the loss is None it failed."""
    plane, (_, planned) = Plane.through(STEPS, STEPS), plane_grid(size)
    attributes = {
        "steps": STEPS,
        "budget": {"evaluations": len(planned), "images": None},
        "specification": {"optimizer": {"options": {"corners": list(STEPS), "size": size}}},
    }
    study = StoredStudy.open_or_create(storage, name, attributes)
    for number, (x, y) in enumerate(planned[:points]):
        add_result(study, number, loss(x, y), at=plane.at(x, y))


def figure(storage: RDBStorage, name: str = NAME) -> Any:
    reader = HistoryReader(storage)
    study = reader.read_study(name)
    return landscape_figure(reader, study, [each for each in reader.read(study.experiment) if each.study != name])


@pytest.mark.parametrize(
    ("loss", "of_heights"), [(bowl, lambda heights: 10**heights), (lambda x, y: x, lambda heights: heights)]
)
def test_the_heights_are_the_losses_of_the_plane_or_their_logarithms_if_all_are_positive(
    storage: RDBStorage, loss: Callable[[float, float], float], of_heights: Callable[[Any], Any]
) -> None:
    write_landscape(storage, loss=loss, size=4)
    contours = figure(storage).data[0]
    losses = np.array([[loss(x, y) for x in contours.x] for y in contours.y])
    np.testing.assert_allclose(of_heights(contours.z), losses)
    assert contours.colorbar.ticktext[-1] == f"{losses.max():.3g}"


def test_a_landscape_that_is_begun_has_holes(storage: RDBStorage) -> None:
    write_landscape(storage, points=7, loss=lambda x, y: None if x < 0 else bowl(x, y))
    assert np.isnan(figure(storage).data[0].z[0, 0])
    write_landscape(storage, "digits/Landscape/1", points=0)
    empty = figure(storage, "digits/Landscape/1")
    assert "has no value yet" in empty.layout.annotations[0].text.replace("<br>", " ")


def test_trials_are_drawn_at_the_nearest_coefficients_and_the_answer_is_large(storage: RDBStorage) -> None:
    write_landscape(storage)
    write_study(storage, "digits/LCSC/0", [4.0, None, 2.0, 3.0], held_out=measured(2.75, trial=0))
    (drawn,) = [trace for trace in figure(storage).data if trace.name == "LCSC/0"]
    # with three checkpoints as corners x and y are the coefficients of the second and the third one
    expected = [coefficients(n)[1:] for n in (0, 2, 3, 0)]
    np.testing.assert_allclose(np.stack([drawn.x, drawn.y], axis=1), expected, atol=1e-12)
    assert list(drawn.marker.size) == [5, 5, 5, 15], "the answer was chosen on other noise"
    assert (drawn.text[0], drawn.text[-1]) == ("trial 0: 4", "its answer")


def test_an_answer_that_is_a_mean_of_iterates_is_drawn_where_it_is(storage: RDBStorage) -> None:
    write_landscape(storage)
    write_study(storage, "digits/LCSCGradient/0", [4.0, 2.0])
    write_mean(storage, "digits/LCSCGradient/0", np.array([0.5, 0.125, 0.375]), 1.75)
    (drawn,) = [trace for trace in figure(storage).data if trace.name == "LCSCGradient/0"]
    assert (drawn.x[-1], drawn.y[-1]) == pytest.approx((0.125, 0.375))


def test_searches_are_those_of_the_experiment_over_the_same_checkpoints(
    storage: RDBStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lcsc_opt.views.landscape.MOST_TRIALS", 5)
    write_landscape(storage)
    searches: Any = {"digits/EMAGrid/0": [1.0], "digits/CMA/0": [3.0] + [4.0] * 7, "digits/LCSC/0": [None]}
    for name, losses in {**searches, "faces/LCSC/0": [2.0]}.items():
        write_study(storage, name, losses)
    write_study(storage, "digits/DE/0", [1.0]).set_attribute("steps", [100, 200, 400])
    _, ema, search, corners = figure(storage).data
    assert ema.name.startswith("EMA*")
    assert (search.name, len(search.x), corners.name) == ("CMA/0", 5 + 1, "corners")
    assert landscapes(HistoryReader(storage)) == [NAME]


def test_markup_is_inert(storage: RDBStorage) -> None:
    write_landscape(storage, f"{HOSTILE}/Landscape/0")
    write_study(storage, f"{HOSTILE}/LCSC/0", [2.0], metric=HOSTILE)
    made = figure(storage, f"{HOSTILE}/Landscape/0")
    assert "<script" not in json.dumps(json.loads(made.to_json()))
    assert not [trace for trace in made.data if HOSTILE in (trace.hovertemplate or "")]


# the page


def draw(site: Site, name: str | None = NAME, **values: Any) -> dict[str, Any]:
    return site.call("landscape", "plane-new.data", landscape=name, **{"theme": "light", **values})


def test_the_page_shows_the_newest_landscape_or_the_one_in_the_address(storage: RDBStorage, url: str) -> None:
    write_landscape(storage)
    write_study(storage, "digits/LCSC/0", [2.0])
    site = Site(url)
    newer = "faces/Landscape/0"
    write_landscape(storage, newer)
    for query, chosen in (
        ("", newer),
        ("?experiment=digits", NAME),
        ("?landscape=digits%2FLandscape%2F7", "digits/Landscape/7"),
    ):
        asked = site.call("landscape", "landscape.value", url=query)["landscape"]
        assert asked == {"value": chosen, "options": [NAME, newer]}
    shown = draw(site)
    assert shown["headline"]["children"] == f"{NAME}: 9 points"
    assert "LCSC/0" in str(shown["plane-new"])
    assert "plane-new" not in draw(site, triggered="refresh", seen=shown["seen"]["data"])
    write_study(storage, "digits/CMA/0", [1.75])
    assert "CMA/0" in str(draw(site, triggered="refresh", seen=shown["seen"]["data"])["plane-new"])
    for other in ("digits/LCSC/0", "digits/Landscape/7"):
        assert draw(site, other)["problem"]["children"] == f"{other}: no such landscape; choose another one"
