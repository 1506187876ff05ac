"""The report: all models once, on noise that no search saw; what is stored, measured again, and left out."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from optuna.storages import RDBStorage

import lcsc_opt
from lcsc_opt.base.errors import SearchFailedError, StudySpecError, StudyStoreError
from lcsc_opt.base.jackknife import GROUPS
from lcsc_opt.base.records import (
    SEARCH,
    Candidate,
    Coefficients,
    Cost,
    Evaluation,
    Noise,
    ReportedMetrics,
    SamplerTitle,
)
from lcsc_opt.base.study_spec import ObjectiveSpec, OptimizerSpec, StudySpec
from lcsc_opt.cli import run as lcsc
from lcsc_opt.coefficients.profiles import last_alone
from lcsc_opt.database.experiment import HAD, StoredExperiment
from lcsc_opt.database.measurement import Measurement, Model
from lcsc_opt.database.names import EMA, LAST_CHECKPOINT
from lcsc_opt.database.opened import Database
from lcsc_opt.database.report import Part, Report, ReportPlan
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.evaluation.base import evaluate_safely
from lcsc_opt.experiment.finalists import Searched
from lcsc_opt.experiment.measuring import Evaluate, Measurer, score_as_trained
from lcsc_opt.experiment.origin import origin_of
from lcsc_opt.experiment.report import make_report
from lcsc_opt.experiment.running import evaluate_again
from lcsc_opt.objective.contract import Objective, Samples
from lcsc_opt.trajectory import pack
from tests.commands import Typed
from tests.model_studies import EMA_STUDY, OBJECTIVE, STUDY, state_dict, write_model_study
from tests.model_studies import STEPS as MODEL_STEPS
from tests.study_examples import STEPS, coefficients, stored_report, write_experiment, write_report, write_study

PLAN = ReportPlan(images=20, top=1)
BEST = "LCSC, trial 1"
CROSS_CHECK = "fid@cross_check"
Asked = list[tuple[str, int]]


class Measured(Objective):
    """Remembers what it was asked for. Its loss is lowest at trial 1, certain, and shifted by the group of noise."""

    steps = STEPS

    def __init__(self, metric: str = "kid", *, broken: object = None) -> None:
        self.asked: list[tuple[tuple[float, ...], str, int, int | None]] = []
        self._metric = metric
        self._broken = broken

    def reported_metrics(self) -> ReportedMetrics:
        is_check = self._metric == CROSS_CHECK
        checks = (CROSS_CHECK,) if is_check else ()
        return ReportedMetrics(signs={self._metric: 1}, cross_check=next(iter(checks), None), judges=checks)

    def evaluate(self, candidate: Candidate) -> Evaluation:
        noise = candidate.noise
        self.asked.append((tuple(candidate.coefficients), noise.group, noise.seed, candidate.images))
        if self._broken in ((noise.group, noise.seed), tuple(candidate.coefficients)):
            raise RuntimeError("out of memory")
        loss = 0.5 + float(((candidate.coefficients - coefficients(1)) ** 2).sum()) + noise.seed / 100
        return Evaluation(loss, {"fid": loss, self._metric: loss / 2}, Cost(), without_groups={"loss": [loss] * GROUPS})

    def describe(self) -> dict[str, Any]:
        return {}

    def of(self, model: Coefficients) -> Asked:
        """The noise on which a model was evaluated."""
        return [(group, seed) for known, group, seed, _ in self.asked if known == tuple(model)]

    def groups(self) -> set[tuple[str, int]]:
        return {(group, seed) for _, group, seed, _ in self.asked}


@pytest.fixture
def searches(storage: RDBStorage) -> Callable[[], list[Searched]]:
    """A search whose trial 1 is the best, of five; whatever was written since is another one."""
    write_study(storage, STUDY, [3.0, 1.0, 2.0, None, 1.5])

    def read() -> list[Searched]:
        names = ("small/EMAGrid/0", "small/Grid/0", STUDY, "small/CMA/0")
        known = [name for name in names if name in [study.study_name for study in storage.get_all_studies()]]
        return [Searched(name, StoredStudy.open(storage, name).trials()) for name in known]

    return read


def measurer_of(objective: Objective, storage: RDBStorage) -> Measurer:
    return Measurer(stored(storage), objective, evaluating(objective), images=0, role=HAD)


@pytest.fixture
def report(storage: RDBStorage, searches: Callable[[], list[Searched]]) -> Callable[..., Report]:
    def made(objective: Objective, plan: ReportPlan = PLAN) -> Report:
        return make_report(measurer_of(objective, storage), searches(), plan)

    return made


def stored(storage: RDBStorage) -> StoredExperiment:
    return write_experiment(storage, "small")


def evaluating(objective: Objective) -> Evaluate:
    return lambda candidate, _: evaluate_safely(objective, candidate)


def grid(storage: RDBStorage) -> StoredStudy:
    """A grid of averages whose trial 2 is the best."""
    return write_study(storage, EMA_STUDY, [5.0, 6.0, 4.0])


Making = Callable[..., Report]


def test_all_models_have_the_same_noise_that_chose_nothing_and_several_groups_a_mean(
    report: Making, storage: RDBStorage
) -> None:
    grid(storage)
    objective = Measured()
    made = report(objective, ReportPlan(20, 4, (0, 1, 2)))
    assert (made.had, made.found, made.answer) == (
        (LAST_CHECKPOINT, EMA),
        {EMA_STUDY: EMA, STUDY: BEST},
        BEST,
    )
    assert [measured.model.name for measured in made.models] == [LAST_CHECKPOINT, EMA, BEST]
    assert {measured.seeds for measured in made.models} == {(0, 1, 2)}
    held_out = [("held-out", seed) for seed in range(3)]
    assert objective.of(coefficients(1)) == [("selection", 0), *held_out]
    assert objective.of(coefficients(4)) == [("selection", 0)], "a finalist that is not the best"
    assert {images for *_, images in objective.asked} == {20}
    losses = made.of_answer.values["loss"]
    assert made.of_answer.loss == pytest.approx(statistics.fmean(losses))
    loss, kid, *_ = made.rows(BEST, EMA)
    assert kid.value == pytest.approx(loss.value / 2)
    assert made.selection.keys() >= {LAST_CHECKPOINT, EMA, BEST, "LCSC, trial 4"}


def test_each_search_sends_the_same_number_of_trials_and_at_least_one(
    searches: Callable[[], list[Searched]], report: Making, storage: RDBStorage
) -> None:
    write_study(storage, "small/CMA/0", [1.0, 1.5, 1.2])
    for top, names in ((1, {"LCSC, trial 1", "CMA, trial 0"}), (3, {"LCSC, trial 1", "LCSC, trial 4", "CMA, trial 0"})):
        selection = report(Measured(), ReportPlan(20, top)).selection
        assert selection.keys() >= names
        assert sum("trial" in name for name in selection) == len(searches()) * -(-top // 2)


def test_points_on_the_way_from_ema_star_are_among_what_is_chosen(report: Making, storage: RDBStorage) -> None:
    class Between(Measured):
        """The best is half of the way from EMA* to the best trial."""

        def evaluate(self, candidate: Candidate) -> Evaluation:
            half = (coefficients(1) + coefficients(2)) / 2
            loss = 0.5 + float(((candidate.coefficients - half) ** 2).sum())
            return Evaluation(loss, without_groups={"loss": [loss] * GROUPS})

    grid(storage)
    made = report(Between())
    assert made.answer == f"½ of the way from EMA* to {BEST}"
    np.testing.assert_allclose(made.of_answer.model.coefficients, (coefficients(1) + coefficients(2)) / 2)
    assert made.is_found
    assert (made.of_answer.model.study, made.of_answer.model.trial) == (STUDY, None)


def test_what_is_measured_is_measured_once(report: Making, storage: RDBStorage) -> None:
    first = report(Measured())
    again = Measured()
    assert report(again) == first
    assert again.asked == []
    more = Measured()
    assert report(more, ReportPlan(20, 1, (0, 1))).of_answer.values["loss"][0] == first.of_answer.loss
    assert more.groups() == {("held-out", 1)}
    others = Measured()
    report(others, ReportPlan(30, 1))
    assert others.groups() == {("selection", 0), ("held-out", 0)}, "other images are another measurement"
    grid(storage)
    added = Measured()
    report(added)
    assert not added.of(coefficients(1)), "a search that is added measures its own models, and what is between"


def test_an_interrupted_report_goes_on_where_it_was(report: Making) -> None:
    plan = ReportPlan(20, 1, (0, 1, 2))
    with pytest.raises(SearchFailedError, match="held-out noise: RuntimeError: out of memory"):
        report(Measured(broken=("held-out", 2)), plan)
    objective = Measured()
    report(objective, plan)
    assert objective.of(coefficients(1)) == [("held-out", 2)]


def test_a_new_metric_is_measured_for_all_models_and_chooses_nothing_anew(report: Making, storage: RDBStorage) -> None:
    grid(storage)
    before = report(Measured())
    objective = Measured("recall")
    made = report(objective)
    assert objective.groups() == {("held-out", 0)}
    assert len(objective.asked) == len(made.models) == 3
    assert all("recall" in measured.metrics for measured in made.models)
    assert (made.answer, made.selection) == (before.answer, before.selection)


def test_a_model_that_cannot_be_measured_is_left_out_with_a_notice(
    report: Making, storage: RDBStorage, capsys: pytest.CaptureFixture[str]
) -> None:
    grid(storage)
    made = report(Measured(broken=tuple(last_alone(3))))
    assert made.had == (EMA,)
    assert "last checkpoint on selection noise: RuntimeError: out of memory; it is left out" in capsys.readouterr().err
    assert made.measured(LAST_CHECKPOINT) is None


class InTwoSamplers(Measured):
    """In the second sampler the order is the other way round."""

    samples = Samples(
        per_evaluation=10,
        samplers=(SamplerTitle("3 model calls an image", "a"), SamplerTitle("12 model calls an image", "b")),
    )

    def evaluate(self, candidate: Candidate) -> Evaluation:
        evaluation = super().evaluate(candidate)
        if candidate.sampler == 0:
            return evaluation
        if self._broken == "elsewhere":
            raise RuntimeError("out of memory")
        assert (candidate.images, candidate.yardstick) == (10, None)
        loss = 3 - evaluation.loss
        return Evaluation(loss, {"fid": loss, "kid": loss})


def test_a_second_sampler_has_a_part_of_its_own_and_a_warning(
    report: Making, storage: RDBStorage, typed: Typed
) -> None:
    grid(storage)
    objective = InTwoSamplers()
    made = report(objective)
    assert [part.sampler for part in made.parts] == [title.text for title in InTwoSamplers.samples.samplers]
    assert [measured.images for measured in made.parts[1].models] == [10] * 3
    assert made.rows(BEST, EMA)[0].gain > 0 > made.rows(BEST, EMA, part=1)[0].gain  # type: ignore[operator]
    assert any("in another sampler the answer is worse than" in warning for warning in made.warnings)
    count = len(objective.asked)
    assert report(objective) == made
    assert len(objective.asked) == count
    experiment = stored(storage)
    experiment.choose(made, of="")
    assert experiment.report == made
    for command in ("compare", "small"), ("show", STUDY):
        assert "12 model calls an image" in " ".join(typed(*command, "--storage", storage.url).out.split())
    assert len(report(InTwoSamplers(broken="elsewhere"), ReportPlan(9, 1)).parts) == 1


def test_a_search_begins_at_the_answer_of_its_start_also_where_that_is_a_mean(storage: RDBStorage) -> None:
    study = write_study(storage, STUDY, [3.0, 1.0])
    with study.hold():
        study.set_attribute("specification", {"space": {"rows": None}})
    objective = ObjectiveSpec(file="function.py")
    spec = StudySpec(experiment="new", optimizer=OptimizerSpec(name="CMA"), objective=objective, start=STUDY)

    def origin() -> Any:
        return origin_of(spec, STUDY, Database(str(storage.url)), Measured())

    np.testing.assert_array_equal(origin(), coefficients(1))
    mean = Measurement(Model("LCSC, mean of the last half", np.full(3, 1 / 3), study=STUDY), 20, (0,), {"loss": (0.5,)})
    report = Report((Part(None, (mean,)),), mean.model.name, (), {STUDY: mean.model.name}, {STUDY: 2}, top=1)
    write_report(storage, report, "small")
    np.testing.assert_array_equal(origin(), mean.model.coefficients)


def test_only_trials_that_compare_are_finalists(report: Making, storage: RDBStorage) -> None:
    study = StoredStudy.open(storage, STUDY)
    for number, noise in enumerate((Noise("search", 3), SEARCH), start=5):
        key = study.add_candidate(Candidate(coefficients(number), images=2, noise=noise))
        study.finish(key, Evaluation(0.1), compares=False)
    assert not {"LCSC, trial 5", "LCSC, trial 6"} & report(Measured(), ReportPlan(20, 9)).selection.keys()
    with pytest.raises(StudyStoreError, match="no comparable trial has finished yet"):
        make_report(measurer_of(Measured(), storage), [], PLAN)


@pytest.mark.parametrize("images", [20, None])
def test_the_last_checkpoint_is_scored_first_and_printed(
    storage: RDBStorage, images: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the report will score it, or as the search does where there will be none."""
    objective = Measured()
    for _ in range(2):
        score_as_trained(measurer_of(objective, storage), images)
        on_what = "search noise" if images is None else "held-out noise on 20 items"
        expected = f"lcsc: small: last checkpoint, step 300, {on_what}: fid 0.625 (lower is better), kid 0.3125; "
        assert expected in capsys.readouterr().err
    assert len(objective.asked) == 1


