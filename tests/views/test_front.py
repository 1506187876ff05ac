"""A front as plain data: told from the names of experiments and from what was measured on other noise."""

from __future__ import annotations

from typing import Any

import pytest
from optuna.storages import RDBStorage

from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.views.figures.front import front_figure
from lcsc_opt.views.front import Front, at_weight_zero, front_of, front_rows, front_table, without_term
from tests.front_examples import write_ema, write_front, write_point


@pytest.fixture
def storage(url: str) -> RDBStorage:
    return open_storage(url, write=True)


def read(storage: RDBStorage, name: str = "digits") -> Front:
    found = front_of(HistoryReader(storage), name)
    assert found is not None
    return found


@pytest.mark.parametrize("name", ["digits", "digits,near=0", "digits,near=6"])
def test_every_experiment_of_a_front_gives_the_same(storage: RDBStorage, name: str) -> None:
    write_front(storage)
    front = read(storage, name)
    assert front == read(storage)
    assert front.name == "digits"
    [curve] = front.curves
    assert [(point.shown, point.fid, point.precision) for point in curve.points] == [
        ("near=0", 3.8, 0.547),
        ("near=6", 5.6, 0.617),
        ("near=12", 8.0, 0.65),
    ], "by weight, not by text"
    assert front.ema is not None
    assert [(point.short, point.fid) for point in front.ema.points] == [("0.99", 28.4), ("0.999", 30.0)]


def test_the_headline_is_what_is_reached_at_the_precision_of_ema(storage: RDBStorage) -> None:
    write_front(storage)
    assert read(storage).headline == "at EMA*'s precision, 0.620 (within 0.01): near=6, FID 5.6, 20 % of EMA*'s 28.4"


def test_where_no_search_is_as_precise_that_is_said(storage: RDBStorage) -> None:
    write_point(storage, "digits,near=0/LCSC/0", fid=3.0, precision=0.5)
    assert read(storage).headline is None, "EMA* is not known yet"
    write_ema(storage)
    assert str(read(storage).headline).startswith("no search has EMA*'s precision, 0.620")


def test_other_sweeps_have_no_front_and_other_settings_one_of_their_own(storage: RDBStorage) -> None:
    write_point(storage, "samples,images=200/LCSC/0", fid=3.0, precision=0.5)
    assert front_of(HistoryReader(storage), "samples,images=200") is None
    assert front_of(HistoryReader(storage), "samples") is None
    for images in (200, 1000):
        write_point(storage, f"samples,images={images},near=3/LCSC/0", fid=images / 100, precision=0.5)
    assert [point.fid for point in read(storage, "samples,images=1000").points] == [10.0]


def test_what_was_not_measured_is_left_out(storage: RDBStorage) -> None:
    write_point(storage, "digits,near=0/LCSC/0", fid=3.0, precision=0.5)
    write_point(storage, "digits,near=3/LCSC/0", fid=3.0, precision=None)
    assert [point.shown for point in read(storage).points] == ["near=0"]


def test_seeds_and_optimizers_have_curves_of_their_own(storage: RDBStorage) -> None:
    for name in ("LCSC/0", "LCSC/1", "CMA/0"):
        write_point(storage, f"digits,near=3/{name}", fid=3.0, precision=0.5)
    labels = [curve.label for curve in read(storage).curves]
    assert sorted(labels) == ["CMA, near, seed 0", "LCSC, near, seed 0", "LCSC, near, seed 1"]


def test_an_extractor_of_the_metrics_is_named(storage: RDBStorage) -> None:
    write_point(storage, "digits,near=3/LCSC/0", fid=3.0, precision=0.5, at="@clip")
    front = read(storage)
    assert front.extractor == "@clip"
    assert front_table(front)[0][3:6] == ("FID@clip", "precision@clip", "recall@clip")
    assert front_figure(front).layout.yaxis.title.text == "FID@clip"


def test_table_rows_and_figure_name_the_studies(storage: RDBStorage) -> None:
    write_front(storage)
    front = read(storage)
    _, table = front_table(front)
    studies = [row[0] for row in table]
    assert studies == [row["study"] for row in front_rows(front)]
    assert [row[1] for row in table if "EMA*" in row[1]] == ["EMA 0.99 (EMA*)"]
    drawn: Any = front_figure(front)
    assert [point for trace in drawn.data[::2] for point in trace.y] == [point.fid for point in front.points]
    hovers = [text for trace in drawn.data[::2] for [text] in trace.customdata]
    assert all(study in text for study, text in zip(studies, hovers, strict=True))


@pytest.mark.parametrize(
    ("name", "without"),
    [
        ("digits", "digits"),
        ("digits,near=3", "digits"),
        ("digits,images=200,hinge=1", "digits,images=200"),
        ("near", "near"),
    ],
)
def test_the_name_of_a_front_is_without_the_weight(name: str, without: str) -> None:
    assert without_term(name) == without


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("digits,near=3", "digits,near=0"),
        ("digits,images=200,hinge=1", "digits,images=200,hinge=0"),
        ("digits,images=200", None),
        ("digits,near=far", None),
    ],
)
def test_the_rates_of_ema_are_at_weight_zero(name: str, wanted: str | None) -> None:
    assert at_weight_zero(name) == wanted
