"""The final choice: on which noise, how often, against which baselines; what is stored, warned of and shown."""

from __future__ import annotations

import dataclasses
import functools
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lcsc_opt.study.held_out import HeldOutPlan, score_held_out
from lcsc_opt.study.measuring import score_trained_models

from lcsc_opt.base.errors import SearchFailedError, StudySpecError, StudyStoreError
from lcsc_opt.base.records import (
    HELD_OUT,
    SEARCH,
    SELECTION,
    Candidate,
    Coefficients,
    Cost,
    Evaluation,
    Noise,
    SamplerTitle,
)
from lcsc_opt.cli import run as lcsc
from lcsc_opt.coefficients.profiles import default_origin
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.report import HeldOutReport
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.objective.contract import Objective, ReportedMetrics, Samples
from lcsc_opt.trajectory import pack
from tests.commands import Typed
from tests.model_studies import EMA_STUDY, OBJECTIVE, STUDY, state_dict, write_model_study
from tests.model_studies import STEPS as MODEL_STEPS
from tests.study_examples import STEPS, coefficients, write_study

PLAN = HeldOutPlan(images=20, top=1)
EMA = default_origin(STEPS)
LAST = (0.0, 0.0, 1.0)
TRIALS = [tuple(coefficients(number)) for number in range(5)]
CROSS_CHECK = "fid@cross_check"


def plain(loss: float) -> dict[str, float]:
    return {"kid": loss / 2}  # reported, and not asked for


def follows(loss: float) -> dict[str, float]:
    return {CROSS_CHECK: 2 * loss}


def trades(loss: float) -> dict[str, float]:
    return {"precision": min(loss, 1.0), "near": loss}


class Measured(Objective):
    """Remembers what it was asked for. Its loss is lowest at trial 1; its metrics follow the loss or do not."""

    steps = STEPS

    def __init__(self, metrics: Callable[[float], dict[str, float]] = follows, *, broken: object = None) -> None:
        self.asked: list[tuple[tuple[float, ...], str, int, int | None]] = []
        self._metrics, self._broken = metrics, broken

    def reported_metrics(self) -> ReportedMetrics:
        names = self._metrics(1.0)
        return ReportedMetrics(
            signs={name: -1 if name == "precision" else 1 for name in names if name != "kid"},
            cross_check=CROSS_CHECK if CROSS_CHECK in names else None,
            real_halves={"precision": 0.9},
        )

    def evaluate(self, candidate: Candidate) -> Evaluation:
        noise = candidate.noise
        self.asked.append((tuple(candidate.coefficients), noise.group, noise.seed, candidate.images))
        if self._broken in (noise.seed, float(candidate.coefficients[0])):
            raise RuntimeError("out of memory")
        loss = 0.5 + float(((candidate.coefficients - coefficients(1)) ** 2).sum()) + noise.seed / 100
        return Evaluation(loss, {"fid": loss, **self._metrics(loss)}, Cost())

    def describe(self) -> dict[str, Any]:
        return {}

    def groups(self, model: Coefficients | None = None) -> list[tuple[str, int]]:
        """The noise of all evaluations of trials, or of those of one model."""
        return [
            (group, seed)
            for known, group, seed, _ in self.asked
            if (known in TRIALS if model is None else known == tuple(model))
        ]


Recording = functools.partial(Measured, plain)


@pytest.fixture
def study(url: str) -> StoredStudy:
    return write_study(open_storage(url, write=True), STUDY, [3.0, 1.0, 2.0, None, 1.5])


def grid(study: StoredStudy) -> StoredStudy:
    return write_study(study.storage, EMA_STUDY, [5.0, 6.0, 4.0])


def row(report: HeldOutReport, metric: str) -> Any:
    return next(row for row in report.rows if row.metric == metric)


def names(report: HeldOutReport) -> list[str]:
    return [baseline.model.name for baseline in report.baselines]


def stored(study: StoredStudy) -> HeldOutReport | None:
    return HeldOutReport.from_json(study.attributes["held_out"])