# from the command line

HELD_OUT = {"images": 20, "top": 1}


def test_a_report_is_kept_if_it_is_the_first_or_if_that_is_asked_for(workplace: Path) -> None:
    path = write_model_study(workplace, optimizers=["LCSC"], budget={"evaluations": 3})
    lcsc_opt.run(path)
    database = Database(f"sqlite:///{workplace}/studies.db")
    preview, is_kept = evaluate_again(database, "small", images=30)
    assert (preview.images, is_kept) == (30, False), "fewer than the default"
    first, is_kept = evaluate_again(database, "small")
    assert (first.images, is_kept, stored_report("small")) == (10_000, True, first)

    lcsc_opt.run({**yaml.safe_load(path.read_text()), "name": "planned", "held_out": HELD_OUT})
    database = Database(database.url)
    with pytest.raises(StudySpecError, match="19 images are fewer than the 20 that the study file asks for"):
        evaluate_again(database, "planned", images=19, keep=True)
    looked, is_kept = evaluate_again(database, "planned", images=40, seeds=(0, 1))
    assert (looked.images, looked.seeds, is_kept, stored_report("planned").images) == (40, (0, 1), False, 20)
    made, is_kept = evaluate_again(database, "planned", images=40, top=3, seeds=(0, 1), keep=True)
    assert (is_kept, stored_report("planned")) == (True, made)
    lcsc_opt.run({**yaml.safe_load(path.read_text()), "name": "planned", "held_out": HELD_OUT}, budget=4)
    remade = stored_report("planned")
    assert remade.evaluations != made.evaluations
    assert (remade.images, remade.top, remade.seeds) == (40, 3, (0, 1)), "a report that is larger than planned stays so"


