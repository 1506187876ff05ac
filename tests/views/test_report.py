from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from optuna.storages import RDBStorage
from plotly.offline import get_plotlyjs

from lcsc_opt.base.errors import LcscError, StudyStoreError
from lcsc_opt.database.report import HeldOutReport, MetricRow
from lcsc_opt.views.report import write_report
from tests.history_examples import measured, reported
from tests.study_examples import PNG, attach, write_study

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


@pytest.fixture
def experiment(storage: RDBStorage) -> RDBStorage:
    for seed in range(2):
        write_study(storage, f"digits/EMAGrid/{seed}", [9.0, 8.0], held_out=reported(8.5, trial=1))
        study = write_study(storage, f"digits/LCSC/{seed}", [9.0, None, 2.0 + seed], held_out=reported(2.5, trial=2))
    attach(study, 2, "samples_2_LCSC.png", PNG)
    write_study(storage, "digits/CMA/0", [3.0], ended=False)
    return storage


def test_a_report_is_one_file_that_loads_nothing_and_shows_every_study(experiment: RDBStorage, tmp_path: Path) -> None:
    text = write_report(experiment, "digits", tmp_path / "new" / "report.html").read_text()
    page = Page(text)
    assert text.count(get_plotlyjs()) == 1
    own = text.replace(get_plotlyjs(), "")
    assert not re.findall(r"(?:https?:)?//[a-z0-9-]+\.", own), "no address of another machine outside of plotly.js"
    attributes = [known for _, known in page.elements]
    (link,) = [value for known in attributes for name, value in known.items() if name in ("src", "href")]
    assert str(link).startswith("data:image/png;base64,iVBORw0KGgog")
    assert [str(known["content"])[:18] for known in attributes if "http-equiv" in known] == ["default-src 'none'"]
    shown = " ".join(page.texts)
    assert re.search(r"Best held-out \w+: LCSC with 2\.5( ± 0)?, 71 % below EMA\*", " ".join(shown.split()))
    assert "Unfinished: digits/CMA/0." in shown
    (alt,) = [attributes["alt"] for tag, attributes in page.elements if tag == "img"]
    assert alt == "digits/LCSC/1, trial 2"
    assert page.texts.count(alt) == 1, "written above it, not only in its alt"
    for study in ("EMAGrid/0", "EMAGrid/1", "LCSC/0", "LCSC/1", "CMA/0"):
        assert shown.count(f"digits/{study}") >= 2
    assert "broken" in shown, "the reason of a failure"
    figures = page.figures()
    assert len(figures) == 5 + 1 + 5 * 2, "comparisons, distances, two for each study"
    labels = [attributes["aria-label"] for _, attributes in page.elements if attributes.get("role") == "figure"]
    assert len(labels) == len(figures)
    assert all(labels)
    assert {"Best so far against evaluations", "Distance between answers", "Coefficients, digits/LCSC/0"} <= {*labels}
    assert "noscript" in [tag for tag, _ in page.elements]
    assert not [figure for figure in figures if "template" in figure["layout"]]
    templates = next(json.loads(text) for text in page.scripts if text.startswith('{"light"'))
    assert templates["light"]["layout"]["paper_bgcolor"] != templates["dark"]["layout"]["paper_bgcolor"]


def test_the_movement_is_drawn_where_the_best_coefficients_moved(storage: RDBStorage, tmp_path: Path) -> None:
    write_study(storage, "digits/LCSC/0", [9.0, 2.0])
    assert "How the best coefficients moved" not in write_report(storage, "digits", tmp_path / "two.html").read_text()
    write_study(storage, "more/LCSC/0", [9.0, 3.0, 2.0])
    assert "How the best coefficients moved" in write_report(storage, "more", tmp_path / "three.html").read_text()


def test_a_report_begins_with_samples_as_they_come_and_pairs_that_differ_most_have_a_heading(
    storage: RDBStorage, tmp_path: Path
) -> None:
    study = write_study(storage, "digits/LCSC/0", [9.0, 2.0], held_out=reported(2.5, trial=1))
    for name in ("images_1_EMA", "images_2_LCSC", "samples_1_EMA", "samples_2_LCSC", "samples_3_real"):
        attach(study, 1, f"{name}.png", PNG)
    text = write_report(storage, "digits", tmp_path / "report.html").read_text()
    opening, _, rest = text.partition("not selected")
    pair = ["EMA*, from the same noise as digits/LCSC/0", "digits/LCSC/0, trial 1"]
    assert [known["alt"] for tag, known in Page(opening).elements if tag == "img"] == [*pair, "Real images"]
    between, _, most_different = rest.partition("<h2>Pairs that differ most</h2>")
    assert "<img" not in between
    assert [known["alt"] for tag, known in Page(most_different).elements if tag == "img"] == pair


def test_a_report_has_what_was_measured_of_each_answer(storage: RDBStorage, tmp_path: Path) -> None:
    row = MetricRow(HOSTILE, -1, 0.557, against="EMA*", baseline=0.62, gain=-0.063, lost=True, real_halves=0.9)
    answer = measured(2.5, trial=1, precision=0.5)
    report = HeldOutReport(answer, rows=(MetricRow("loss", 1, 2.5), row), warning="it lost")
    write_study(storage, "digits/LCSC/0", [4.0, 2.0], held_out=report)
    write_study(storage, "other/CMA/0", [], ended=False)
    page = Page(write_report(storage, "digits", tmp_path / "report.html").read_text())
    shown = " ".join(" ".join(page.texts).split())
    assert "metric found EMA* gain real images" in shown
    assert f"{HOSTILE} ↑ 0.557 0.62 -0.063 (worse) 0.9" in shown
    assert "Warning: it lost." in shown
    assert f"Evaluation metrics, held out optimizer held-out FID {HOSTILE} ↑ LCSC 2.5 0.557 real images – 0.9" in shown
    titles = [figure["layout"].get("xaxis", {}).get("title", {}).get("text") for figure in page.figures()]
    assert titles.count("held-out precision") == 1
    assert "No result yet." in write_report(storage, "other", tmp_path / "other.html").read_text()


def test_a_report_of_nothing_says_what_there_is(storage: RDBStorage, tmp_path: Path) -> None:
    write_study(storage, "digits/LCSC/0", [3.0])
    with pytest.raises(StudyStoreError, match="faces: no such experiment; the database holds: digits"):
        write_report(storage, "faces", tmp_path / "report.html")
    with pytest.raises(LcscError, match=r"report\.pdf: expected a file that ends in \.html"):
        write_report(storage, "digits", tmp_path / "report.pdf")
    assert not list(tmp_path.glob("report*"))
