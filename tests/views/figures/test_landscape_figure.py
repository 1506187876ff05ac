from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
from optuna.storages import RDBStorage

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.views.figures.landscape import heights_of, landscape_figure
from lcsc_opt.views.figures.of_study import study_figures
from lcsc_opt.views.landscape import MOST_CANDIDATES, Landscape, LandscapeReader, _chosen
from lcsc_opt.views.report import report
from tests.study_examples import coefficients, write_study
from tests.views.landscape_examples import bowl, write_landscape

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
def storage(url: str) -> RDBStorage:
    return open_storage(url, write=True)


def read(storage: RDBStorage, name: str = "digits/Landscape/0") -> Landscape:
    return LandscapeReader(HistoryReader(storage)).read(name)


def texts(figure: go.Figure) -> str:
    return json.dumps(json.loads(figure.to_json()), ensure_ascii=False)


# data


def test_the_values_are_those_of_the_plane(storage: RDBStorage) -> None:
    write_landscape(storage, size=5, margin=0.5)
    found = read(storage)
    assert found.axis.tolist() == [-0.5, 0.0, 0.5, 1.0, 1.5]
    np.testing.assert_allclose(found.values, [[bowl(x, y) for x in found.axis] for y in found.axis])
    assert (found.done, found.total, found.metric, found.running) == (25, 25, "FID", False)
    assert found.best is not None
    assert (found.best.x, found.best.y, found.best.loss) == (0.5, 1.0, 1.0)
    assert found.best.trial is not None
    assert found.corner_labels == ("step 100", "step 200", "step 300")
    assert [(p.x, p.y, p.loss) for p in found.corners] == [(0, 0, bowl(0, 0)), (1, 0, bowl(1, 0)), (0, 1, bowl(0, 1))]
    assert found.candidates == ()


def test_corners_between_the_points_of_the_grid_are_corners_only(storage: RDBStorage) -> None:
    write_landscape(storage, size=4, margin=0.5)
    found = read(storage)
    assert found.total == 19
    assert found.values.shape == (4, 4)
    assert not np.isnan(found.values).any()
    np.testing.assert_allclose(found.values, [[bowl(x, y) for x in found.axis] for y in found.axis])
    assert found.corners[1].loss == bowl(1, 0)


def test_a_landscape_that_is_begun_has_holes(storage: RDBStorage) -> None:
    write_landscape(storage, size=3, points=2)
    found = read(storage)
    assert (found.done, found.total) == (2, 12)
    assert [point.loss for point in found.corners] == [bowl(0, 0), bowl(1, 0), None]
    assert np.isnan(found.values).all()
    write_landscape(storage, "digits/Landscape/1", size=3, points=0)
    empty = read(storage, "digits/Landscape/1")
    assert (empty.done, empty.best, empty.at_edge) == (0, None, False)


def test_points_that_failed_are_told_from_those_to_come(storage: RDBStorage) -> None:
    write_landscape(storage, size=3, loss=lambda x, y: None if x > 1 else bowl(x, y), points=9)
    found = read(storage)
    assert found.done == 9
    assert found.failed.tolist() == [[1.5, -0.5], [1.5, 1.5]]


@pytest.mark.parametrize(("lowest", "at_edge"), [((0.5, 0.5), False), ((-0.5, 0.5), True), ((1.5, 1.5), True)])
def test_a_lowest_point_on_the_edge_is_noticed(storage: RDBStorage, lowest: tuple[float, float], at_edge: bool) -> None:
    write_landscape(storage, size=5, loss=lambda x, y: 1 + (x - lowest[0]) ** 2 + (y - lowest[1]) ** 2)
    assert read(storage).at_edge == at_edge


