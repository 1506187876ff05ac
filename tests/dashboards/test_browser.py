"""The pages in a real browser."""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lcsc_opt.base.records import STANDARD_ERROR, ReportedMetrics
from lcsc_opt.database.connection import open_storage
from lcsc_opt.views.dashboard import parts
from lcsc_opt.views.report import write_report
from tests import study_examples
from tests.browser import Switched, Watched, chromium, watched
from tests.dashboard_site import write_study, written
from tests.history_examples import measured, report_of
from tests.study_examples import add_result, coefficients, write_images

MARKUP = "<img src=x onerror=alert(1)>"
DARK, LIGHT = "#14171A", "#FFFFFF"


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    """One for all tests."""
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Finished studies of two optimizers and three seeds, with images."""
    url = f"sqlite:///{tmp_path_factory.mktemp('browser') / 'studies.db'}"
    Image.new("L", (80, 40), 128).save(image := io.BytesIO(), "PNG")
    for seed in range(3):
        write_study(url, f"digits/EMAGrid/{seed}", [9.0, 8.0], held_out=8.0 + seed / 10)
        write_study(url, f"digits/LCSC/{seed}", [9.0, None, 4.0, 2.0 + seed / 10], held_out=3.0 + seed / 10)
        write_study(url, f"digits/CMA/{seed}", [7.0, 3.0 + seed / 10], held_out=2.9 + seed / 5)
    write_images(written(url), content=image.getvalue())
    return url


@pytest.fixture(scope="module")
def dashboard(finished: str) -> Switched:
    return Switched(finished)


@pytest.fixture
def home(dashboard: Switched, finished: str) -> str:
    """The address of a dashboard over them."""
    return dashboard.show(finished)


@pytest.fixture
def view(page: Any, home: str) -> Iterator[Watched]:
    """A page that must have nothing to complain about."""
    with watched(page, home) as opened:
        yield opened
        assert opened.problems == []


@pytest.fixture
def compare(view: Watched, home: str) -> Watched:
    """The page of comparisons, with its figures and its table."""
    view.page.goto(f"{home}/lcsc/compare")
    view.drawn("curves")
    view.page.wait_for_selector("#ranking .ag-row")
    return view


def refresh_each(milliseconds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RUNNING_MS", "IDLE_MS"):
        monkeypatch.setattr(parts, name, milliseconds)


def headline(view: Watched) -> str:
    return str(view.until("(text => text.length > 5 && text)(document.querySelector('#headline')?.innerText || '')"))


def column(page: Any, name: str) -> list[str]:
    """The cells of a column from top to bottom."""
    cells = page.query_selector_all(f"#ranking .ag-row [col-id={name}]")
    rows = sorted((int(cell.evaluate("c => c.closest('.ag-row').getAttribute('row-index')")), cell) for cell in cells)
    return [cell.inner_text() for _, cell in rows]


def zoom_in(view: Watched, figure: str) -> None:
    """As a reader does, with the mouse."""
    before = view.figure(figure)["range"]
    box = view.page.locator(f"#{figure} .nsewdrag").first.bounding_box()
    view.page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.3 * box["height"])
    view.page.mouse.down()
    view.page.mouse.move(box["x"] + 0.7 * box["width"], box["y"] + 0.8 * box["height"], steps=5)
    view.page.mouse.up()
    while view.figure(figure)["range"] == before:
        view.page.wait_for_timeout(15)


@pytest.mark.slow
def test_pages_with_figures_open_in_the_systems_colours_until_the_switch_is_used(view: Watched, home: str) -> None:
    view.page.goto(f"{home}/lcsc/")
    view.drawn("curves")
    assert view.page.url.startswith(f"{home}/lcsc/compare")
    line = "The answer is CMA, trial 1, with loss 2.9: 64 % below the best average of your checkpoints, EMA*, with 8."
    assert headline(view) == line
    for scheme, paper in (("dark", DARK), ("light", LIGHT)):
        view.page.emulate_media(color_scheme=scheme)
        view.until(f"document.querySelector('#curves .js-plotly-plot')._fullLayout.paper_bgcolor == '{paper}'")
    view.page.click("#theme-switch")
    for page, figure in (("study", "coefficients"), ("landscape", "plane")):
        view.page.goto(f"{home}/lcsc/{page}")
        view.drawn(figure)
        assert view.page.inner_text("nav [aria-current]") == page.capitalize()
        assert view.figure(figure)["paper"] == DARK
    assert view.page.inner_text("#theme-switch") == "Light"


def write_widest_report(url: str, experiment: str) -> None:
    """With the intervals of all metrics, and the trainer's models."""
    names = ("loss", "fid@cross_check", "fid_held_out", "precision", "tones")
    errors = {f"{name}{STANDARD_ERROR}": 0.004356 for name in names}
    metrics: dict[str, Any] = {**dict.fromkeys(names[1:], 0.06824), **errors}
    had = [
        measured(0.06824 + number / 1e6, name=name, **metrics)  # other models: one model has one column
        for number, name in enumerate(("EMA*", "last checkpoint", "trainer's EMA"))
    ]
    found = {f"{experiment}/LCSC/0": measured(0.008385, **metrics)}
    real = dict.fromkeys(names, 0.0003897)
    known = ReportedMetrics(signs=dict.fromkeys(names[1:], 1), real_halves=real, real_count=5000)
    write_study(url, f"{experiment}/LCSC/0", [3.0])
    study_examples.write_report(written(url), report_of(found, *had, metrics=known), experiment)


