"""The figures of one study and of several answers, from a database."""

from __future__ import annotations

import json

import numpy as np
import plotly.graph_objects as go
from optuna.storages import RDBStorage

from lcsc_opt.base.records import Candidate, Evaluation
from lcsc_opt.coefficients.profiles import sum_abs
from lcsc_opt.database.history import Standing
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.views.figures.comparison import comparison_figure
from lcsc_opt.views.figures.study import coefficients_figure
from lcsc_opt.views.figures.theme import empty_figure, inert
from tests.history_examples import measured
from tests.study_examples import STEPS, coefficients, write_mean, write_study

HOSTILE = "<script>alert(1)</script><a href='javascript:alert(1)'>x</a>"


def read(storage: RDBStorage, experiment: str = "digits") -> tuple[HistoryReader, tuple[Standing, ...]]:
    reader = HistoryReader(storage)
    return reader, reader.read(experiment)


def texts(figure: go.Figure) -> str:
    return json.dumps(json.loads(figure.to_json()), ensure_ascii=False)


def test_coefficients_are_bars_over_the_training_that_they_stand_for(storage: RDBStorage) -> None:
    for name, losses in (("EMAGrid/0", [9.0]), ("LCSC/0", [4.0, 2.0, 1.0]), ("LCSC/1", [4.0, 2.0])):
        report = measured(2.75, trial=1) if name == "LCSC/0" else None
        write_study(storage, f"digits/{name}", losses, held_out=report).set_attribute("steps", [100, 200, 400])
    reader, (ema, study, _) = read(storage)
    made = coefficients_figure(reader, study, ema)
    bars, line = made.data
    assert (list(bars.x), list(bars.width), list(bars.offset)) == ([100, 200, 400], [100, 100, 200], [-100, -100, -200])
    assert list(bars.y) == coefficients(1).tolist()
    assert (line.name, line.mode) == ("EMA*", "lines")
    assert made.layout.yaxis.title.text == "coefficient"
    assert f"2.75 held out, Σ|a| = {sum_abs(coefficients(1)):.2f}" in texts(made)
    alone = coefficients_figure(reader, ema, ema)
    assert len(alone.data) == 1, "EMA* is not drawn over itself"
    assert (made.layout.showlegend, alone.layout.showlegend) == (True, False), "one name needs no legend"


def test_an_answer_that_is_a_mean_of_iterates_is_not_called_a_trial(storage: RDBStorage) -> None:
    name, mean = "digits/LCSCGradient/0", np.array([0.5, 0.25, 0.25])
    write_study(storage, name, [4.0, 2.0])
    write_mean(storage, name, mean, 1.75)
    reader, (study,) = read(storage)
    made = coefficients_figure(reader, study)
    assert list(made.data[0].y) == mean.tolist()
    title = made.layout.annotations[0].text.replace("<br>", " ")
    assert title.startswith(f"{name}, mean of the last half 1.75 held out")


def test_rows_are_a_heat_map(storage: RDBStorage) -> None:
    names = ["conv_in", "conv_out", "down.9.norm", "down.10.norm", "mid_block.to_out", "time_embedding", "up_blocks.0"]
    found = np.stack([coefficients(number) for number in range(len(names) + 1)])
    known = {"steps": STEPS, "layer_groups": {**dict.fromkeys(names, 1), "up_blocks.0": 2}}  # two channels
    for name, answer in (("LCSCGradient/0", found), ("EMAGrid/0", found[0])):
        study = StoredStudy.open_or_create(storage, f"digits/{name}", known)
        study.finish(study.add_candidate(Candidate(answer)), Evaluation(1.0))
        study.set_attribute("search_ended", {"evaluations": 1, "exhausted": False})
    reader, studies = read(storage)
    bars, ema, heat = coefficients_figure(reader, *studies).data
    assert list(heat.y) == [*names[:-1], "up_blocks.0 (2)"]
    np.testing.assert_allclose(heat.z, [*found[:-2], found[-2:].mean(axis=0)])
    assert (list(heat.x), heat.zmin) == ([0, *STEPS], -heat.zmax)
    np.testing.assert_allclose([bars.y, ema.y], [found.mean(axis=0), found[0]])


def test_the_lines_of_a_title_fit_a_phone(storage: RDBStorage) -> None:
    name = "a-long-name-" * 8 + "x/LCSCGradient/12"
    write_study(storage, name, [4.0, 2.0], held_out=measured(2.75, trial=1))
    reader, (study,) = read(storage, name.split("/")[0])
    made = coefficients_figure(reader, study)
    lines = made.layout.annotations[0].text.split("<br>")
    assert "".join(lines).startswith(name[:30])
    assert max(map(len, lines)) <= 36
    assert made.layout.margin.t >= 17 * len(lines)


def test_figures_without_data_say_what_to_run(storage: RDBStorage) -> None:
    write_study(storage, "digits/LCSC/0", [], ended=False)
    reader, (study,) = read(storage)
    for made in (coefficients_figure(reader, study), comparison_figure([study]), comparison_figure([])):
        assert not made.data
        (sentence,) = made.layout.annotations
        assert "lcsc r" in sentence.text
        assert made.layout.xaxis.visible is False


def test_markup_in_names_is_text(storage: RDBStorage) -> None:
    assert inert(HOSTILE).count("<") == 0
    name = HOSTILE.replace("/", "")
    for seed in range(2):
        write_study(storage, f"digits/{name}/{seed}", [2.0, None, 1.0], metric=HOSTILE)
    reader, studies = read(storage)
    for made in (coefficients_figure(reader, studies[0]), comparison_figure(studies), empty_figure(HOSTILE)):
        assert not any(tag in texts(made) for tag in ("<script", "<a"))