def test_candidates_are_projected_in_coefficients(storage: RDBStorage) -> None:
    write_landscape(storage)
    write_study(storage, "digits/LCSC/0", [4.0, None, 2.0, 3.0])
    (known,) = read(storage).candidates
    # with three checkpoints as corners x and y are the coefficients of the second and the third one
    np.testing.assert_allclose(known.positions, [coefficients(n)[1:] for n in (0, 2, 3)], atol=1e-12)
    assert known.losses.tolist() == [4.0, 2.0, 3.0]
    assert known.numbers.tolist() == [0, 2, 3]
    assert known.improved.tolist() == [True, True, False]
    assert known.answer is not None
    assert (known.answer.trial, known.answer.loss) == (2, 2.0)
    assert read(storage).space == "coefficients"


def test_candidates_are_projected_in_weights_with_what_is_stored(storage: RDBStorage) -> None:
    theta = np.random.default_rng(0).normal(size=(3, 9))
    directions = theta[1:] - theta[0]
    write_landscape(storage, products=(directions @ (theta - theta.mean(axis=0)).T).tolist())
    write_study(storage, "digits/LCSC/0", [4.0, 2.0])
    found = read(storage)
    assert found.space == "weights"
    expected = [np.linalg.lstsq(directions.T, coefficients(n) @ theta - theta[0], rcond=None)[0] for n in (0, 1)]
    np.testing.assert_allclose(found.candidates[0].positions, expected, atol=1e-9)


def test_the_answer_is_the_chosen_trial(storage: RDBStorage) -> None:
    write_landscape(storage)
    write_study(storage, "digits/LCSC/0", [4.0, 2.0, 3.0], held_out={"trial": 0, "loss": 2.75})
    answer = read(storage).candidates[0].answer
    assert answer is not None
    assert (answer.trial, answer.loss) == (0, 4.0)


def test_searches_are_those_of_the_experiment_over_the_same_checkpoints(storage: RDBStorage) -> None:
    write_landscape(storage)
    write_landscape(storage, "digits/Landscape/1")
    write_study(storage, "digits/EMAGrid/0", [1.0])
    write_study(storage, "digits/CMA/0", [3.0])
    write_study(storage, "digits/LCSC/0", [None])
    write_study(storage, "faces/LCSC/0", [2.0])
    write_study(storage, "digits/DE/0", [1.0]).set_attribute("steps", [100, 200, 400])
    found = read(storage)
    assert [known.study for known in found.candidates] == ["digits/EMAGrid/0", "digits/CMA/0"]
    assert found.found is not None
    assert found.found.study == "digits/CMA/0"  # an EMA grid is no search
    reader = LandscapeReader(HistoryReader(storage))
    assert reader.names() == ["digits/Landscape/0", "digits/Landscape/1"]
    assert reader.names("faces") == []


def test_few_of_many_candidates_are_read(storage: RDBStorage) -> None:
    improved = np.array([0, 3, 400, 1999])
    shown = _chosen(2000, improved, np.array([1234]))
    assert {0, 3, 400, 1999, 1234} <= set(shown.tolist())
    assert MOST_CANDIDATES - 5 <= len(shown) <= MOST_CANDIDATES + 2
    assert np.diff(shown).max() < 60
    assert _chosen(3, np.array([0, 2]), np.array([2])).tolist() == [0, 1, 2]
    assert len(_chosen(3000, np.arange(3000), np.array([2999]))) <= MOST_CANDIDATES