def test_several_groups_are_reported_with_their_spread(study: StoredStudy) -> None:
    objective = Recording()
    report = score_held_out(study, objective, HeldOutPlan(images=20, top=2, groups=3))
    assert objective.groups() == [("selection", 0)] * 2 + [("held-out", 0), ("held-out", 1), ("held-out", 2)]
    assert {images for *_, images in objective.asked} == {20}
    losses = report.found.values["loss"]
    assert report.found.seeds == (0, 1, 2)
    assert report.loss == pytest.approx(statistics.fmean(losses))
    assert report.found.metrics["kid"] == pytest.approx(report.loss / 2)
    loss, kid = report.rows
    assert (loss.metric, loss.spread) == ("loss", pytest.approx(statistics.stdev(losses)))
    assert (kid.metric, kid.spread) == ("kid", pytest.approx(loss.spread / 2))
    assert stored(study) == report


def test_more_groups_do_not_measure_the_known_ones_again(study: StoredStudy) -> None:
    first = score_held_out(study, Recording(), HeldOutPlan(images=20, top=2))
    objective = Recording()
    report = score_held_out(study, objective, HeldOutPlan(images=20, top=2, groups=2))
    assert objective.groups() == [("held-out", 1)]
    assert report.found.values["loss"][0] == first.loss
    objective = Recording()
    again = score_held_out(study, objective, HeldOutPlan(images=20, top=2, groups=1, first_group=1))
    assert objective.asked == []
    assert (again.found.seeds, again.loss) == ((1,), report.found.values["loss"][1])
    objective = Recording()
    score_held_out(study, objective, HeldOutPlan(images=30, top=2))
    assert objective.groups() == [("selection", 0)] * 2 + [("held-out", 0)]  # other images are another measurement


def test_an_interrupted_evaluation_goes_on_where_it_was(study: StoredStudy) -> None:
    with pytest.raises(SearchFailedError, match="held-out noise: RuntimeError: out of memory"):
        score_held_out(study, Recording(broken=2), HeldOutPlan(images=20, top=2, groups=3))
    objective = Recording()
    score_held_out(study, objective, HeldOutPlan(images=20, top=2, groups=3))
    assert objective.groups() == [("held-out", 2)]


def test_ema_star_is_measured_on_the_same_noise(study: StoredStudy) -> None:
    ema = grid(study)
    before = ema.attributes, [trial.user_attrs for trial in ema.trials()]
    objective = Recording()
    plan = HeldOutPlan(images=20, top=1, groups=2)
    report = score_held_out(study, objective, plan)
    reported = [group for group in objective.groups() if group[0] == "held-out"]
    assert reported == [("held-out", 0), ("held-out", 1)] * 2
    last, star = report.baselines
    assert (last.model.name, last.seeds) == ("last checkpoint", (0, 1))
    assert (star.model.label, star.model.study, star.model.trial) == ("EMA*", EMA_STUDY, 2)
    assert tuple(coefficients(2)) in {known for known, *_ in objective.asked}
    assert star.seeds == (0, 1)
    assert stored(study) == report
    assert (ema.attributes, [trial.user_attrs for trial in ema.trials()]) == before  # another study's lease


def test_the_last_checkpoint_is_scored_first_once_an_experiment_and_printed(
    study: StoredStudy, capsys: pytest.CaptureFixture[str]
) -> None:
    ema, objective = grid(study), Measured()
    for searched in (ema, study):
        score_trained_models(searched, objective, 20)
        line = capsys.readouterr().err.splitlines()[-1]
        assert line == (
            "lcsc: small: last checkpoint, step 300, held-out noise on 20 items: fid 0.625, fid@cross_check 1.25; "
            "compare this with your trainer's log: if they differ, this score does not measure what your trainer does"
        )
    assert objective.asked == [(LAST, "held-out", 0, 20)]
    for searched in (ema, study):
        last = score_held_out(searched, objective, PLAN).baselines[0]
        assert (last.model.name, last.loss) == ("last checkpoint", 0.625)
    assert [noise for known, noise, *_ in objective.asked if known == LAST] == ["held-out", "selection"]


