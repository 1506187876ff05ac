"""A study that keeps a metric: its bound is what the experiment's EMA grid has measured, which always runs first."""

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
from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.coefficients.profiles import plain_averages
from lcsc_opt.database.arrays import array_of
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.kept_bound import KeptBound
from lcsc_opt.database.report import HeldOutReport
from lcsc_opt.database.store import StoredStudy, our_studies
from lcsc_opt.study.bound import bound_of as bound_of_grid
from tests.commands import Typed

HERE = Path(__file__).parent
URL = "sqlite:///studies.db"
IMAGES = 60
REHEARSAL = IMAGES  # one batch, before the first trial of a run that has studies without a result
LAST = IMAGES  # of the last checkpoint, once an experiment
STEPS = (10, 20, 30, 40, 50, 60)
AVERAGES = len(plain_averages(STEPS))
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
    shutil.copy(HERE / "stored_parts.py", tmp_path)
    write_parts(tmp_path, "KeyboardInterrupt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
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
        "nfe": 1,
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
        "budget": {"images": 20 * IMAGES},
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


def stored_names() -> list[str]:
    """In the order in which the studies were created."""
    return list(our_studies(open_storage(URL, write=False)))


def stored_images(*names: str) -> int:
    return sum(trial.user_attrs["cost"]["images"] for name in names for trial in trials(name))


def sampled_images() -> int:
    return sum(int(line) for line in Path("sampled.txt").read_text().split())


def bound_of(study: StoredStudy) -> KeptBound:
    bound = KeptBound.of(study.attributes)
    assert bound is not None
    return bound


@pytest.mark.parametrize(("optimizer", "workers"), [("LCSC", 1), ("CMA", 2)])
def test_the_grid_runs_first_and_the_search_has_its_whole_budget(optimizer: str, workers: int) -> None:
    """With workers, too; that two of them may share a candidate's images is tested with the workers."""
    content = specification(optimizers=[optimizer], workers=workers)
    [study] = run(content)
    assert stored_names() == ["kept/EMAGrid/0", study.name]
    assert stored_images(study.name) == content["budget"]["images"]
    assert stored_images("kept/EMAGrid/0") == AVERAGES * IMAGES
    assert sampled_images() == REHEARSAL + LAST + (20 + AVERAGES) * IMAGES


def test_a_grid_that_is_listed_last_runs_first_and_only_once() -> None:
    run(specification(optimizers=["LCSC", "EMAGrid"], seeds=[0, 1]))
    grids = ["kept/EMAGrid/0", "kept/EMAGrid/1"]
    assert stored_names() == [grids[0], "kept/LCSC/0", "kept/LCSC/1", grids[1]]
    assert sampled_images() == REHEARSAL + LAST + stored_images(*grids, "kept/LCSC/0", "kept/LCSC/1")


def test_the_bound_is_that_of_the_grid_s_answer_and_every_loss_has_its_penalty() -> None:
    [study] = run(specification())
    bound = bound_of(study)
    best = min(trials("kept/EMAGrid/0"), key=lambda trial: float(trial.value or 0))
    assert (bound.study, bound.trial) == ("kept/EMAGrid/0", best.number)
    assert bound.coefficients.tolist() == array_of(best.user_attrs["coefficients"]).tolist()
    assert bound.constraint.loss == best.value
    name = "precision@stored_parts:Means"
    assert bound.constraint.value == best.user_attrs["metrics"][name]
    assert all("violation" not in trial.user_attrs for trial in trials("kept/EMAGrid/0")), "grids have no penalty"
    for trial in trials():
        metrics = trial.user_attrs["metrics"]
        penalty = bound.constraint.penalty(metrics[name])
        assert trial.value == pytest.approx(metrics["fid@stored_parts:Means"] + penalty, rel=1e-9)
        assert trial.user_attrs["violation"] == bound.constraint.violation(metrics[name], IMAGES)


def test_a_bound_of_ones_own_replaces_the_value_only() -> None:
    [study] = run(specification(settings={"keep": {"precision": 0.75}}))
    constraint = bound_of(study).constraint
    assert constraint.value == 0.75
    assert constraint.loss == min(float(trial.value or 0) for trial in trials("kept/EMAGrid/0"))


def test_the_bound_is_the_ema_of_the_report() -> None:
    held_out = {"images": 200, "top": 2}
    grid, study = run(specification(optimizers=["EMAGrid", "LCSC"], held_out=held_out))
    answer = grid.chosen_trial()[1]
    bound = bound_of(study)
    assert bound.coefficients.tolist() == answer.tolist()
    assert bound.study == grid.name
    report = HeldOutReport.from_json(study.attributes["held_out"])
    assert report is not None
    _, baseline = report.baselines
    assert (baseline.study, baseline.trial) == (grid.name, bound.trial)
    row = next(row for row in report.rows if row.metric == "precision@stored_parts:Means")
    assert ("did not hold" in str(report.warning)) == row.lost


def test_a_search_is_continued_without_its_grid() -> None:
    content = specification(optimizers=["LCSC"], budget={"images": 10 * IMAGES})
    [study] = run(content)
    bound = bound_of(study)
    StoredStudy.open(open_storage(URL, write=True), "kept/EMAGrid/0").delete()
    [study] = run(content, budget=12 * IMAGES)
    assert bound_of(study).to_json() == bound.to_json()
    assert stored_names() == [study.name]


def test_a_stored_search_that_has_no_bound_runs_the_grid_first(typed: Typed) -> None:
    [study] = run(specification(budget={"images": 3 * IMAGES}))
    StoredStudy.open(open_storage(URL, write=True), "kept/EMAGrid/0").delete()
    study.set_attribute("kept_bound", None)
    typed("run", study.name, "--budget", str(5 * IMAGES), "--storage", URL)
    assert stored_images(study.name) == 5 * IMAGES
    assert bound_of(study).study == "kept/EMAGrid/0"


def test_a_search_without_a_finished_grid_says_what_to_run() -> None:
    [study] = run(specification(budget={"images": 3 * IMAGES}))
    StoredStudy.open(open_storage(URL, write=True), "kept/EMAGrid/0").delete()
    with pytest.raises(StudyStoreError, match="no finished EMAGrid study of this objective; run that first"):
        bound_of_grid(study)


@pytest.mark.parametrize("images", [100, 5 * IMAGES + 10, AVERAGES * IMAGES + 150])
def test_after_an_interruption_only_what_has_no_result_is_evaluated_again(images: int) -> None:
    content = specification()
    Path("stop_after").write_text(str(images))
    with pytest.raises(KeyboardInterrupt):
        run(content)
    interrupted = sampled_images()
    names = stored_names()
    finished = [trial for name in names for trial in trials(name) if trial.state.is_finished()]
    stored_before = sum(trial.user_attrs["cost"]["images"] for trial in finished)
    assert stored_before <= interrupted
    Path("stop_after").unlink()
    Path("sampled.txt").unlink()
    has_results = stored_before > AVERAGES * IMAGES  # of the search, too
    [study] = run(content)
    before_trials = 0 if has_results else REHEARSAL
    if not stored_before:
        before_trials += LAST
    assert sampled_images() == before_trials + (20 + AVERAGES) * IMAGES - stored_before
    shutil.move("studies.db", "interrupted.db")
    [whole] = run(content)
    assert [trial.value for trial in trials(study.name)] == [
        trial.value for trial in optuna.load_study(study_name=whole.name, storage="sqlite:///interrupted.db").trials
    ]


def test_a_search_that_starts_at_another_one_runs_a_grid_of_its_own(typed: Typed) -> None:
    [grid] = run(specification(optimizers=["EMAGrid"]))
    typed("run", "study.yaml", "name=again", f"start={grid.name}", "optimizers=[LCSC]", "budget={images: 300}")
    assert stored_names() == [grid.name, "again/EMAGrid/0", "again/LCSC/0"]
    again = StoredStudy.open(open_storage(URL, write=True), "again/LCSC/0")
    assert np.allclose(array_of(trials(again.name)[0].user_attrs["coefficients"]), grid.chosen_trial()[1])
    assert bound_of(again).study == "again/EMAGrid/0"


def test_a_landscape_has_the_bound_of_its_experiment(typed: Typed) -> None:
    [source] = run(specification())
    typed("run", "study.yaml", "optimizers=[{Landscape: {size: 5}}]")
    assert stored_names() == ["kept/EMAGrid/0", source.name, "kept/Landscape/0"]
    landscape = StoredStudy.open(open_storage(URL, write=True), "kept/Landscape/0")
    assert landscape.attributes["kept_bound"] == source.attributes["kept_bound"]
    complete = [trial for trial in landscape.trials() if trial.state == TrialState.COMPLETE]
    assert complete
    assert all("violation" in trial.user_attrs for trial in complete)


def test_show_names_the_bound_and_a_dry_run_lists_the_grid(typed: Typed) -> None:
    content = specification()
    assert "kept/EMAGrid/0" in typed("run", "study.yaml", "--dry-run").out
    [study] = run(content)
    described: dict[str, Any] = typed.json("show", study.name, "--storage", URL)
    value = bound_of(study).constraint.value
    assert described["keeps"].startswith(f"precision@stored_parts:Means at least {value:.4g}; EMA* (")
    assert json.loads(json.dumps(study.attributes["kept_bound"])) == bound_of(study).to_json()


def test_another_seed_has_the_bound_of_the_grid_that_is_there() -> None:
    run(specification())
    sampled = sampled_images()
    [other] = run(specification(), seeds=[1])
    assert stored_names() == ["kept/EMAGrid/0", "kept/LCSC/0", "kept/LCSC/1"]
    assert bound_of(other).study == "kept/EMAGrid/0"
    assert sampled_images() == sampled + REHEARSAL + 20 * IMAGES
