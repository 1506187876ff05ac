from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lcsc_opt.base.catalog import find, load_file
from lcsc_opt.base.records import ReportedMetrics
from lcsc_opt.database.names import LAST_CHECKPOINT
from lcsc_opt.views.dashboard import parts
from tests.dashboard_site import Site, write_study, written
from tests.history_examples import measured, report_of
from tests.study_examples import add_result, write_report

SHOWN = {"experiment": "digits", "axis": "evaluations", "theme": "light"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database that is only read."""
    file = tmp_path_factory.mktemp("compare") / "studies.db"
    url = f"sqlite:///{file}"
    for seed, (searched, held_out) in enumerate([(1.0, 1.2), (1.1, 1.3), (1.2, 1.1)]):
        write_study(url, f"digits/LCSC/{seed}", [9.0, None, searched], held_out=held_out)
    for seed, held_out in enumerate([8.0, 8.1, 8.2]):
        write_study(url, f"digits/EMAGrid/{seed}", [7.0, 5.0], held_out=held_out)
    return file


@pytest.fixture
def url(finished: Path, tmp_path: Path) -> str:
    """A copy of it."""
    return f"sqlite:///{shutil.copy(finished, tmp_path / 'studies.db')}"


@pytest.fixture
def site(url: str) -> Site:
    return Site(url)


def draw(site: Site, **values: Any) -> dict[str, Any]:
    return site.call("compare", "curves-new.data", **{**SHOWN, **values})


def test_the_address_says_what_is_shown(site: Site) -> None:
    for address, values in (
        ("?experiment=digits&axis=seconds", ["digits", "seconds", []]),
        ("?only=LCSC,CMA", ["digits", "images", ["LCSC", "CMA"]]),
        ("?axis=__proto__&experiment=", ["digits", "images", []]),
    ):
        chosen = site.call("compare", "experiment.value", url=address)
        assert [chosen[name]["value"] for name in ("experiment", "axis", "only")] == values
        assert chosen["experiment"]["options"] == ["digits"]
    said = draw(site, experiment="digit<b>s")["problem"]["children"]
    assert said.startswith("digit<b>s: no such experiment (did you mean 'digits'?)")


def test_the_ranking_sorts_by_numbers_and_shows_texts(site: Site) -> None:
    shown = draw(site)
    line = "The answer is LCSC (seed 2), trial 2, with loss 1.1: 86 % below the best average of your checkpoints, EMA*,"
    assert shown["headline"]["children"] == f"{line} with 8."
    answer, first, second = shown["ranking"]["rowData"]
    assert (answer["optimizer"], answer["held_out"]) == ("answer · LCSC (seed 2), trial 2", 1.1)
    assert answer["colour"] == "transparent", "no line of the figures is the answer"
    assert answer["seeds_text"] == "–"
    assert (first["optimizer"], first["verdict"], first["held_out_text"]) == ("LCSC", "lowest loss", "1.2 ± 0.1")
    assert (second["optimizer"], second["verdict"]) == ("EMA*", "worse")
    assert second["held_out"] == pytest.approx(8.1)
    assert second["difference_text"].startswith("+6.9 [")


def test_metrics_of_all_optimizers_are_a_table_where_some_were_measured(site: Site, url: str) -> None:
    assert draw(site)["metrics"]["children"] == []
    metrics: dict[str, Any] = {"kid@my.features:wide_extractor": 0.9, "precision": 0.615}
    found = {f"digits/LCSC/{seed}": measured(1.0 + seed, trial=2, **metrics) for seed in range(3)}
    last = measured(1.5, name=LAST_CHECKPOINT, **metrics)
    report = report_of(found, last, metrics=ReportedMetrics(signs={"precision": -1}), warnings=("it fell",))
    write_report(written(url), report)
    shown = json.dumps(draw(site)["metrics"]["children"])
    rows = ("answer · LCSC, trial 2", "last checkpoint", "LCSC", "0.615\u00a0±\u00a00")
    texts = ("held-out FID", "precision\u00a0↑", *rows, "Warning: it fell.")
    places = [shown.index(json.dumps(text)) for text in texts]
    assert places == sorted(places)


def test_pinned_optimizers_are_shown_with_ema_and_the_others_stay_on_offer(site: Site, url: str) -> None:
    write_study(url, "digits/CMA/0", [4.0], held_out=4.0)
    shown = draw(site, only=["CMA"])
    assert [row["optimizer"] for row in shown["ranking"]["rowData"]][1:] == ["CMA", "EMA*"]
    assert shown["only"]["options"] == ["LCSC", "CMA"]
    for nobody in (None, [], ["DE"]):
        assert len(draw(site, only=nobody)["ranking"]["rowData"]) == 4


def test_a_refresh_sends_a_new_result_but_leaves_the_columns(site: Site, url: str) -> None:
    study = write_study(url, "digits/CMA/0", [3.0], ended=False)
    with study.hold():
        running = draw(site)
        assert running["tick"]["interval"] == 2000
    ended = draw(site, triggered="refresh", seen=running["seen"]["data"])
    assert "interrupted" in json.dumps(ended["studies"]), "though no trial is new"
    seen, columns = ended["seen"]["data"], running["ranking"]["columnDefs"]
    no_news = {"problem": {"children": ""}, "tick": {"interval": parts.IDLE_MS}}
    assert draw(site, triggered="refresh", seen=seen) == no_news, "but a problem that there was is over"
    add_result(study, 1, 0.5)
    assert draw(site, triggered="refresh", seen=seen, ranking=[])["ranking"]["columnDefs"] == columns, "lost before"
    news = draw(site, triggered="refresh", seen=seen, ranking=columns)
    assert news["ranking"].keys() == {"rowData"}
    assert news["seen"]["data"] != seen
    assert "0.5" in json.dumps(news["studies"])
    assert "coefficients" not in json.dumps(news)


def test_an_empty_database_says_what_to_run(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'empty.db'}"
    written(url)
    site = Site(url)
    chosen = site.call("compare", "experiment.value", url="")
    assert chosen["experiment"] == {"value": None, "options": []}
    assert chosen["page"]["className"] == "nothing", "what there is to draw is hidden"
    shown = draw(site, experiment=None)
    assert shown["headline"]["children"] == "No experiment in this database yet. Start one: lcsc run STUDY_FILE"
    sentence = shown["curves-new"]["data"]["layout"]["annotations"][0]["text"].replace("<br>", " ")
    assert sentence == shown["headline"]["children"]


def test_a_clock_offers_new_experiments_and_leaves_a_choice_alone(site: Site, url: str) -> None:
    refresh = {"triggered": "refresh", "url": "", "refresh": 3}
    assert site.call("compare", "experiment.options", **refresh, experiment=["digits"]) == {}  # type: ignore[arg-type]
    write_study(url, "new/CMA/0", [1.0])
    assert site.call("compare", "experiment.options", **refresh, experiment="digits") == {  # type: ignore[arg-type]
        "experiment": {"options": ["digits", "new"]},
        "page": {"className": ""},
    }
    assert site.call("compare", "experiment.options", **refresh)["experiment"]["value"] == "new"  # type: ignore[arg-type]


def test_a_spreadsheet_calculates_nothing_from_a_name() -> None:
    as_csv = load_file(find("dashboards", "compare")).as_csv
    text = as_csv([{"optimizer": "=HYPERLINK(1)", "below_ema_percent": -3.0}])
    assert list(csv.reader(io.StringIO(text)))[1] == ["'=HYPERLINK(1)", "-3.0"]
    assert as_csv([]) == "\r\n"