def test_without_a_report_the_last_checkpoint_is_scored_as_the_search_scores(
    study: StoredStudy, capsys: pytest.CaptureFixture[str]
) -> None:
    objective = Measured(lambda _: {})
    score_trained_models(study, objective, None)
    assert objective.asked == [(LAST, "search", 0, None)]
    assert "last checkpoint, step 300, search noise: fid 0.625;" in capsys.readouterr().err
    score_trained_models(study, Measured(broken=0), 20)
    assert "last checkpoint on held-out noise: RuntimeError: out of memory" in capsys.readouterr().err


class InTwoSamplers(Measured):
    """Found in 3 steps, where the answer is far better than EMA*; in 12 steps it is worse."""

    samples = Samples(
        per_evaluation=10,
        samplers=(
            SamplerTitle("DDIM, 3 model calls an image", "a"),
            SamplerTitle("DDIM, 12 model calls an image", "b"),
        ),
    )

    def evaluate(self, candidate: Candidate) -> Evaluation:
        evaluation = super().evaluate(candidate)
        if self._broken == "elsewhere" and candidate.sampler == 1:
            raise RuntimeError("out of memory")
        if candidate.sampler == 1:
            assert (candidate.images, candidate.yardstick) == (10, None)
            loss = 3 - evaluation.loss
            evaluation = Evaluation(loss, {"fid": loss, **self._metrics(loss)})
        return evaluation


def test_an_answer_that_is_worse_in_another_sampler_is_warned_of_and_everything_shows_both(
    study: StoredStudy, typed: Typed
) -> None:
    of_grid = score_held_out(grid(study), InTwoSamplers(), dataclasses.replace(PLAN, top=3, keep=False))
    assert "compared with last checkpoint, the answer is worse in another sampler" in (of_grid.warning or "")
    objective = InTwoSamplers()
    report = score_held_out(study, objective, PLAN)
    assert report.also is not None
    assert (report.also.found.images, report.also.sampler) == (10, "DDIM, 12 model calls an image")
    assert names(report.also) == ["last checkpoint", "EMA*"]
    assert row(report, CROSS_CHECK).gain > 0 > row(report.also, CROSS_CHECK).gain
    assert (report.warning or "").startswith("compared with EMA*, the answer is worse in another sampler: loss")
    assert stored(study) == report
    asked = len(objective.asked)
    assert score_held_out(study, objective, PLAN) == report
    assert len(objective.asked) == asked, "each is measured once"
    database = ("--storage", study.storage.url)
    shown = " ".join(typed("show", STUDY, *database).out.split())
    compared = " ".join(typed("compare", "small", *database).out.split())
    for text in (shown, compared):
        assert "held out, DDIM, 3 model calls an image" in text
    assert "held out, 10 images, DDIM, 12 model calls an image" in shown
    assert "held out, DDIM, 12 model calls an image" in compared
    assert study.chosen_trial()[2]["held_out"]["sampler"] == "DDIM, 3 model calls an image"
    broken = score_held_out(study, InTwoSamplers(broken="elsewhere"), dataclasses.replace(PLAN, images=9))
    assert broken.also is None


