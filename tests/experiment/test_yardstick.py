"""What losses are relative to: measured once for the whole experiment, before its first trial."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.trial import FrozenTrial

import lcsc_opt
from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.records import HELD_OUT, SEARCH, Yardstick
from lcsc_opt.coefficients.profiles import power_ema_coefficients
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.experiment import YARDSTICK, StoredExperiment, sample_of, search_yardstick
from lcsc_opt.database.measurement import Sample
from lcsc_opt.database.report import Report
from lcsc_opt.database.store import StoredStudy, read_contents
from lcsc_opt.objective.merge_sample_score import REHEARSED
from tests.commands import Typed
from tests.experiment import stored_parts

importlib.import_module("lcsc_opt.experiment.rehearsal")  # before the first test, or it would look at the clock
HERE = Path(__file__).parent
URL = "sqlite:///studies.db"
IMAGES = 60
TRIALS = 6
REHEARSAL = 3 * REHEARSED + IMAGES  # few images of one model twice and of another, and all of one
AFTER = REHEARSED  # of that model once more, after each search
LAST = IMAGES  # of the last checkpoint, once an experiment
AVERAGE = IMAGES  # of the yardstick, once an experiment
PRECISION = "precision@stored_parts:Means"
STEPS = (10, 20, 30, 40, 50, 60)
GRID = {"Grid": {"profile": "power", "values": [0.10]}}
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

pytestmark = pytest.mark.usefixtures("plain_targets")


@pytest.fixture(autouse=True)
def folder(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Checkpoints, real images, and a sampler that counts."""
    shutil.copy(HERE / "stored_parts.py", workplace)
    write_parts(workplace, "KeyboardInterrupt")
    monkeypatch.syspath_prepend(str(workplace))
    stored_parts.write_checkpoints(workplace / "checkpoints")
    stored_parts.write_images(workplace / "reference")
    return workplace


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
        "held_out_metrics": [],
        "device": "cpu",
        **changes.pop("settings", {}),
    }
    content = {
        "name": "kept",
        "objective": {"file": "torch_module.py", "settings": settings},
        "optimizers": ["LCSC"],
        "seeds": [0],
        "budget": {"images": TRIALS * IMAGES},
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
    return list(read_contents(open_storage(URL, write=False)).studies)


def stored_images(*names: str) -> int:
    return sum(trial.user_attrs["cost"]["images"] for name in names for trial in trials(name))


def sampled_images() -> int:
    return sum(int(line) for line in Path("sampled.txt").read_text().split())


def experiment() -> StoredExperiment:
    return StoredExperiment.open(open_storage(URL, write=True), "kept")


def yardstick() -> Yardstick:
    found = search_yardstick(experiment().attributes, experiment().trials)
    assert found is not None
    return found


def report() -> Report:
    made = experiment().report
    assert made is not None
    return made


def test_it_is_measured_once_for_all_studies_and_processes_of_an_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lcsc_opt.metrics.suite.MOST_REAL", 10_000)  # as workers have it
    targets = 3 * (200 + 2000)  # samples of the average in this process and in each worker
    content = specification(optimizers=["CMA", GRID], workers=2)
    study, grid = run(content)
    assert stored_names() == [study.name, grid.name]
    assert stored_images(study.name) == content["budget"]["images"]
    assert sampled_images() - (LAST + AVERAGE + (TRIALS + 1) * IMAGES + 2 * AFTER) == REHEARSAL + targets
    sampled = sampled_images()
    before = yardstick()
    run(specification(optimizers=["CMA"], workers=2), seeds=[1])
    assert sampled_images() - (sampled + TRIALS * IMAGES + AFTER) == REHEARSAL + 2 * (200 + 2000)
    assert yardstick() == before


@pytest.mark.parametrize("loss", ["fid@stored_parts:Means", {"fdr": ["stored_parts:Means", "stored_parts:Rows"]}])
def test_it_is_what_the_objective_measures_of_its_fixed_average(loss: Any) -> None:
    [study] = run(specification(settings={"loss": loss}))
    unit = yardstick()
    average = lcsc_opt.load_study(study.name, URL).objective.evaluate(
        lcsc_opt.Candidate(power_ema_coefficients(STEPS, 0.10))
    )
    assert unit.metrics == pytest.approx({name: average.metrics[name] for name in unit.metrics}, rel=1e-9)
    assert unit.bound == average.metrics[PRECISION]
    for trial in trials():
        metrics = trial.user_attrs["metrics"]
        distances = [name for name in unit.metrics if name.startswith("fid")]
        units = [unit.metrics[name] if len(distances) > 1 else 1.0 for name in distances]
        scale = 1.0 if len(distances) > 1 else unit.metrics[distances[0]]
        plain = sum(metrics[name] / unit for name, unit in zip(distances, units, strict=True)) / len(distances)
        missing = max(unit.bound - metrics[PRECISION], 0)
        assert trial.value == pytest.approx(plain + 10 * scale * missing / unit.bound, rel=1e-9)
        assert (trial.user_attrs["violation"] > 0) == (missing > 0)


def test_the_average_has_a_loss_of_one_in_every_report(typed: Typed) -> None:
    loss = {"fdr": ["stored_parts:Means", "stored_parts:Rows"]}
    content = specification(settings={"loss": loss, "keep": None}, optimizers=[GRID], held_out={"images": 200})
    [study] = run(content)
    found = report().of_study(study.name)
    assert found is not None
    assert found.loss == pytest.approx(1.0)
    assert [trial.value for trial in trials(study.name)] == [pytest.approx(1.0)]
    described: dict[str, Any] = typed.json("evaluate", "kept", "--images", "207", "--storage", URL)
    losses = {model["model"]["name"]: model["values"]["loss"] for model in described["parts"][0]["models"]}
    assert losses["Grid, trial 0"] == [pytest.approx(1.0)]


def test_a_kept_metric_is_reported_against_the_bound_on_the_report_s_noise() -> None:
    run(specification(held_out={"images": 200, "top": 2}))
    measured = [trial for trial in trials("kept") if trial.user_attrs["role"] == YARDSTICK]
    bounds = {sample_of(trial): trial.user_attrs[YARDSTICK]["bound"] for trial in measured}
    assert bounds.keys() == {Sample(SEARCH, IMAGES), Sample(HELD_OUT, 200)}
    row = next(row for row in report().rows(report().answer) if row.metric == PRECISION)
    is_warned = any("beyond its bound" in warning for warning in report().warnings)
    assert is_warned == row.misses(bounds[Sample(HELD_OUT, 200)])


def test_a_search_is_continued_with_what_the_experiment_has_stored() -> None:
    [grid] = run(specification(optimizers=[GRID]))
    run(specification(budget={"images": (TRIALS - 2) * IMAGES}))
    before = yardstick()
    grid.delete()
    sampled = sampled_images()
    run(specification(), budget=TRIALS * IMAGES)
    assert yardstick() == before
    assert sampled_images() == sampled + 2 * IMAGES


def test_it_stays_while_losses_are_relative_to_it_though_what_was_measured_is_forgotten(folder: Path) -> None:
    content = specification(held_out={"images": 70, "top": 1})
    run(content)
    before = yardstick()
    before_report = report()
    write_parts(folder, "SystemExit")
    sys.modules.pop("counting_parts", None)
    importlib.invalidate_caches()
    with pytest.raises(StudyStoreError, match="counting_parts changed"):
        run(content)
    sampled = sampled_images()
    run(content, budget=(TRIALS + 1) * IMAGES, accept_changes=True)
    assert yardstick() == before
    assert sampled_images() > sampled + IMAGES + 2 * 70, "what reports measure is measured again"
    measured = before_report.measured("last checkpoint")
    assert measured is not None
    assert report().measured("last checkpoint") == measured, "and found to be the same"


@pytest.mark.parametrize("images", [REHEARSAL + IMAGES + 30, 8 * IMAGES + 10])
def test_after_an_interruption_only_what_has_no_result_is_evaluated_again(images: int) -> None:
    content = specification()
    Path("stop_after").write_text(str(images))
    with pytest.raises(KeyboardInterrupt):
        run(content)
    names = stored_names()
    finished = [trial for name in names for trial in trials(name) if trial.state.is_finished()]
    stored_before = sum(trial.user_attrs["cost"]["images"] for trial in finished)
    Path("stop_after").unlink()
    Path("sampled.txt").unlink()
    [study] = run(content)
    before_trials = sampled_images() - (TRIALS * IMAGES - stored_before)
    if stored_before:
        assert before_trials == 0
    else:  # the last checkpoint may have been measured before
        before_trials -= AVERAGE + AFTER
        assert REHEARSAL in (before_trials, before_trials - LAST)
    shutil.move("studies.db", "interrupted.db")
    [whole] = run(content)
    assert [trial.value for trial in trials(study.name)] == [
        trial.value for trial in optuna.load_study(study_name=whole.name, storage="sqlite:///interrupted.db").trials
    ]


def test_it_is_shown(typed: Typed, capsys: pytest.CaptureFixture[str]) -> None:
    run(specification())
    assert f". keep: {PRECISION} may not get worse than {yardstick().bound:.4g}" in capsys.readouterr().err
    described: dict[str, Any] = typed.json("show", "kept/LCSC/0", "--storage", URL)
    assert described["keeps"] == f"{PRECISION} at least {yardstick().bound:.4g}"
    assert described["relative_to"] == dict(yardstick().metrics)