def test_commands_print_the_report(workplace: Path, typed: Typed) -> None:
    path = write_model_study(workplace, optimizers=["LCSC"], budget={"evaluations": 15}, held_out=HELD_OUT)
    said = typed("run", str(path)).err
    made = stored_report("small")
    assert f"small: The answer is {made.answer}, with fid {made.of_answer.loss:.4g}: " in said
    look = ["evaluate", "small", "--images", "30", "--groups", "3"]
    printed = typed(*look).out
    assert "30 items, noise groups 0, 1, 2" in printed
    assert all(text in printed for text in ("loss", "kid", "95 %", "["))
    [header, *_] = [line for line in printed.splitlines() if line.startswith("model ")]
    assert header.split() == ["model", "selection"], "a race has other numbers of images than the report"
    assert stored_report("small") == made
    assert typed.json(*look, "--keep") == stored_report("small").to_json()
    assert "no such experiment" in typed.refused("evaluate", "other")


@pytest.mark.parametrize(("retries", "status"), [(0, 2), (1, 0)])
def test_a_failed_measurement_is_tried_again_as_often_as_a_trial(workplace: Path, retries: int, status: int) -> None:
    failing = """if candidate.noise.group == "selection" and not Path("seen").exists():
            raise OSError(Path("seen").touch())"""
    path = write_model_study(
        workplace, optimizers=["CMA"], budget={"evaluations": 3}, failures={"retries": retries}, held_out=HELD_OUT
    )
    flaky = OBJECTIVE.replace("time.sleep(self.delay)", failing).replace("import time", "from pathlib import Path")
    (workplace / "small_model.py").write_text(flaky)
    assert lcsc(["run", str(path)]) == status