def test_without_a_grid_others_stand_in_and_one_that_fails_does_not_lose_the_report(
    study: StoredStudy, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = PLAN
    report = score_held_out(study, Recording(), plan)
    last, default = report.baselines
    assert (last.model.name, default.model.name) == ("last checkpoint", "default EMA")
    assert last.loss == 0.625  # coefficients 0, 0, 1
    assert "--optimizer EMAGrid" in capsys.readouterr().err
    grid(study)
    report = score_held_out(study, Recording(broken=-0.5), plan)
    assert names(report) == ["last checkpoint"]
    assert stored(study) == report
    assert "out of memory; it is left out" in capsys.readouterr().err


def test_options_come_before_the_study_file_and_that_before_the_defaults(study: StoredStudy) -> None:
    assert HeldOutPlan.of(study) == HeldOutPlan(10_000, 5)
    study.set_attribute("specification", {"held_out": {"images": 300, "top": 2}})
    assert HeldOutPlan.of(study) == HeldOutPlan(300, 2)
    study.set_attribute("specification", {"held_out": {"images": None, "top": 2}})
    assert HeldOutPlan.of(study).images == 10_000
    study.set_attribute("report_images", 16)  # of a score with a size
    assert HeldOutPlan.of(study).images == 16
    study.set_attribute("specification", {"held_out": None})
    assert HeldOutPlan.of(study).images == 16
    look = HeldOutPlan(10, 1, 3, 4, keep=False)
    assert HeldOutPlan.of(study, images=10, top=1, groups=3, first_group=4) == look


def test_only_the_first_report_and_what_is_asked_for_is_kept(study: StoredStudy) -> None:
    study.set_attribute("specification", {"held_out": {"images": 300, "top": 2}})
    assert HeldOutPlan.of(study, images=400).keep
    study.set_attribute("held_out", {"loss": 1.0})
    assert not HeldOutPlan.of(study, images=400).keep
    assert HeldOutPlan.of(study, images=300, keep=True).keep
    with pytest.raises(StudySpecError, match="299 images are fewer than the 300 that the study file asks for"):
        HeldOutPlan.of(study, images=299, keep=True)
    study.set_attribute("specification", {"held_out": None})
    assert HeldOutPlan.of(study, images=20, keep=True).keep, "nobody planned more"


def test_a_look_changes_nothing_and_is_not_measured_twice(study: StoredStudy) -> None:
    kept = score_held_out(study, Recording(), HeldOutPlan(images=20, top=2))
    before, rows = study.attributes, [dict(trial.user_attrs) for trial in study.trials()]
    look = HeldOutPlan(images=30, top=4, groups=2, keep=False)
    report = score_held_out(study, Recording(), look)
    assert (report.found.images, len(report.selection)) == (30, 9)
    assert stored(study) == kept
    del before["measured"]
    assert {name: study.attributes.get(name) for name in before} == before
    for trial, known in zip(study.trials(), rows, strict=True):
        assert {name: trial.user_attrs.get(name) for name in known} == known
    again = Recording()
    assert score_held_out(study, again, look) == report
    assert again.asked == []
    assert score_held_out(study, again, dataclasses.replace(look, keep=True)) == report == stored(study)
    assert again.asked == []


def test_where_no_ema_is_known_the_one_that_searches_start_from_is_measured_once(study: StoredStudy) -> None:
    objective = Measured()
    report = score_held_out(study, objective, PLAN)
    assert objective.groups(EMA) == [("held-out", 0), ("selection", 0)]
    assert set(objective.groups()) == {(SELECTION.group, SELECTION.seed), (HELD_OUT.group, HELD_OUT.seed)}
    _, ema = report.baselines
    found, before = row(report, CROSS_CHECK), ema.metrics[CROSS_CHECK]
    assert ema.model.name == "default EMA"
    assert (found.value, found.against) == (report.found.metrics[CROSS_CHECK], "default EMA")
    assert found.cross_check
    assert (found.baseline, found.gain) == (before, pytest.approx(before - found.value))
    assert stored(study) == report
    study.set_attribute("held_out", None)  # as a higher budget does
    again = Measured()
    assert score_held_out(study, again, PLAN) == report
    assert again.asked == []


def test_ema_star_comes_before_it_and_costs_nothing_where_it_was_reported(study: StoredStudy) -> None:
    measured = score_held_out(grid(study), Measured(), PLAN)
    assert [baseline.model.name for baseline in measured.baselines] == ["last checkpoint"], (
        "a grid has no EMA but itself"
    )
    assert row(measured, CROSS_CHECK).against is None
    objective = Measured()
    report = score_held_out(study, objective, PLAN)
    assert {found.against for found in report.rows} == {"EMA*"}
    assert report.baselines[1].loss == measured.loss
    reported = {known for known, noise, *_ in objective.asked if noise == "held-out"}
    assert reported == {tuple(coefficients(1))}, "no model but the answer was sampled"
    objective = Measured()
    score_held_out(study, objective, HeldOutPlan(images=20, top=1, groups=2))
    assert objective.groups() == [("held-out", 1), ("held-out", 1)]


def test_what_was_measured_without_a_metric_is_measured_again(study: StoredStudy) -> None:
    before = score_held_out(study, Measured(lambda _: {}), PLAN)
    assert (names(before), before.warning) == (["last checkpoint", "default EMA"], None)
    assert [found.metric for found in before.rows] == ["loss"]
    objective = Measured()
    report = score_held_out(study, objective, PLAN)
    assert objective.groups(coefficients(1)) == [("held-out", 0)], "and not chosen again"
    kept = score_held_out(study, Measured(lambda _: {}), PLAN)
    assert kept.found.metrics == report.found.metrics, "what cannot be measured now is not lost"


class LastIsWorst(Measured):
    """All models are better than the last checkpoint."""

    def evaluate(self, candidate: Candidate) -> Evaluation:
        evaluation = super().evaluate(candidate)
        return dataclasses.replace(evaluation, loss=9.0) if tuple(candidate.coefficients) == LAST else evaluation


def test_a_judge_that_some_models_were_measured_without_does_not_choose(study: StoredStudy) -> None:
    score_held_out(study, LastIsWorst(lambda _: {}), PLAN)
    grid(study)
    report = score_held_out(study, LastIsWorst(), PLAN)
    assert report.had is not None
    assert report.answer is not None
    assert (report.had.model.name, report.answer.model.name) == ("EMA*", "trial 1")


def test_only_trials_that_compare_are_chosen_from(url: str) -> None:
    study = StoredStudy.open_or_create(
        open_storage(url, write=True), STUDY, {"steps": STEPS, "fingerprint": {"objective": {}}}
    )
    asked = [(5.0, 10, SEARCH), (0.1, 10, Noise("search", 3)), (0.2, 2, SEARCH), (4.0, 10, SEARCH)]
    for number, (loss, images, noise) in enumerate(asked[1:2]):
        key = study.add_candidate(Candidate(coefficients(number), noise=noise))
        study.finish(key, Evaluation(loss, {}, Cost(images=images)), compares=False)
    with pytest.raises(StudyStoreError, match="no comparable trial has finished yet"):
        score_held_out(study, Measured(), PLAN)
    for number, (loss, images, noise) in enumerate(asked, start=1):
        key = study.add_candidate(Candidate(coefficients(number), images=images, noise=noise))
        compares = images == 10 and noise == SEARCH
        study.finish(key, Evaluation(loss, {}, Cost(images=images)), compares=compares)
    selection = score_held_out(study, Measured(), HeldOutPlan(images=20, top=5)).selection
    assert list(selection)[:2] == ["trial 4", "trial 1"]
    assert not {"trial 0", "trial 2", "trial 3"}.intersection(selection)


def test_trials_are_ranked_by_the_real_images_that_a_search_stops_by(study: StoredStudy) -> None:
    for number, (loss, unseen) in enumerate([(0.01, 9.0), (0.02, 0.001), (0.03, 8.0)], start=5):
        key = study.add_candidate(Candidate(coefficients(number)))
        study.finish(key, Evaluation(loss, unseen=unseen))
    chosen = score_held_out(study, Measured(), HeldOutPlan(images=20, top=1)).trial
    [trial] = [trial for trial in study.trials() if trial.number == chosen]
    assert trial.value == 0.02


def test_a_loss_in_one_metric_is_a_row_and_a_warning(study: StoredStudy, capsys: pytest.CaptureFixture[str]) -> None:
    report = score_held_out(study, Measured(trades), PLAN)
    precision, near = row(report, "precision"), row(report, "near")
    assert (precision.against, precision.lost, precision.real_halves) == ("default EMA", True, 0.9)
    assert precision.gain == pytest.approx(precision.value - precision.baseline)
    assert (near.lost, near.real_halves) == (False, None)
    assert near.gain == pytest.approx(near.baseline - near.value)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "compare images of the two" in line]
    assert line == f"lcsc: {STUDY}: {report.warning}"
    assert line.endswith("search with keep: precision")
    spread = row(score_held_out(study, Measured(trades), dataclasses.replace(PLAN, groups=3)), "precision")
    assert spread.spread == spread.baseline_spread == pytest.approx(0.01)
    assert spread.gain_spread == pytest.approx(0, abs=1e-12), "both move alike"


