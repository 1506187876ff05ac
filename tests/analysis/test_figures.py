from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.collections import LineCollection
from optuna.storages import RDBStorage
from study_examples import STEPS, coefficients, write_study

from lcsc_opt.analysis.comparison import StudySummary, summaries, summarize
from lcsc_opt.analysis.figures import (
    COLOURS,
    OTHER_COLOURS,
    colour,
    draw_coefficients,
    draw_comparison,
    draw_image_pairs,
    save,
)
from lcsc_opt.database import open_storage
from lcsc_opt.errors import StudyStoreError


@pytest.fixture
def storage(url: str) -> RDBStorage:
    return open_storage(url, write=True)


@pytest.fixture
def studies(storage: RDBStorage) -> list[StudySummary]:
    write_study(storage, "digits/EMAGrid/0", [9.0, 7.0, 8.0], held_out={"trial": 1, "loss": 7.5})
    write_study(storage, "digits/LCSC/0", [9.0, 5.0, 6.0, 2.0], held_out={"trial": 3, "loss": 2.5})
    write_study(storage, "digits/LCSC/1", [8.0, None, 3.0])
    write_study(storage, "digits/DE/0", [], ended=False, running=1)
    return summaries(storage, "digits")


def rendered(figure: Any, folder: Path) -> np.ndarray:
    """What a reader sees; rendering is where matplotlib complains."""
    return np.asarray(matplotlib.image.imread(save(figure, folder / "figure.png")))


def lines_of(axes: Any, shade: str) -> list[Any]:
    return [line for line in axes.lines if line.get_color() == shade]


def test_a_comparison_shows_the_best_so_far_against_each_cost(studies: list[StudySummary], tmp_path: Path) -> None:
    figure = draw_comparison(studies)
    assert [axes.get_xlabel() for axes in figure.axes] == ["evaluations", "images sampled", "seconds of evaluation"]
    assert figure.get_suptitle() == "best FID so far"
    assert figure.axes[0].get_ylabel() == "FID on the search's noise (diamonds: held out)"
    assert all(axes.get_yscale() == "log" for axes in figure.axes)
    legend = figure.axes[0].get_legend()
    assert legend is not None
    shown = {text.get_text() for text in legend.get_texts()}
    assert shown == {"EMA*", "LCSC (2 seeds)"}, "what has no result is left out"

    curve, diamonds = lines_of(figure.axes[0], COLOURS["LCSC"])
    assert curve.get_xdata().tolist() == [1, 2, 3]
    np.testing.assert_allclose(curve.get_ydata(), [8.5, 6.5, 4.0])
    assert (diamonds.get_marker(), diamonds.get_linestyle()) == ("D", "None")
    assert list(diamonds.get_ydata()) == [2.5]

    step, diamond, across = lines_of(figure.axes[1], COLOURS["EMAGrid"])
    assert step.get_xdata().tolist() == [10, 20, 30]
    assert list(diamond.get_ydata()) == [7.5]
    assert list(across.get_ydata()) == [7.0, 7.0]
    assert across.get_label() == "EMA*"
    assert rendered(figure, tmp_path).std() > 0.01


def test_the_loss_is_called_by_its_name(storage: RDBStorage) -> None:
    study = summarize(write_study(storage, "mine/CMA/0", [3.0, 2.0], metric=None))
    figure = draw_comparison([study])
    assert figure.get_suptitle() == "best loss so far"
    assert "FID" not in figure.axes[0].get_ylabel()


def test_a_comparison_without_an_ema_grid_has_no_line_across(storage: RDBStorage, tmp_path: Path) -> None:
    study = summarize(write_study(storage, "digits/CMA/0", [3.0, 2.0]))
    figure = draw_comparison([study])
    assert [len(axes.lines) for axes in figure.axes] == [1, 1, 1]
    rendered(figure, tmp_path)


def test_a_comparison_of_what_has_no_result_yet_is_empty(storage: RDBStorage, tmp_path: Path) -> None:
    study = summarize(write_study(storage, "digits/CMA/0", [], ended=False))
    for shown in ([study], []):
        figure = draw_comparison(shown)
        assert not any(axes.lines for axes in figure.axes)
        rendered(figure, tmp_path)