# the trainer's own EMA


def trained_folder(folder: Path, ema_of: Callable[[int], int], **changes: Any) -> None:
    """A trainer's checkpoints, packed without the EMA that each file has; its weights are those of another step."""
    write_model_study(folder, held_out=HELD_OUT, **changes)
    (folder / "runs").mkdir()
    for step in MODEL_STEPS:
        saved = {"model": state_dict(step), "ema": state_dict(ema_of(step)), "step": step}
        torch.save(saved, folder / "runs" / f"model{step}.pt")
    pack(folder / "runs", folder / "run.trajectory", key="model", overwrite=True)


def test_the_trainers_ema_is_scored_before_the_search_and_stands_in_every_table(workplace: Path, typed: Typed) -> None:
    trained_folder(workplace, lambda step: step - 7, budget={"evaluations": 12})
    ran = typed("run", "small.yaml").err
    average = state_dict(43)
    shift = 0.32  # of the held-out noise
    loss = sum((w.double() - shift).square().sum() for w in average.values() if w.is_floating_point())
    assert f"small: trainer's EMA, step 50, held-out noise on 20 items: fid {loss:.4g} (lower is better)" in ran
    assert ran.count("small: trainer's EMA") == 1, "it is measured once"
    made = stored_report("small")
    assert made.had == (LAST_CHECKPOINT, "trainer's EMA", EMA)
    assert made.models[1].loss == pytest.approx(float(loss))
    assert "trainer's EMA" in " ".join(typed("compare", "small").out.split())


def test_where_averages_are_combined_the_last_one_is_the_trainers_ema(workplace: Path, typed: Typed) -> None:
    trained_folder(workplace, lambda step: step, budget={"evaluations": 3})
    pack(workplace / "runs", workplace / "run.trajectory", key="ema", overwrite=True)
    ran = typed("run", "small.yaml", "--optimizer", "LCSC").err
    assert "small: last checkpoint (trainer's EMA), step 50, held-out noise" in ran
    assert stored_report("small").had == (LAST_CHECKPOINT,)