class LastIsBest(Measured):
    """The nearer to the last checkpoint, the better."""

    def evaluate(self, candidate: Candidate) -> Evaluation:
        return Evaluation(0.5 + float((candidate.coefficients[:-1] ** 2).sum()))


@pytest.mark.parametrize(("of_grid", "advice"), [(4.0, "fewer evaluations"), (0.5, "more evaluations")])
def test_what_a_search_that_lost_needs_depends_on_its_own_loss(study: StoredStudy, of_grid: float, advice: str) -> None:
    write_study(study.storage, EMA_STUDY, [5.0, of_grid])
    warning = score_held_out(study, LastIsBest(), PLAN).warning or ""  # whose lowest searched loss is 1
    assert "worse than the last checkpoint" in warning
    assert advice in warning


@pytest.mark.parametrize("rises", [True, False])
def test_a_search_that_fits_the_images_of_the_reference_is_warned_of(study: StoredStudy, rises: bool) -> None:
    for number in range(5, 25):
        key = study.add_candidate(Candidate(coefficients(1 if number == 24 else number)))  # 1 is the best
        unseen = 3 + (number - 10) ** 2 / 100 if rises else 2.0
        study.finish(key, Evaluation(1 / number, unseen=unseen))
    for metrics in (follows, trades):  # of which the second has a warning of its own
        warning = score_held_out(study, Measured(metrics), PLAN).warning or ""
        assert ("overfitting the reference images" in warning) == rises
        assert ("keep: precision" in warning) == (metrics is trades)


