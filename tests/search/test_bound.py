"""A study that keeps a metric: EMA* and the bound are measured once, by trials that count, and are the report's."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import yaml
from optuna.trial import FrozenTrial, TrialState

import lcsc_opt
from lcsc_opt.base.errors import SearchFailedError, StudySpecError
from lcsc_opt.base.records import HELD_OUT, Candidate
from lcsc_opt.coefficients.profiles import plain_averages
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.kept_bound import KeptBound
from lcsc_opt.database.report import HeldOutReport
from lcsc_opt.database.store import StoredStudy
from tests.commands import Typed

STORED = Path(__file__).parents[1] / "stored_by_0_2_0"
URL = "sqlite:///studies.db"
IMAGES = 60
FEWEST_KEPT = 500  # here; test_keeping.py has the number of the library
STEPS = (10, 20, 30, 40, 50, 60)
AVERAGES = len(plain_averages(STEPS))
ALL_BASELINES = AVERAGES * IMAGES + FEWEST_KEPT
PARTS = '''
from stored_parts import *
import stored_parts

def sample(model, noise):
    """Counts the images of all processes, and stops where a file says so."""
    with open("sampled.txt", "a") as file:
        file.write(f"{len(noise)}\\n")
    if Path("stop_after").exists():
        count = sum(int(line) for line in Path("sampled.txt").read_text().split())
        if count > int(Path("stop_after").read_text()):
            raise KIND
    return stored_parts.sample(model, noise)
'''


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Checkpoints, real images, and a sampler that counts."""
    shutil.copy(STORED / "stored_parts.py", tmp_path)
    write_parts(tmp_path, "KeyboardInterrupt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("LCSC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lcsc_opt.objective.merge_sample_score.FEWEST_KEPT", FEWEST_KEPT)
    import stored_parts  # type: ignore[import-not-found]  # it was copied to the temporary folder

    stored_parts.write_checkpoints(tmp_path / "checkpoints")
    stored_parts.write_images(tmp_path / "reference")
    yield tmp_path
    for module in ("stored_parts", "counting_parts"):
        sys.modules.pop(module, None)


def write_parts(folder: Path, kind: str) -> None:
    (folder / "counting_parts.py").write_text(PARTS.replace("KIND", kind))


def specification(**changes: Any) -> dict[str, Any]:
    settings = {
        "checkpoints": "checkpoints",
        "model": "stored_parts:Network",
        "sampler": "counting_parts:sample",
        "image_shape": [1, 4, 4],
        "reference": "reference",
        "loss": "fid@stored_parts:Means",
        "images": IMAGES,
        "batch_size": 100,
        "keep": "precision",
        "device": "cpu",
        **changes.pop("settings", {}),
    }
    content = {
        "name": "kept",
        "objective": {"file": "torch_module.py", "settings": settings},
        "optimizers": ["LCSC"],
        "seeds": [0],
        "budget": {"images": ALL_BASELINES + 5 * IMAGES},
        "storage": URL,
    }
    content |= changes
    Path("study.yaml").write_text(yaml.safe_dump(content))
    return content


def run(content: Mapping[str, Any], **options: Any) -> list[StoredStudy]:
    studies = lcsc_opt.run(content, **options)
    return [StoredStudy.open(open_storage(URL, write=True), study.name) for study in studies]


def trials(name: str = "kept/LCSC/0") -> list[FrozenTrial]:
    """As plain Optuna reads them."""
    return optuna.load_study(study_name=name, storage=URL).trials


def stored_images(*names: str) -> int:
    return sum(trial.user_attrs["cost"]["images"] for name in names for trial in trials(name))


def sampled_images() -> int:
    return sum(int(line) for line in Path("sampled.txt").read_text().split())


def bound_of(study: StoredStudy) -> KeptBound:
    bound = KeptBound.of(study.attributes)
    assert bound is not None
    return bound


@pytest.mark.parametrize(("optimizer", "workers"), [("LCSC", 1), ("LCSC", 2), ("CMA", 2)])
def test_every_image_that_is_sampled_is_stored_and_counts_in_the_budget(optimizer: str, workers: int) -> None:
    """Two workers share the images of each candidate of LCSC, and have candidates of their own of CMA."""
    content = specification(optimizers=[optimizer], workers=workers)
    [study] = run(content)
    assert sampled_images() == stored_images(study.name) == content["budget"]["images"]
    baselines, searched = trials(study.name)[: AVERAGES + 1], trials(study.name)[AVERAGES + 1 :]
    assert {trial.state for trial in baselines} == {TrialState.PRUNED}
    assert all(trial.user_attrs["baseline"] for trial in baselines)
    assert [trial.state for trial in searched] == [TrialState.COMPLETE] * 5
    assert not any("baseline" in trial.user_attrs for trial in searched)
    assert study.attributes["search_ended"]["evaluations"] == AVERAGES + 1 + 5


def test_baselines_count_in_a_budget_of_evaluations_and_a_higher_budget_repeats_none() -> None:
    content = specification(budget={"evaluations": AVERAGES + 4})
    run(content)
    assert len(trials()) == AVERAGES + 4
    before = [trial.value for trial in trials()]
    run(content, budget=AVERAGES + 6)
    assert len(trials()) == AVERAGES + 6
    assert [trial.value for trial in trials()][: len(before)] == before
    assert sampled_images() == stored_images("kept/LCSC/0")


def test_the_bound_is_that_of_the_best_average_and_every_loss_has_its_penalty() -> None:
    [study] = run(specification())
    bound, [*averages, last] = bound_of(study), trials()[: AVERAGES + 1]
    best = min(averages, key=lambda trial: float(trial.value or 0))
    assert bound.coefficients.tolist() == best.user_attrs["coefficients"] == last.user_attrs["coefficients"]
    assert bound.constraint.loss == best.value
    assert last.user_attrs["images"] == FEWEST_KEPT
    name = "precision@stored_parts:Means"
    assert bound.constraint.value == last.user_attrs["metrics"][name]
    for trial in trials()[AVERAGES + 1 :]:
        metrics = trial.user_attrs["metrics"]
        penalty = bound.constraint.penalty(metrics[name])
        assert trial.value == pytest.approx(metrics["fid@stored_parts:Means"] + penalty, rel=1e-9)
        assert trial.user_attrs["violation"] == bound.constraint.violation(metrics[name], IMAGES)


def test_an_optimizer_plans_with_what_the_bound_leaves_of_the_budget() -> None:
    options = {"LCSCGradient": {"images": 20}}
    [study] = run(specification(optimizers=[options], budget={"images": ALL_BASELINES + 600}))
    searched = [trial for trial in trials(study.name) if "baseline" not in trial.user_attrs]
    assert sum(trial.user_attrs["cost"]["images"] for trial in searched) <= 600
    assert searched[-1].state == TrialState.COMPLETE, "its last trial is its answer, evaluated like any other"
    assert searched[-1].user_attrs["violation"] is not None


def test_a_bound_of_ones_own_replaces_the_value_only() -> None:
    [study] = run(specification(settings={"keep": {"precision": 0.75}}))
    constraint = bound_of(study).constraint
    assert constraint.value == 0.75
    best = min(trials()[:AVERAGES], key=lambda trial: float(trial.value or 0))
    assert constraint.loss == best.value
    assert stored_images(study.name) == sampled_images()
    assert sum("baseline" in trial.user_attrs for trial in trials()) == AVERAGES, "its images are enough"


def test_the_bound_is_the_ema_of_the_report() -> None:
    held_out = {"images": 200, "top": 2}
    content = specification(
        optimizers=["EMAGrid", "LCSC"], budget={"images": FEWEST_KEPT + 12 * IMAGES}, held_out=held_out
    )
    grid, study = run(content)
    answer = grid.chosen_trial()[1]
    bound = bound_of(study)
    assert bound.coefficients.tolist() == answer.tolist()
    assert bound.study == grid.name
    assert [trial.user_attrs["coefficients"] for trial in trials() if "baseline" in trial.user_attrs] == [
        answer.tolist()
    ]
    assert all("violation" not in trial.user_attrs for trial in trials(grid.name)), "grids have no penalty"
    report = HeldOutReport.from_json(study.attributes["held_out"])
    assert report is not None
    [baseline] = report.baselines
    assert (baseline.study, baseline.trial) == (grid.name, bound.trial)


@pytest.mark.parametrize("first", ["LCSC", "EMAGrid"])
def test_a_report_says_that_keep_did_not_hold_only_against_the_ema_that_bounded_the_search(first: str) -> None:
    others = ["EMAGrid"] if first == "LCSC" else ["LCSC"]
    content = specification(optimizers=[first, *others], held_out={"images": 1000, "top": 3})
    run(content)
    study = StoredStudy.open(open_storage(URL, write=True), "kept/LCSC/0")
    report = HeldOutReport.from_json(study.attributes["held_out"])
    assert report is not None
    [baseline] = report.baselines
    objective = lcsc_opt.load_objective(content)
    measured = objective.evaluate(Candidate(bound_of(study).coefficients, images=1000, noise=HELD_OUT))
    name = "precision@stored_parts:Means"
    assert baseline.measured.metrics[name] == pytest.approx(measured.metrics[name])
    row = next(row for row in report.rows if row.metric == name)
    assert row.baseline == pytest.approx(measured.metrics[name])
    did_not_hold = "did not hold" in str(report.warning)
    assert did_not_hold == row.lost


@pytest.mark.parametrize("images", [100, 5 * IMAGES + 10, AVERAGES * IMAGES + 150])
def test_after_an_interruption_only_what_has_no_result_is_evaluated_again(images: int) -> None:
    content = specification()
    Path("stop_after").write_text(str(images))
    with pytest.raises(KeyboardInterrupt):
        run(content)
    interrupted = sampled_images()
    finished = [trial.number for trial in trials() if trial.state.is_finished()]
    stored = sum(trials()[number].user_attrs["cost"]["images"] for number in finished)
    assert stored <= interrupted
    Path("stop_after").unlink()
    Path("sampled.txt").unlink()
    [study] = run(content)
    assert sampled_images() == content["budget"]["images"] - stored
    assert stored_images(study.name) == content["budget"]["images"]
    shutil.move("studies.db", "interrupted.db")
    [whole] = run(content)
    assert [trial.value for trial in trials()] == [
        trial.value for trial in optuna.load_study(study_name=whole.name, storage="sqlite:///interrupted.db").trials
    ]


def test_a_failed_baseline_ends_the_study_with_its_reason_and_can_be_tried_again(folder: Path, typed: Typed) -> None:
    write_parts(folder, "ValueError('no disk')")
    content = specification(failures={"retries": 1})
    Path("stop_after").write_text("200")
    with pytest.raises(SearchFailedError, match=r"trial 3, .* failed: ValueError: no disk\. Fix it, then run: lcsc re"):
        run(content)
    assert [trial.state for trial in trials()] == [TrialState.PRUNED] * 3 + [TrialState.FAIL]
    assert len(trials()[3].user_attrs["attempts"]) == 2
    sampled = sampled_images()
    Path("stop_after").unlink()
    with pytest.raises(SearchFailedError, match="no disk"):
        run(content)
    assert sampled_images() == sampled
    typed("resume", "kept/LCSC/0", "--retry-failed", "--storage", URL)
    assert bound_of(StoredStudy.open(open_storage(URL, write=True), "kept/LCSC/0")).constraint.loss > 0
    assert sum(trial.state == TrialState.COMPLETE for trial in trials()) == 5


def test_after_a_failed_baseline_a_grid_gives_the_bound(folder: Path) -> None:
    write_parts(folder, "ValueError('no disk')")
    content = specification(failures={"retries": 0})
    Path("stop_after").write_text("200")
    with pytest.raises(SearchFailedError, match="or run EMAGrid, which goes on without averages that fail"):
        run(content)
    Path("stop_after").unlink()
    grid, study = run({**content, "optimizers": ["EMAGrid", "LCSC"]})
    assert bound_of(study).study == grid.name
    prices = [trial.user_attrs.get("images", IMAGES) for trial in trials()]
    assert content["budget"]["images"] - IMAGES < sum(prices) < content["budget"]["images"] + IMAGES


def test_a_budget_that_leaves_nothing_to_the_search_is_refused_before_anything_is_stored() -> None:
    with pytest.raises(StudySpecError, match=rf"budget: {ALL_BASELINES:,} of {ALL_BASELINES + 59:,} images .* EMAGrid"):
        run(specification(budget={"images": ALL_BASELINES + IMAGES - 1}))
    assert not Path("sampled.txt").exists()
    assert lcsc_opt.run(specification(budget={"images": ALL_BASELINES + IMAGES}))[0].searched is not None


def test_a_fork_has_the_bound_of_its_source_and_is_told_of_no_baseline(typed: Typed) -> None:
    [source] = run(specification())
    sampled = sampled_images()
    said = typed("fork", source.name, "forked", "--optimizer", "CMA", "--budget", str(4 * IMAGES), "--storage", URL)
    assert "the first trials measure" not in said.err
    assert "contradicted" not in said.err, "its summary is of its own trials"
    typed("resume", "forked/CMA/0", "--storage", URL)
    fork = StoredStudy.open(open_storage(URL, write=True), "forked/CMA/0")
    assert fork.attributes["kept_bound"] == source.attributes["kept_bound"]
    assert sampled_images() == sampled + 4 * IMAGES


def test_a_fork_of_a_grid_takes_over_no_losses_without_a_penalty(typed: Typed) -> None:
    [grid] = run(specification(optimizers=["EMAGrid"]))
    typed("fork", grid.name, "forked", "--optimizer", "LCSC", "--budget", str(ALL_BASELINES + 300), "--storage", URL)
    typed("resume", "forked/LCSC/0", "--storage", URL)
    assert not any("inherited" in trial.user_attrs for trial in trials("forked/LCSC/0"))
    first_searched = next(trial for trial in trials("forked/LCSC/0") if "baseline" not in trial.user_attrs)
    assert np.allclose(first_searched.user_attrs["coefficients"], grid.chosen_trial()[1])


def test_a_fork_whose_budget_its_baselines_would_spend_is_not_stored(typed: Typed) -> None:
    [grid] = run(specification(optimizers=["EMAGrid"]))
    command = ["fork", grid.name, "forked", "--optimizer", "CMA", "--budget", str(FEWEST_KEPT), "--storage", URL]
    assert "leaves nothing to the search" in typed(*command, status=2).err
    assert "forked" not in typed("list", "--storage", URL).out


def test_a_landscape_has_the_bound_of_its_source(typed: Typed) -> None:
    [source] = run(specification())
    typed("landscape", source.name, "--grid", "5", "--storage", URL)
    landscape = StoredStudy.open(open_storage(URL, write=True), "kept/Landscape/0")
    assert landscape.attributes["kept_bound"] == source.attributes["kept_bound"]
    complete = [trial for trial in landscape.trials() if trial.state == TrialState.COMPLETE]
    assert complete
    assert all("violation" in trial.user_attrs for trial in complete)
    assert not any("baseline" in trial.user_attrs for trial in landscape.trials())


def test_show_names_the_bound_and_a_dry_run_says_what_comes_first(typed: Typed) -> None:
    content = specification()
    said = typed("run", "study.yaml", "--dry-run")
    assert "keep: the first trials measure EMA* and the bound" in said.err
    [study] = run(content)
    described: dict[str, Any] = typed.json("show", study.name, "--storage", URL)
    value = bound_of(study).constraint.value
    assert described["keeps"].startswith(f"precision@stored_parts:Means at least {value:.4g}; EMA* (")
    assert json.loads(json.dumps(study.attributes["kept_bound"])) == bound_of(study).to_json()
