from __future__ import annotations

import json
from typing import Any

import numpy as np

from lcsc_opt.base.records import Candidate, ReportedMetrics
from lcsc_opt.database.names import LAST_CHECKPOINT
from lcsc_opt.views.dashboard import parts
from tests.dashboard_site import Site, write_study, written
from tests.history_examples import measured, report_of
from tests.study_examples import add_result, write_report

NAME = "digits/LCSC/0"
FIGURES = {f"{name}-new" for name in ("best_so_far", "coefficients")}


def draw(site: Site, study: str = NAME, **values: Any) -> dict[str, Any]:
    return site.call("study", "best_so_far-new.data", **{"study": study, "theme": "light", **values})


def chosen(site: Site, search: str) -> Any:
    return site.call("study", "study.value", url=search)["study"]["value"]


def test_the_address_names_the_study_or_its_experiment(url: str) -> None:
    for optimizer, held_out in (("EMAGrid", 0.5), ("LCSC", 2.0), ("CMA", 1.0)):
        write_study(url, f"digits/{optimizer}/0", held_out=held_out)
    write_study(url, "cifar/LCSC/0")
    site = Site(url)
    assert chosen(site, "?study=digits/LCSC/0") == NAME
    assert chosen(site, "?experiment=digits") == "digits/CMA/0"  # the best search, though EMA* is better
    assert chosen(site, "?experiment=nothing") == "cifar/LCSC/0"
    with write_study(url, "digits/LCSC/1", [9.0], ended=False).hold():
        assert chosen(site, "?experiment=digits") == "digits/LCSC/1"


def test_progress_and_every_figure_are_shown(url: str) -> None:
    write_study(url, "digits/EMAGrid/0", [7.0, 5.0], held_out=5.5)
    study = write_study(url, NAME, [4.0, None, 3.0, 2.0], held_out=2.5)
    key = study.add_candidate(Candidate(np.array([0.0, 0.0, 1.0])))
    study.fail(key, [{"reason": "crash", "seconds": 1.0, "traceback": "File <b>, line 3"}])
    shown = draw(Site(url))
    assert shown["headline"]["children"] == "digits/LCSC/0 is finished: FID 2.5 held out, 2 searched"
    assert "5 of 9" in json.dumps(shown["progress"])
    assert "broken" in json.dumps(shown["failures"])
    folded = shown["failures"]["children"]["props"]["children"][-1]
    assert (folded["type"], folded["props"]["children"][1]["props"]["children"]) == ("Details", "File <b>, line 3")
    assert all(shown[name]["data"]["data"] for name in FIGURES)
    assert shown["tick"]["interval"] == parts.IDLE_MS


def test_what_was_measured_of_the_best_trial_is_a_table(url: str) -> None:
    write_study(url, NAME, [4.0, 2.0])
    assert draw(Site(url))["metrics"]["children"] == []
    last = measured(2.0, name=LAST_CHECKPOINT, near=2.87)
    known = ReportedMetrics(signs={"near": 1})
    write_report(written(url), report_of({NAME: measured(2.5, trial=1, near=3.05)}, last, metrics=known))
    texts = json.dumps(draw(Site(url))["metrics"]["children"], ensure_ascii=False)
    assert all(
        json.dumps(cell, ensure_ascii=False) in texts
        for cell in ("LCSC, trial 1", "answer · last checkpoint", "-0.18 (worse)")
    )


def test_a_running_study_says_who_runs_it_and_what_is_evaluated(url: str) -> None:
    study = write_study(url, NAME, [4.0, 3.0, 2.0], ended=False)
    with study.hold():
        study.add_candidate(Candidate(np.array([0.0, 0.0, 1.0])))
        shown = draw(Site(url))
    assert "is running" in shown["headline"]["children"]
    assert "Evaluating trial 3" in json.dumps(shown["progress"])
    assert shown["tick"]["interval"] == 2000


def test_coefficients_are_sent_again_only_for_a_better_trial(url: str) -> None:
    study = write_study(url, NAME, [4.0, 2.0], ended=False)
    site = Site(url)
    seen = draw(site)["seen"]["data"]
    add_result(study, 2, 3.0)
    worse = draw(site, triggered="refresh", seen=seen)
    assert FIGURES.intersection(worse) == {"best_so_far-new"}
    add_result(study, 3, 1.0)
    better = draw(site, triggered="refresh", seen=worse["seen"]["data"])
    assert FIGURES.intersection(better) == FIGURES
    again = draw(site, triggered="refresh", seen=better["seen"]["data"])
    assert not FIGURES.intersection(again)


def test_without_trials_or_studies_it_says_what_to_run(url: str) -> None:
    written(url)
    assert "lcsc run STUDY_FILE" in draw(Site(url), "")["headline"]["children"]
    write_study(url, NAME, [], ended=False)
    shown = draw(Site(url))
    assert "no result yet" in shown["headline"]["children"]
    assert "lcsc run" in json.dumps(shown["coefficients-new"])


def test_a_study_that_is_not_there_is_a_line_of_the_page(url: str) -> None:
    write_study(url, NAME)
    site = Site(url)
    no_such, not_ours = "no such study; choose another one", "not a study of lcsc_opt"
    for name, said in (("digits/<script>alert(1)/0", no_such), ("digits", not_ours), ("../../etc/passwd", not_ours)):
        shown = draw(site, name)
        assert shown["problem"]["children"].startswith(f"{name}: {said}")
        assert "<script>" not in json.dumps(shown.get("best_so_far-new"))
