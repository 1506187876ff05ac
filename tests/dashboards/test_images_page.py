from __future__ import annotations

import io
import json
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lcsc_opt.base.labelled_grid import GridRow, labelled_grid
from lcsc_opt.database.experiment import StoredExperiment
from lcsc_opt.database.names import LAST_CHECKPOINT
from lcsc_opt.views.artifacts import GRID, SAMPLES, artifact_directory
from tests.dashboard_site import Site, write_study, written
from tests.history_examples import measured, report_of
from tests.study_examples import PNG, attach, write_images, write_report


def draw(site: Site, experiment: str = "digits") -> dict[str, Any]:
    return site.call("images", "images.children", experiment=experiment)


def addresses(shown: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(re.findall(r'"src": "([^"]+)"', json.dumps(shown["images"]))))


def write_answer(url: str, experiment: str = "digits", **more: Any) -> None:
    """An experiment whose report has an answer that was found, unless it is named."""
    study = f"{experiment}/LCSC/0"
    write_study(url, study, [3.0, 2.0])
    report = report_of({study: measured(2.5, trial=1)}, measured(5.0, name=LAST_CHECKPOINT), **more)
    write_report(written(url), report, experiment)


@pytest.fixture
def site(url: str) -> Site:
    write_answer(url)
    write_images(written(url))
    attach(written(url), "curve.png", PNG)
    return Site(url)


def test_samples_as_they_come_are_first_and_pairs_that_differ_most_come_last(site: Site) -> None:
    shown = draw(site)
    line = "The answer is LCSC, trial 1, with loss 2.5: 50 % below the best model you had, the last checkpoint, with 5."
    assert shown["headline"]["children"] == line
    before, after = json.dumps(shown["images"], ensure_ascii=False).split("Pairs that differ most")
    captions = ("The best you had: last checkpoint", "The answer: LCSC, trial 1", "Real images")
    assert [caption in before for caption in (*captions, "not selected")] == [True] * 4
    assert [caption in after for caption in captions] == [True, True, False]
    for address in addresses(shown):
        answer = site.request(address)
        assert (answer.status_code, answer.data, answer.mimetype) == (200, PNG, "image/png")
        assert "sandbox" in answer.headers["Content-Security-Policy"]
    assert len(addresses(shown)) == 5
    assert places(shown) == {"samples-left": addresses(shown)[0], "samples-right": addresses(shown)[1]}


def places(shown: dict[str, Any]) -> dict[str, str]:
    """Where two images lie one over the other: the id of each → its address."""
    found: dict[str, str] = {}

    def keep(properties: dict[str, Any]) -> dict[str, Any]:
        if "id" in properties and "src" in properties:
            found[properties["id"]] = properties["src"]
        return properties

    json.loads(json.dumps(shown["images"]), object_hook=keep)
    return found


def test_two_rows_of_a_grid_are_chosen_and_lie_one_over_the_other(site: Site, url: str) -> None:
    assert "lcsc images digits" in json.dumps(draw(site)["images"])
    rows = [GridRow(f"step {step}", np.full((2, 1, 8, 8), step / 300, np.float32)) for step in (100, 200, 300)]
    attach(written(url), GRID, labelled_grid(rows, ["a fox", "an owl"]))
    shown = draw(site)
    chosen = places(shown)
    for side, expected in (("left", 100), ("right", 300)):
        picture = Image.open(io.BytesIO(site.request(chosen[f"grid-{side}"]).data))
        assert picture.size == (2 * 96 + 3, 96)
        assert picture.getpixel((0, 0)) == (round((expected / 300 + 1) * 127.5),) * 3
    assert [text in json.dumps(shown["images"]) for text in ("step 100", "step 200", "step 300")] == [True] * 3
    assert site.request(chosen["grid-left"].replace("row=0", "row=7")).status_code == 404


def test_only_images_that_the_database_names_for_the_experiment_are_served(site: Site, url: str) -> None:
    (artifact_directory(url) / ("0" * 36)).write_bytes(PNG)
    stored = attach(written(url), "curve.png", PNG).name
    for artifact in ("../studies.db", "..%2fstudies.db", "/etc/passwd", "", "0" * 36, stored):
        assert site.request(f"/lcsc/images/file?experiment=digits&artifact={artifact}").status_code == 404
    write_answer(url, "faces")
    attach(written(url), SAMPLES["real"], PNG, "faces")
    address = addresses(draw(site))[0]
    for other in ("faces", "nothing"):
        assert site.request(address.replace("digits", other)).status_code == 404


def test_images_of_a_new_report_have_other_addresses(site: Site, url: str) -> None:
    """Their files have the same names, and a browser keeps an image whose address stays the same."""
    before = draw(site)
    write_images(written(url), content=PNG + b" of a new report")
    after = site.call("images", "images.children", "refresh", experiment="digits", seen=before["seen"]["data"])
    assert not {*addresses(before)} & {*addresses(after)}


def test_without_images_it_says_what_makes_them(url: str) -> None:
    write_study(url, "digits/LCSC/0")
    write_answer(url, "weights")
    write_answer(url, "nothing", answer=LAST_CHECKPOINT)
    write_study(url, "function/LCSC/0")
    StoredExperiment.open(written(url), "function").set_attribute("holds_out", False)
    site = Site(url)
    assert "lcsc evaluate EXPERIMENT" in json.dumps(draw(site)["images"])
    assert "nothing is held out here to report on" in json.dumps(draw(site, "function")["images"])
    for name in ("weights", "nothing"):
        assert "the objective scores models without sampling any" in json.dumps(draw(site, name)["images"])
    assert draw(site, "faces")["problem"]["children"] == "faces: no such experiment; choose another one"


def test_the_address_says_which_experiment_and_its_zoom_stays_in_its_range(site: Site) -> None:
    for asked, expected in (("250", 250), ("1", 100), ("99999", 600), ("-5", 100), ("wide", 100)):
        chosen = site.call("images", "zoom.value", url=f"?study=digits/LCSC/0&zoom={asked}")
        assert (chosen["zoom"]["value"], chosen["experiment"]["value"]) == (expected, "digits")
