from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from lcsc_opt.base.records import Candidate, Evaluation
from lcsc_opt.coefficients.plane import Plane, grid_positions
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import StoredStudy
from tests.dashboard_site import Site, add_result, write_study

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::SyntaxWarning")  # optuna-dashboard's own
NAME = "digits/Landscape/0"
STEPS = (100, 200, 300)


def write_landscape(url: str, points: int = 25) -> StoredStudy:
    options = {"corners": list(STEPS), "size": 5, "margin": 0.5}
    attributes = {
        "steps": STEPS,
        "budget": {"evaluations": 25, "images": None},
        "specification": {"optimizer": {"name": "Landscape", "options": options}},
    }
    study = StoredStudy.open_or_create(open_storage(url, write=True), NAME, attributes)
    plane = Plane.through(STEPS, STEPS)
    for number, (x, y) in enumerate(grid_positions(5, 0.5)[:points].tolist()):
        loss = 1 + (x - 0.5) ** 2 + (y - 0.5) ** 2
        study.finish(study.add_candidate(Candidate(plane.at(x, y))), Evaluation(loss, {"fid": loss}), tell_index=number)
    return study


def draw(site: Site, name: str | None = NAME, **values: Any) -> dict[str, Any]:
    return site.call("landscape", "plane-new.data", landscape=name, **{"theme": "light", **values})


def test_the_newest_landscape_is_shown_or_the_one_in_the_address(url: str) -> None:
    write_landscape(url)
    site = Site(url)
    chosen = site.call("landscape", "landscape.value", url="")
    assert chosen["landscape"] == {"value": NAME, "options": [NAME]}
    asked = site.call("landscape", "landscape.value", url="?landscape=digits%2FLandscape%2F7")
    assert asked["landscape"]["value"] == "digits/Landscape/7"
    assert site.call("landscape", "landscape.value", url="?experiment=faces")["landscape"]["value"] is None


def test_the_page_says_what_the_plane_shows(url: str) -> None:
    write_landscape(url)
    write_study(url, "digits/LCSC/0")
    shown = draw(Site(url))
    line = shown["headline"]["children"]
    assert line == "digits/Landscape/0: lowest FID on the plane 1 at (0.5, 0.5), the best corner has 1.5; LCSC found 2"
    assert [trace["type"] for trace in shown["plane-new"]["data"]["data"]].count("contour") == 1
    assert "LCSC/0, trial 1" in str(shown["points"]["children"])


def test_a_landscape_that_is_begun_says_how_far_it_is(url: str) -> None:
    write_landscape(url, points=7)
    assert draw(Site(url))["headline"]["children"].endswith("after 7 of 25 points")
    write_landscape(url, points=0)


def test_one_without_a_value_says_how_to_go_on(url: str) -> None:
    write_landscape(url, points=0)
    shown = draw(Site(url))
    assert shown["headline"]["children"].endswith("Continue it: lcsc resume digits/Landscape/0")


def test_an_empty_state_says_which_command_to_run(url: str) -> None:
    write_study(url, "digits/EMAGrid/0")
    write_study(url, "digits/LCSC/0")
    shown = draw(Site(url), name=None)
    assert shown["headline"]["children"].endswith("Compute one: lcsc landscape digits/LCSC/0")
    assert "lcsc landscape digits/LCSC/0" in str(shown["plane-new"]["data"]["layout"]["annotations"])


def test_a_landscape_that_is_not_there_is_a_line(url: str) -> None:
    write_landscape(url)
    shown = draw(Site(url), name="digits/Landscape/3")
    assert "digits/Landscape/3: no such landscape" in shown["problem"]["children"]


def test_a_refresh_sends_nothing_that_has_not_changed(url: str) -> None:
    write_landscape(url)
    study = write_study(url, "digits/LCSC/0")
    site = Site(url)
    seen = draw(site)["seen"]["data"]
    assert "plane-new" not in draw(site, triggered="tick", seen=seen)
    add_result(study, 1.75)
    changed = draw(site, triggered="tick", seen=seen)
    assert changed["headline"]["children"].endswith("LCSC found 1.75")


def test_reading_the_page_leaves_the_database_as_it_is(url: str) -> None:
    write_landscape(url)
    write_study(url, "digits/LCSC/0")
    database = Path(sa.make_url(url).database or "")
    before = database.read_bytes()
    draw(Site(url), theme="dark")
    assert database.read_bytes() == before


def test_a_landscape_is_no_study_to_choose_on_other_pages(url: str) -> None:
    write_landscape(url)
    write_study(url, "digits/LCSC/0")
    site = Site(url)
    for page in ("study", "images"):
        assert site.call(page, "study.options", url="")["study"]["options"] == ["digits/LCSC/0"]
    assert "Landscape" not in str(site.call("compare", "studies.children", experiment="digits", axis="evaluations"))