def test_a_grid_is_not_warned_of_overfitting(study: StoredStudy) -> None:
    grid = write_study(study.storage, "small/Grid/0", [4.0])
    for number in range(1, 25):
        grid.finish(grid.add_candidate(Candidate(coefficients(number))), Evaluation(1 / number, unseen=3 + number))
    warning = score_held_out(grid, Measured(follows), PLAN).warning or ""
    assert "overfitting" not in warning


REPORTED = """
    def reported_metrics(self):
        from lcsc_opt.objective.contract import ReportedMetrics

        return ReportedMetrics(signs={"fid@cross_check": 1}, cross_check="fid@cross_check")
"""
MEASURED = OBJECTIVE.replace('metrics["kid"] = loss / 7', 'metrics["fid@cross_check"] = 9 - loss')
CHECKED_OBJECTIVE = MEASURED.replace("\n    def describe(self):", f"{REPORTED}\n    def describe(self):")


def test_run_compare_and_evaluate_say_it(workplace: Path, typed: Typed) -> None:
    path = write_model_study(workplace, held_out={"images": 20, "top": 1}, budget={"evaluations": 30})
    (workplace / "small_model.py").write_text(CHECKED_OBJECTIVE)
    ran, compared = typed("run", str(path)).err, typed("compare", "small")
    assert CROSS_CHECK in compared.out
    for text in (ran, compared.err):
        (line,) = [line for line in text.splitlines() if "compare images of the two" in line]
        assert f"{STUDY}: compared with EMA*: loss" in line
        assert "but fid@cross_check" in line
    stored = StoredStudy.open(open_storage("sqlite:///studies.db", write=True), STUDY)
    first = stored.attributes["held_out"]
    assert first["rows"][1]["value"] == pytest.approx(9 - first["rows"][0]["value"])
    assert "metric found EMA* gain last checkpoint loss" in " ".join(typed("show", STUDY).out.split())
    for command in (["show", STUDY], ["compare", "small"]):
        found = typed.json(*command)
        assert (found if isinstance(found, dict) else found[1])["held_out_rows"] == first["rows"]
    look = ["evaluate", STUDY, "--images", "30", "--groups", "3"]
    printed = typed(*look).out
    assert "30 images, noise groups 0, 1, 2" in printed
    assert re.search(r"EMA\* \(.+\): small/EMAGrid/0", printed), "which average it is"
    assert all(text in printed for text in ("loss", CROSS_CHECK, "95 %", "["))
    assert stored.attributes["held_out"] == first
    report = typed.json(*look, "--keep")
    assert report["found"]["values"]["loss"] < report["baselines"][1]["values"]["loss"]
    assert [row["against"] for row in report["rows"]] == ["EMA*", "EMA*"]
    assert stored.attributes["held_out"] == report
    fingerprint = stored.attributes["fingerprint"]
    stored.set_attribute("fingerprint", {**fingerprint, "objective": {**fingerprint["objective"], "kind": "FID"}})
    assert "changed since it began: objective.kind" in typed.refused(*look)