def test_the_widest_table_of_the_experiment_that_is_chosen_fits_the_screen(
    page: Any, dashboard: Switched, url: str
) -> None:
    for experiment in ("digits", "newest"):
        write_widest_report(url, experiment)
    home = dashboard.show(url)
    with watched(page, home) as view:
        page.goto(f"{home}/lcsc/study")
        assert view.until("document.querySelector('#study-value')?.innerText") == "newest/LCSC/0"
        page.click("#study")
        page.click(".dash-dropdown-option >> text=digits/LCSC/0")
        view.until("location.search.includes('digits')")
        view.until("document.querySelectorAll('#metrics td').length === 35")
        assert page.evaluate("(t => t.scrollWidth <= t.clientWidth)(document.querySelector('#metrics .wide'))")
        assert view.problems == []


def test_the_curve_grows_while_a_study_runs_and_markup_in_its_name_runs_nothing(
    page: Any, dashboard: Switched, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refresh_each(20, monkeypatch)  # less than an answer takes, as on a slow machine
    study = write_study(url, f"{MARKUP}/{MARKUP}/0", [9.0, 8.0, 7.0], ended=False)
    home = dashboard.show(url)
    with study.hold(), watched(page, home) as view:
        view.page.goto(f"{home}/lcsc/compare?experiment={MARKUP}&axis={MARKUP}")
        view.drawn("curves")
        last = "Math.max(...document.querySelector('#curves .js-plotly-plot')._fullData[0].x)"
        first = view.page.evaluate(last)
        view.page.evaluate("window.notReloaded = true")
        zoom_in(view, "curves")
        zoomed = view.figure("curves")["range"]
        add_result(study, 3, 5.0)
        view.until(f"{last} > {first}")
        assert view.figure("curves")["range"] == zoomed  # what a reader zoomed into stays
        assert view.page.evaluate("window.notReloaded")
        refresh_each(2000, monkeypatch)
        add_result(study, 4, None, reason=MARKUP)
        # at once: until then the page is drawn again so often that a click may hit what has just been replaced
        view.page.get_by_text(study.name).first.evaluate("element => element.click()")
        view.page.wait_for_selector("text=an hour")
        view.drawn("coefficients")
        assert headline(view).startswith(f"{study.name} is running")
        assert page.query_selector("img[src=x]") is None
        assert view.problems == []


def test_comparisons_are_reached_with_the_keyboard_sorted_downloaded_and_kept_in_the_address(
    compare: Watched, tmp_path: Path
) -> None:
    page = compare.page
    focused = (
        "() => { const e = document.activeElement, s = getComputedStyle(e); return {"
        "text: (e.innerText || e.getAttribute('aria-label') || e.id || '').split('\\n')[0],"
        "seen: s.outlineStyle !== 'none' || s.boxShadow !== 'none' || s.borderColor !== ''}; }"
    )
    reached = [(page.keyboard.press("Tab"), page.evaluate(focused))[1] for _ in range(80)]
    assert all(one["seen"] for one in reached)
    texts = {one["text"] for one in reached}
    assert texts >= {"Skip to the content", "Compare", "Study", "Dark", "Download as CSV"}
    assert any("digits/LCSC/0" in text for text in texts), texts
    unnamed = page.evaluate(
        "[...document.querySelectorAll('main input, main button')].filter(e => "
        "!(e.labels?.length || e.innerText || e.ariaLabel || e.getAttribute('aria-labelledby')))"
        ".map(e => e.outerHTML)"
    )
    assert [html for html in unnamed if "ag-" not in html and "aria-hidden" not in html] == []

    assert column(page, "optimizer") == ["answer · CMA, trial 1", "LCSC", "CMA", "EMA*"]
    heading = page.get_by_role("columnheader", name="Searched FID")
    for order in ("ascending", "descending"):
        heading.click()
        compare.until(f"document.querySelector('#ranking [col-id=searched]').ariaSort === '{order}'")
    assert column(page, "optimizer") == ["EMA*", "CMA", "LCSC", "answer · CMA, trial 1"]
    page.locator("#ranking input[aria-label*='Optimizer']").fill("C")
    compare.until("document.querySelectorAll('#ranking .ag-center-cols-container .ag-row').length === 3")
    with page.expect_download() as download:
        page.click("text=Download as CSV")
    download.value.save_as(tmp_path / "ranking.csv")
    rows = list(csv.DictReader((tmp_path / "ranking.csv").read_text().splitlines()))
    assert [row["optimizer"] for row in rows] == ["CMA", "LCSC", "answer · CMA, trial 1"]
    assert float(rows[0]["held_out"]) == pytest.approx(3.1)

    page.click("#axis")
    page.click("text=evaluation time, all workers")
    page.wait_for_url("**axis=seconds**")
    page.reload()
    compare.drawn("curves")
    shown = "document.querySelector('#curves .js-plotly-plot')?.layout?.xaxis?.title?.text"
    compare.until(f"{shown}?.startsWith('evaluation time')")
    assert compare.figure("curves")["y_type"] == "log"
    assert "experiment=digits" in page.get_attribute("nav >> text=Images", "href")


def test_labels_of_a_logarithmic_axis_do_not_overlap(page: Any, dashboard: Switched, url: str) -> None:
    write_study(url, "wide/LCSC/0", [0.11 * 3000, 0.11])
    home = dashboard.show(url)
    narrow = (  # to one span after the other; the layout stays, and plotly chooses the labels anew
        "span => { const f = document.querySelector('#curves .js-plotly-plot');"
        "const narrowed = y => 0.11 * (y / 0.11) ** (Math.log(span) / Math.log(Math.max(...f._fullData[0].y) / 0.11));"
        "const data = f.data.map((trace, i) => ({...trace, y: Array.from(f._fullData[i].y, narrowed)}));"
        "return Plotly.react(f, data, f.layout).then(() => f.layout.yaxis.range[1]); }"
    )
    tick_labels = (
        "[...document.querySelectorAll('#curves .ytick text')].map(label => "
        "({text: label.textContent, top: label.getBoundingClientRect().top,"
        " bottom: label.getBoundingClientRect().bottom}))"
    )
    with watched(page, home) as view:
        page.goto(f"{home}/lcsc/compare?scale=y")
        view.drawn("curves")
        for span in (3000, 150, 40, 11, 9, 3, 1.1):
            top = page.evaluate(narrow, span)
            assert 0 < top - math.log10(0.11 * span) < 0.5
            assert view.figure("curves")["y_type"] == "log"
            labels = sorted(page.evaluate(tick_labels), key=lambda label: label["top"])
            assert len(labels) > 1
            for upper, lower in itertools.pairwise(labels):
                assert upper["bottom"] <= lower["top"], (span, upper["text"], lower["text"])
        assert view.problems == []


def test_images_zoom_and_scroll(view: Watched, home: str) -> None:
    page = view.page
    page.goto(f"{home}/lcsc/images?experiment=digits&zoom=200")
    view.until("document.querySelector('.pane img')?.naturalWidth === 80")
    view.until("(p => p.querySelector('img').width > 1.9 * p.clientWidth)(document.querySelector('.pane'))")
    assert page.evaluate("(p => p.scrollWidth > p.clientWidth)(document.querySelector('.pane'))")
    assert headline(view).startswith("The answer is CMA, trial 1")
    page.focus("#zoom")
    page.keyboard.press("Home")
    view.until("(p => p.scrollWidth <= p.clientWidth)(document.querySelector('.pane'))")
    page.wait_for_url("**zoom=100**")
    page.focus("#samples-edge")
    page.keyboard.press("Home")
    view.until("getComputedStyle(document.querySelector('.over img + img')).clipPath === 'inset(0px 0px 0px 0%)'")


OUTSIDE = """[...document.querySelectorAll('.js-plotly-plot')].flatMap(place => {
    const edges = place.getBoundingClientRect();
    return [...place.querySelectorAll('text')].filter(text => {
        const {left, right, width} = text.getBoundingClientRect();
        return width && (left < edges.left - 1 || right > edges.right + 1);
    }).map(text => text.textContent);
})"""


def test_a_report_draws_visible_figures_and_fits_a_phone(page: Any, url: str, tmp_path: Path) -> None:
    """Legends are below the curves, and no title is cut."""
    storage = open_storage(url, write=True)
    found = {}
    for loss, name in ((2.7, "EMAGrid"), (2.5, "LCSCGradient"), (2.6, "OnePlusOne")):
        study = study_examples.write_study(storage, f"narrow{MARKUP}/{name}/0", [])
        study.set_attribute("layer_groups", {"unet.down_blocks.0.resnets.1.time_emb_proj": 1, "unet.up_blocks.0": 1})
        for number in range(4):
            add_result(study, number, 4.0 - number, at=np.stack([coefficients(number)] * 2))
        found[study.name] = measured(loss, trial=1, fid=loss, precision=0.5)
    study_examples.write_report(storage, report_of(found), f"narrow{MARKUP}")
    add_result(study, 4, None, reason=MARKUP)
    path = write_report(open_storage(url, write=False), f"narrow{MARKUP}", tmp_path / "report.html")
    with watched(page, path.as_uri()) as view:
        page.set_viewport_size({"width": 390, "height": 844})
        page.goto(path.as_uri())
        view.until("document.querySelectorAll('.figure[data-drawn]').length >= 1")
        assert page.evaluate("document.querySelectorAll('details:not([open]) .figure').length") == 3
        assert not page.evaluate("document.querySelectorAll('details:not([open]) .figure[data-drawn]').length")
        assert page.title() == f"narrow{MARKUP}"
        titles = page.evaluate("[...document.querySelectorAll('[data-title]')].map(e => e.dataset.title)")
        assert "Reset axes" in titles
        assert not [title for title in titles if "hare" in title or "loud" in title], "data stay here"
        page.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true; })")
        view.until("!document.querySelector('.figure:not([data-drawn])')")
        widths = page.evaluate("[...document.querySelectorAll('.js-plotly-plot')].map(f => f._fullLayout._size.w)")
        assert min(widths[:1]) > 200, "of the curves; 122 with the legend beside them"
        assert page.evaluate(OUTSIDE) == []
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert view.problems == []


def test_a_page_says_when_its_server_has_ended_and_when_it_is_back(
    page: Any, home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refresh_each(200, monkeypatch)
    page.goto(f"{home}/lcsc/images")
    page.wait_for_selector(".pane img")
    page.context.set_offline(True)
    try:
        page.wait_for_selector("text=lcsc dashboard has ended")
    finally:
        page.context.set_offline(False)
    page.wait_for_selector("#ended", state="hidden")
