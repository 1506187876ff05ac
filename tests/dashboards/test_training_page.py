from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.dashboard_site import Site, write_study
from tests.study_examples import PNG
from tests.views.test_trainings import write_training


@pytest.fixture
def database(url: str) -> str:
    """With a study, which the page does not need."""
    write_study(url, "digits/LCSC/0")
    return url


def draw(site: Site, training: str | None = "run", seen: str = "") -> dict[str, Any]:
    return site.call("training", "headline.children", training=training, theme="light", seen=seen)


def test_curve_and_samples_of_a_training_beside_the_database(database: str, tmp_path: Path) -> None:
    write_training(tmp_path)
    site = Site(database)
    assert '<a href="/lcsc/training"' in site.get("/lcsc/training/")
    shown = draw(site)
    assert shown["headline"]["children"].startswith("run: ict on digits, step 40 of 40")
    assert shown["curve-new"]["data"]["data"][0]["name"] == "ict"
    addresses = re.findall(r'"src": "([^"]+)"', json.dumps(shown["sheets"]))
    assert addresses == [f"/lcsc/training/sheet?training=run&step={step}" for step in (20, 10)]
    answer = site.request(addresses[0])
    assert (answer.status_code, answer.data, answer.mimetype) == (200, PNG, "image/png")
    assert "sandbox" in answer.headers["Content-Security-Policy"]
    assert set(draw(site, seen=shown["seen"]["data"])) == {"tick"}  # nothing is new


def test_it_follows_a_training_that_runs(database: str, tmp_path: Path) -> None:
    place = write_training(tmp_path, lines=2, sheets=())
    site = Site(database)
    first = draw(site)
    assert "No samples yet" in json.dumps(first["sheets"])
    assert first["tick"]["interval"] == 2000
    with place.with_name("run.jsonl").open("a") as file:
        file.write('{"step": 40, "loss": 0.5, "seconds": 9}\n')
    second = draw(site, seen=first["seen"]["data"])
    assert second["headline"]["children"].endswith("step 40 of 40, loss 0.5: finished, 4.44 steps a second")
    assert second["tick"]["interval"] == 15_000


def test_the_newest_is_chosen_unless_the_address_asks(database: str, tmp_path: Path) -> None:
    site = Site(database)
    assert "No training in" in json.dumps(draw(site, None)["headline"])
    for name in ("one", "two"):
        write_training(tmp_path, name)
    for query, name in (("?training=one", "one"), ("", "two")):
        chosen = site.call("training", "training.value", url=query)["training"]
        assert chosen == {"value": name, "options": ["one", "two"]}
    assert draw(site, "three")["problem"]["children"] == "three: no such training; choose another one"


def test_nothing_but_samples_is_served(database: str, tmp_path: Path) -> None:
    write_training(tmp_path)
    site = Site(database)
    for asked in (
        "training=run&step=30",
        "training=../run&step=10",
        "training=run&step=-10",
        "step=10",
        "training=run",
    ):
        assert site.request(f"/lcsc/training/sheet?{asked}").status_code == 404