def test_a_refresh_reads_coefficients_only_of_studies_that_changed(
    storage: RDBStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_landscape(storage)
    write_study(storage, "digits/LCSC/0", [4.0, 2.0])
    write_study(storage, "digits/CMA/0", [4.0, 2.0])
    asked: list[str] = []
    original = HistoryReader.coefficients

    def counted(reader: HistoryReader, study: Any, numbers: Any) -> Any:
        asked.append(study.study)
        return original(reader, study, numbers)

    monkeypatch.setattr(HistoryReader, "coefficients", counted)
    reader = LandscapeReader(HistoryReader(storage))
    first = reader.read("digits/Landscape/0")
    again = reader.read("digits/Landscape/0")
    assert asked == ["digits/LCSC/0", "digits/CMA/0"]
    assert again.signature == first.signature
    write_study(storage, "digits/CMA/0", [1.0])
    changed = reader.read("digits/Landscape/0")
    assert asked == ["digits/LCSC/0", "digits/CMA/0", "digits/CMA/0"]
    assert changed.signature != first.signature
    assert changed.found is not None
    assert changed.found.study == "digits/CMA/0"


@pytest.mark.parametrize("corners", [["ema:0.9", "ema:0.99"], [100, 200, 250], "abc"])
def test_a_damaged_landscape_is_one_line(storage: RDBStorage, corners: Any) -> None:
    study = write_landscape(storage)
    study.set_attribute("specification", {"optimizer": {"options": {"corners": corners}}})
    with pytest.raises(
        StudyStoreError, match=r"digits/Landscape/0: not a landscape of lcsc_opt, or of another version"
    ):
        read(storage)


def test_there_is_no_such_landscape(storage: RDBStorage) -> None:
    write_study(storage, "digits/LCSC/0", [2.0])
    with pytest.raises(StudyStoreError, match="digits/LCSC/0: no such landscape; compute one: lcsc landscape"):
        read(storage, "digits/LCSC/0")


def test_json_holds_no_nan(storage: RDBStorage) -> None:
    write_landscape(storage, points=5)
    row = json.loads(json.dumps(read(storage).as_row(), allow_nan=False))
    assert (row["evaluated"], row["total"]) == (5, 12)
    assert None in row["values"][1]


# others


def test_a_landscape_is_no_search(storage: RDBStorage, tmp_path: Path) -> None:
    write_study(storage, "digits/LCSC/0", [4.0, 2.0], held_out={"trial": 1, "loss": 2.5})
    write_landscape(storage, loss=lambda *_: 0.1)
    reader = HistoryReader(storage)
    assert [study.study for study in reader.read("digits")] == ["digits/LCSC/0"]
    assert reader.names() == ["digits/LCSC/0", "digits/Landscape/0"]
    assert reader.searches() == ["digits/LCSC/0"]
    page = report(HistoryReader(storage), "digits", tmp_path).partition("<footer>")[0]
    assert page.count("<h2>Landscape</h2>\n<h3>digits/Landscape/0</h3>") == 1
    ranked, _, rest = page.partition("<h2>Landscape</h2>")
    assert "Landscape" not in ranked
    assert "<summary>digits/Landscape/0</summary>" not in rest
    assert "coefficients" in study_figures(storage, "digits/Landscape/0")


def test_an_experiment_of_landscapes_alone_is_none(storage: RDBStorage) -> None:
    write_landscape(storage)
    reader = HistoryReader(storage)
    assert reader.experiments() == []
    with pytest.raises(StudyStoreError, match="digits: no such experiment"):
        reader.read("digits")
    assert read(storage).best is not None


# the figure


def contour(figure: go.Figure) -> Any:
    (found,) = [trace for trace in figure.data if trace.type == "contour"]
    return found


def test_colours_are_logarithmic_where_losses_differ_much() -> None:
    values = np.array([[10.0, 100.0], [1000.0, np.nan]])
    heights, ticks, labels = heights_of(values)
    np.testing.assert_allclose(heights, [[0, 1], [2, np.nan]])  # type: ignore[arg-type]
    assert (ticks[0], ticks[-1]) == (0, 2)
    assert (labels[0], labels[-1]) == ("10", "1e+03")


@pytest.mark.parametrize("values", [[[10.0, 12.0]], [[-3.0, 100.0]], [[0.0, 5.0]], [[2.0, 2.0]]])
def test_else_they_are_linear_and_begin_at_the_lowest(values: Any) -> None:
    heights, ticks, labels = heights_of(np.array(values))
    np.testing.assert_allclose(heights, np.array(values) - np.min(values))
    assert ticks[-1] == np.ptp(values)
    assert labels[-1] == f"{np.max(values):.3g}"


def test_the_figure_shows_plane_corners_candidates_and_answers(storage: RDBStorage) -> None:
    write_landscape(storage, size=5)
    write_study(storage, "digits/EMAGrid/0", [3.0])
    write_study(storage, "digits/LCSC/0", [4.0, 2.0])
    write_study(storage, "digits/LCSC/1", [4.0, 2.5])
    figure = landscape_figure(read(storage))
    drawn = contour(figure)
    assert np.shape(drawn.z) == (5, 5)
    assert drawn.text[3][2] == "1"
    assert [trace.name for trace in figure.data if trace.showlegend is not False] == ["corners", "EMA*", "LCSC"]
    (corners,) = [trace for trace in figure.data if trace.name == "corners"]
    assert list(zip(corners.x, corners.y, strict=True)) == [(0, 0), (1, 0), (0, 1), (0, 0)]
    assert [note.text for note in figure.layout.annotations] == ["lowest on the plane: 1", "best found: LCSC: 2"]
    assert figure.layout.xaxis.title.text == "x: from step 100 (0) to step 200 (1)"
    assert figure.layout.uirevision == "landscape/digits/Landscape/0"


def test_what_is_outside_of_the_view_is_said(storage: RDBStorage) -> None:
    write_landscape(storage, size=3, margin=0.0)
    write_study(storage, "digits/LCSC/0", [9.0 - number for number in range(9)])  # moves away: y = 0.75 + number / 4
    figure = landscape_figure(read(storage))
    assert "7 candidates lie outside of this view, among them the answer of LCSC/0 at (0.25, 2.75)." in texts(figure)
    assert figure.layout.yaxis.range[1] < 1.1
    assert len(figure.layout.annotations) == 1
    near = landscape_figure(read_with(storage, margin=1.0))
    assert "outside of this view" not in texts(near)
    assert near.layout.yaxis.range[1] > 2.75


def read_with(storage: RDBStorage, margin: float) -> Landscape:
    write_landscape(storage, "digits/Landscape/1", margin=margin)
    return read(storage, "digits/Landscape/1")


def test_another_number_of_images_is_said(storage: RDBStorage) -> None:
    write_landscape(storage, images=500)
    write_study(storage, "digits/LCSC/0", [4.0], images=1000)
    assert "500 images a point, the searches are not" in texts(landscape_figure(read(storage)))


def test_failed_points_are_drawn(storage: RDBStorage) -> None:
    write_landscape(storage, size=3, loss=lambda x, y: None if x > 1 else bowl(x, y))
    (failed,) = [trace for trace in landscape_figure(read(storage)).data if trace.name == "failed"]
    assert sorted(zip(failed.x, failed.y, strict=True)) == [(1.5, -0.5), (1.5, 0.5), (1.5, 1.5)]


def test_empty_states_say_what_to_run(storage: RDBStorage) -> None:
    assert "lcsc landscape" in texts(landscape_figure(None))
    write_landscape(storage, points=0)
    assert "Continue: lcsc resume" in texts(landscape_figure(read(storage), theme="dark"))


def test_markup_is_inert(storage: RDBStorage) -> None:
    write_landscape(storage, f"{HOSTILE}%{{x}}/Landscape/0")
    write_study(storage, f"{HOSTILE}%{{x}}/LCSC/0", [2.0], metric=HOSTILE)
    shown = texts(landscape_figure(read(storage, f"{HOSTILE}%{{x}}/Landscape/0")))
    assert "<script" not in shown
    templates = [trace.hovertemplate for trace in landscape_figure(read(storage, f"{HOSTILE}%{{x}}/Landscape/0")).data]
    assert not [text for text in templates if text and "%{x}/" in text]


def test_a_dark_page_can_be_drawn(storage: RDBStorage) -> None:
    write_landscape(storage)
    assert contour(landscape_figure(read(storage), theme="dark")).autocolorscale is None
