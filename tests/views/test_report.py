from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from optuna.storages import RDBStorage
from plotly.offline import get_plotlyjs

from lcsc_opt.base.errors import LcscError, StudyStoreError
from lcsc_opt.base.records import ReportedMetrics
from lcsc_opt.database.names import LAST_CHECKPOINT
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.views.report import write_report
from tests.history_examples import measured, report_of
from tests.study_examples import write_images, write_study
from tests.study_examples import write_report as store_report

HOSTILE = "<script>document.title='broken'</script><img src=x onerror=alert(1)>&amp;\"'"


class Page(HTMLParser):
    """What is in a page: elements with their attributes, text, and the content of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        (self.scripts if self.cdata_elem == "script" else self.texts).append(data)

    def figures(self) -> list[dict]:
        return [json.loads(text) for text in self.scripts if text.startswith('{"data"')]


HOW = "cut by its budget, still improving: 22 more evaluations have brought 4.7 %"


@pytest.fixture
def experiment(storage: RDBStorage) -> RDBStorage:
    for seed in range(2):
        write_study(storage, f"digits/EMAGrid/{seed}", [9.0, 8.0], held_out=measured(8.5, trial=1))
        write_study(storage, f"digits/LCSC/{seed}", [9.0, None, 2.0 + seed], held_out=measured(2.5 + seed, trial=2))
    study = StoredStudy.open(storage, "digits/LCSC/1")
    study.set_attribute("search_ended", {"evaluations": 3, "exhausted": False, "how": HOW})
    write_images(storage)
    write_study(storage, "digits/CMA/0", [3.0], ended=False)
    return storage


def test_a_report_is_one_file_that_loads_nothing_and_shows_every_study(experiment: RDBStorage, tmp_path: Path) -> None:
    text = write_report(experiment, "digits", tmp_path / "new" / "report.html").read_text()
    page = Page(text)
    assert text.count(get_plotlyjs()) == 1
    own = text.replace(get_plotlyjs(), "")
    assert not re.findall(r"(?:https?:)?//[a-z0-9-]+\.", own), "no address of another machine outside of plotly.js"
    attributes = [known for _, known in page.elements]
    links = [value for known in attributes for name, value in known.items() if name in ("src", "href")]
    assert {str(link)[:34] for link in links} == {"data:image/png;base64,iVBORw0KGgog"}
    assert [str(known["content"])[:18] for known in attributes if "http-equiv" in known] == ["default-src 'none'"]
    shown = " ".join(page.texts)
    assert (
        "The answer is LCSC, trial 2, with loss 2.5: 71 % below the best average of your checkpoints, EMA*, with 8.5"
        in shown
    )
    assert "Unfinished: digits/CMA/0." in shown
    assert f"digits/LCSC/1: {HOW}." in shown
    alts = [str(attributes["alt"]) for tag, attributes in page.elements if tag == "img"]
    assert alts == ["The best you had: EMA*", "The answer: LCSC, trial 2", "Real images", *alts[:2]]
    assert [page.texts.count(alt) for alt in alts] == [2, 2, 1, 2, 2], "written above it, not only in its alt"
    for study in ("EMAGrid/0", "EMAGrid/1", "LCSC/0", "LCSC/1", "CMA/0"):
        assert shown.count(f"digits/{study}") >= 2
    assert "broken" in shown, "the reason of a failure"
    figures = page.figures()
    assert len(figures) == 1 + 5, "the comparison, one for each study"
    labels = [attributes["aria-label"] for _, attributes in page.elements if attributes.get("role") == "figure"]
    assert len(labels) == len(figures)
    assert all(labels)
    assert {
        "Best so far against images sampled",
        "Coefficients, digits/LCSC/0",
    } <= {*labels}
    assert "noscript" in [tag for tag, _ in page.elements]
    assert not [figure for figure in figures if "template" in figure["layout"]]
    templates = next(json.loads(text) for text in page.scripts if text.startswith('{"light"'))
    assert templates["light"]["layout"]["paper_bgcolor"] != templates["dark"]["layout"]["paper_bgcolor"]


def test_a_report_begins_with_samples_as_they_come_and_pairs_that_differ_most_have_a_heading(
    experiment: RDBStorage, tmp_path: Path
) -> None:
    text = write_report(experiment, "digits", tmp_path / "report.html").read_text()
    opening, _, rest = text.partition("not selected")
    pair = ["The best you had: EMA*", "The answer: LCSC, trial 2"]
    assert [known["alt"] for tag, known in Page(opening).elements if tag == "img"] == [*pair, "Real images"]
    shown = " ".join(" ".join(Page(opening).texts).split())
    assert f"{pair[0]} held-out loss 8.5 {pair[1]} held-out loss 2.5 Real images The first samples" in shown
    between, _, most_different = rest.partition("<h2>Pairs that differ most</h2>")
    assert "<img" not in between
    assert [known["alt"] for tag, known in Page(most_different).elements if tag == "img"] == pair


def test_a_report_has_what_was_measured_of_the_answer_and_of_each_search(storage: RDBStorage, tmp_path: Path) -> None:
    values: list[dict[str, Any]] = [{"precision": 0.5, HOSTILE: 0.557}, {"precision": 0.4, HOSTILE: 0.62}]
    found = {"digits/LCSC/0": measured(2.5, trial=1, **values[0])}
    last = measured(9.0, name=LAST_CHECKPOINT, **values[1])
    known = ReportedMetrics(
        signs={HOSTILE: -1}, real_halves={HOSTILE: 0.9}, real_count=9, cross_check_text="it saw nothing"
    )
    write_study(storage, "digits/LCSC/0", [4.0, 2.0])
    store_report(storage, report_of(found, last, metrics=known, warnings=("it lost",)))
    write_study(storage, "other/CMA/0", [], ended=False)
    page = Page(write_report(storage, "digits", tmp_path / "report.html").read_text())
    shown = " ".join(" ".join(page.texts).split())
    header = "metric answer · LCSC, trial 1 last checkpoint gain real images (9)"
    assert shown.count(header) == 2, "of the answer, and of the search that found it"
    assert shown.count(f"{HOSTILE} ↑ 0.557 0.62 -0.063 (worse) 0.9") == 2
    assert "Warning: it lost." in shown
    assert "The cross-check is it saw nothing." in shown
    assert "1 study, read" in shown
    assert "No result yet." in write_report(storage, "other", tmp_path / "other.html").read_text()


def test_a_report_of_nothing_says_what_there_is(storage: RDBStorage, tmp_path: Path) -> None:
    write_study(storage, "digits/LCSC/0", [3.0])
    with pytest.raises(StudyStoreError, match="faces: no such experiment; the database holds: digits"):
        write_report(storage, "faces", tmp_path / "report.html")
    with pytest.raises(LcscError, match=r"report\.pdf: expected a file that ends in \.html"):
        write_report(storage, "digits", tmp_path / "report.pdf")
    assert not list(tmp_path.glob("report*"))