@pytest.mark.parametrize(("retries", "status"), [(0, 2), (1, 0)])
def test_the_studys_own_policy_says_how_often_it_is_tried_again(workplace: Path, retries: int, status: int) -> None:
    failing = """if candidate.noise.group == "selection" and not Path("seen").exists():
            raise OSError(Path("seen").touch())"""
    path = write_model_study(
        workplace,
        optimizers=["CMA"],
        budget={"evaluations": 3},
        failures={"retries": retries},
        held_out={"images": 2, "top": 1},
    )
    flaky = OBJECTIVE.replace("time.sleep(self.delay)", failing).replace("import time", "from pathlib import Path")
    (workplace / "small_model.py").write_text(flaky)
    assert lcsc(["run", str(path)]) == status


# the trainer's own EMA


def trained_folder(folder: Path, ema_of: Callable[[int], int]) -> None:
    """A trainer's checkpoints, packed without the EMA that each file has; its weights are those of another step."""
    write_model_study(folder)
    (folder / "runs").mkdir()
    for step in MODEL_STEPS:
        saved = {"model": state_dict(step), "ema": state_dict(ema_of(step)), "step": step}
        torch.save(saved, folder / "runs" / f"model{step}.pt")
    pack(folder / "runs", folder / "run.trajectory", key="model", overwrite=True)


def test_the_trainers_ema_is_scored_before_the_search_and_stands_in_every_table(workplace: Path, typed: Typed) -> None:
    trained_folder(workplace, lambda step: step - 7)
    reports = ("held_out.images=20", "held_out.top=1", "budget.evaluations=12")
    ran = typed("run", "small.yaml", *reports).err
    average = state_dict(43)
    shift = 0.32  # of the held-out noise
    loss = sum((w.double() - shift).square().sum() for w in average.values() if w.is_floating_point())
    assert f"small: trainer's EMA, step 50, held-out noise on 20 items: fid {loss:.4g}" in ran
    assert ran.count("small: trainer's EMA") == 1, "an experiment measures it once"
    report = chosen_report(STUDY)
    assert names(report)[:2] == ["last checkpoint", "trainer's EMA"]
    assert report.baselines[1].loss == pytest.approx(float(loss))
    bars = [line for line in ran.splitlines() if line.startswith(f"{STUDY} held out: ")]
    assert bars[-1].endswith(f" {report.loss:.4g}"), "the bar ends on the answer's number"
    for command in (("show", STUDY), ("compare", "small")):
        assert "trainer's EMA" in " ".join(typed(*command).out.split())


def test_an_answer_that_is_worse_than_the_trainers_ema_is_warned_of(workplace: Path, typed: Typed) -> None:
    target = {name: torch.full_like(w, 0.32) for name, w in state_dict(50).items() if name != "steps"}
    trained_folder(workplace, lambda step: step)
    last = torch.load(workplace / "runs" / "model50.pt")
    torch.save({**last, "ema": target}, workplace / "runs" / "model50.pt")
    pack(workplace / "runs", workplace / "run.trajectory", key="model", overwrite=True)
    short = ("held_out.images=20", "budget.evaluations=12")
    ran = typed("run", "small.yaml", "--optimizer", "LCSC", *short).err
    assert "worse than the trainer's EMA: loss" in ran
    ran = typed("run", "small.yaml", "--optimizer", "EMAGrid", *short).err
    assert "worse than" not in ran, "a grid is a baseline itself"


def test_where_averages_are_combined_the_last_one_is_the_trainers_ema(workplace: Path, typed: Typed) -> None:
    trained_folder(workplace, lambda step: step)
    pack(workplace / "runs", workplace / "run.trajectory", key="ema", overwrite=True)
    ran = typed("run", "small.yaml", "--optimizer", "LCSC", "held_out.images=20", "budget.evaluations=3").err
    assert "small: last checkpoint (trainer's EMA), step 50, held-out noise" in ran
    assert "trainer's EMA" not in names(chosen_report(STUDY))


def chosen_report(study: str) -> HeldOutReport:
    storage = open_storage("sqlite:///studies.db", write=False)
    report = stored(StoredStudy.open(storage, study))
    assert report is not None
    return report
