from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import quote

import pytest

from lcsc_opt.views.artifacts import artifact_directory
from tests.dashboard_site import Site, write_study
from tests.study_examples import PNG, attach

STUDY = "digits/LCSC/0"


def draw(site: Site, study: str = STUDY) -> dict[str, Any]:
    return site.call("images", "images.children", study=study)


def addresses(shown: dict[str, Any]) -> list[str]:
    return sorted(set(re.findall(r'"src": "([^"]+)"', json.dumps(shown["images"]))))


@pytest.fixture
def site(url: str) -> Site:
    study = write_study(url, STUDY, [3.0, 2.0], held_out=2.5)
    for name, content in (("samples.png", PNG), ("images.html", b"<script>"), ("curve.png", PNG)):
        attach(study, 1, name, content)
    attach(study, 0, "samples.png", PNG)
    return Site(url)


def test_the_images_of_the_answer_are_shown_and_served(site: Site) -> None:
    shown = draw(site)
    assert shown["headline"]["children"] == "digits/LCSC/0, trial 1: held-out FID 2.5"
    (address,) = addresses(shown)
    answer = site.request(address)
    assert (answer.status_code, answer.data, answer.mimetype) == (200, PNG, "image/png")
    assert "sandbox" in answer.headers["Content-Security-Policy"]


def test_two_images_are_also_shown_one_over_the_other(site: Site, url: str) -> None:
    assert "edge" not in json.dumps(draw(site)["images"])
    study = write_study(url, STUDY, [])
    for name in ("samples_1_EMA.png", "samples_2_LCSC.png", "samples_3_real.png"):
        attach(study, 1, name, PNG)
    shown = draw(site)
    assert len(addresses(shown)) == 4
    [over] = [part["props"] for part in shown["images"]["children"] if part["props"].get("className") == "over"]
    sources = re.findall(r'"src": "([^"]+)"', json.dumps(shown))
    assert [image["props"]["src"] for image in over["children"]] == sources[1:3]


def test_pairs_that_differ_most_come_last_under_a_heading_that_says_so(site: Site, url: str) -> None:
    study = write_study(url, STUDY, [])
    for name in ("images_1_EMA.png", "images_2_LCSC.png"):
        attach(study, 1, name, PNG)
    shown = json.dumps(draw(site)["images"])
    before, after = shown.split("Pairs that differ most")
    assert "samples.png" in before
    assert "not selected" in before
    assert "trial 1" not in before
    assert "digits/LCSC/0, trial 1" in after


def test_only_artifacts_that_the_database_names_for_the_study_are_served(site: Site, url: str) -> None:
    (artifact_directory(url) / ("0" * 36)).write_bytes(PNG)
    for artifact in ("../studies.db", "..%2fstudies.db", "/etc/passwd", "", "0" * 36):
        assert site.request(f"/lcsc/images/file?study={STUDY}&artifact={artifact}").status_code == 404
    write_study(url, "digits/CMA/0")
    (address,) = addresses(draw(site))
    for other in ("digits%2FCMA%2F0", "nothing"):
        assert site.request(address.replace(quote(STUDY, safe=""), other)).status_code == 404


def test_without_images_it_says_what_makes_them(url: str) -> None:
    said = {"EMAGrid": "A baseline has no images of its own", "LCSC": "lcsc run STUDY_FILE", "CMA": "No complete trial"}
    for optimizer in said:
        write_study(url, f"digits/{optimizer}/0", [] if optimizer == "CMA" else [2.0])
    site = Site(url)
    for optimizer, text in said.items():
        assert text in json.dumps(draw(site, f"digits/{optimizer}/0")["images"])
    assert draw(site, "digits/CMA/9")["problem"]["children"] == "digits/CMA/9: no such study; choose another one"


def test_the_zoom_of_the_address_stays_in_its_range(site: Site) -> None:
    for asked, expected in (("250", 250), ("1", 100), ("99999", 600), ("-5", 100), ("wide", 100)):
        chosen = site.call("images", "zoom.value", url=f"?study={STUDY}&zoom={asked}")
        assert chosen["zoom"]["value"] == expected
        assert chosen["study"]["value"] == STUDY