def test_losses_below_zero_are_shown_on_a_plain_axis(storage: RDBStorage, tmp_path: Path) -> None:
    study = summarize(write_study(storage, "mine/CMA/0", [3.0, -2.0, -5.0]))
    figure = draw_comparison([study])
    for axes in figure.axes:
        assert axes.get_yscale() == "linear"
        assert axes.get_ylim()[0] < -5
    rendered(figure, tmp_path)


def test_an_objective_without_images_is_drawn_all_the_same(storage: RDBStorage, tmp_path: Path) -> None:
    study = summarize(write_study(storage, "mine/CMA/0", [3.0, 2.0], images=0))
    rendered(draw_comparison([study]), tmp_path)


def test_an_optimizer_has_one_colour() -> None:
    assert [colour(name) for name in COLOURS] == list(COLOURS.values())
    assert len({*COLOURS.values(), *OTHER_COLOURS}) == len(COLOURS) + len(OTHER_COLOURS)
    assert colour("TwoPointsDE") == colour("TwoPointsDE")
    assert {colour(f"o{i}") for i in range(50)} == set(OTHER_COLOURS)


def test_coefficients_are_drawn_over_training_steps_with_those_of_the_best_ema(
    studies: list[StudySummary], tmp_path: Path
) -> None:
    ema, found = studies[0], studies[1]
    figure = draw_coefficients(found, ema)
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("training step of the checkpoint", "coefficient")
    total = np.abs(coefficients(3)).sum()
    assert axes.get_title() == f"digits/LCSC/0, trial 3: Σ|a| = {total:.2f}"
    (stems,) = [collection for collection in axes.collections if isinstance(collection, LineCollection)]
    ends = [segment[np.abs(segment[:, 1]).argmax()] for segment in stems.get_segments()]
    np.testing.assert_allclose(ends, np.column_stack([STEPS, coefficients(3)]))
    curve = next(line for line in axes.lines if line.get_label() == "EMA*")
    np.testing.assert_allclose(curve.get_ydata(), coefficients(1))
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["LCSC", "EMA*"]
    assert rendered(figure, tmp_path).std() > 0.01


@pytest.mark.parametrize("ema", [True, False])
def test_coefficients_of_the_ema_itself_or_without_one_have_one_line(studies: list[StudySummary], ema: bool) -> None:
    (axes,) = draw_coefficients(studies[0], studies[0] if ema else None).axes
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["EMA*"]


def test_a_study_without_a_result_has_no_coefficients_to_draw(studies: list[StudySummary]) -> None:
    with pytest.raises(StudyStoreError, match=r"^digits/DE/0: no complete trial to draw; run it first"):
        draw_coefficients(studies[3], studies[0])


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3)])
def test_pairs_of_images_stand_at_the_same_place(shape: tuple[int, ...], tmp_path: Path) -> None:
    first = np.random.default_rng(0).random((7, *shape))
    second = 1 - first
    figure = draw_image_pairs(first, second, ("EMA*", "LCSC"), columns=3)
    assert [axes.get_title() for axes in figure.axes] == ["EMA*", "LCSC"]
    for axes, images in zip(figure.axes, (first, second), strict=True):
        sheet = np.asarray(axes.images[0].get_array())
        assert sheet.shape == (3 * 5, 3 * 6, *shape[2:])
        for i, image in enumerate(images):
            row, column = divmod(i, 3)
            np.testing.assert_array_equal(sheet[row * 5 : row * 5 + 4, column * 6 : column * 6 + 5], image)
        assert (sheet[10:, 6:] == 1).all(), "the places that are left stay white"
        assert axes.images[0].get_clim() == (0, 1)
    rendered(figure, tmp_path)


def test_a_figure_is_saved_as_its_suffix_says(studies: list[StudySummary], tmp_path: Path) -> None:
    figure = draw_coefficients(studies[1], None)
    png = save(figure, tmp_path / "new" / "folder" / "figure.png")
    assert png.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert b"<svg" in save(figure, tmp_path / "figure.svg").read_bytes()


def test_a_figure_that_cannot_be_written_is_one_line(studies: list[StudySummary], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    figure = draw_coefficients(studies[1], None)
    with pytest.raises(StudyStoreError, match=re.escape("; give another folder with --figures")):
        save(figure, tmp_path / "file" / "figure.png")
    with pytest.raises(StudyStoreError, match=r"figure\.docx: expected a file that ends in \.png or \.svg"):
        save(figure, tmp_path / "figure.docx")
    assert [entry.name for entry in tmp_path.iterdir() if "figure" in entry.name] == []
