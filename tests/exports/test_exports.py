"""A merged model as a file: every form loads where it is meant to, says how it was made, and is made again."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import resource
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.records import Candidate
from lcsc_opt.cli import run as lcsc
from lcsc_opt.database.arrays import coefficients_of, rounded_coefficients
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.measurement import Model
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.experiment.answer import on_the_way
from lcsc_opt.exports.recipe import Recipe
from lcsc_opt.exports.writing import Content, Destination
from lcsc_opt.trajectory import Trajectory
from tests.commands import Typed
from tests.history_examples import measured, report_of
from tests.model_studies import EMA_STUDY, STEPS, STUDY, state_dict, write_model_study
from tests.study_examples import write_report

STORAGE = "sqlite:///studies.db"


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished study for all tests that only read it."""
    folder = tmp_path_factory.mktemp("finished")
    file = write_model_study(folder, held_out={"images": 20, "top": 2}, budget={"evaluations": 12})
    storage = f"sqlite:///{folder / 'studies.db'}"
    assert lcsc(["run", str(file), "--storage", storage]) == 0
    return folder


@pytest.fixture
def finished(finished_once: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LCSC_STORAGE", f"sqlite:///{finished_once / 'studies.db'}")
    return finished_once


def recipe_in(path: str) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return dict(json.loads(file.metadata()["lcsc_recipe"]))


def assert_same_weights(left: str, right: str) -> None:
    torch.testing.assert_close(load_file(left), load_file(right))


def test_a_studys_best_is_exported_with_its_recipe_and_a_better_answer_is_named(finished: Path, typed: Typed) -> None:
    said = typed("export", STUDY, "-o", "best.safetensors").err
    assert f"{STUDY} is not the answer, EMA* is" in said
    assert "lcsc export small writes the answer" in said
    found = HistoryReader(open_storage(f"sqlite:///{finished / 'studies.db'}", write=False)).read_study(STUDY).found
    assert found is not None
    study = optuna.load_study(study_name=STUDY, storage=f"sqlite:///{finished / 'studies.db'}")
    chosen = study.trials[found.model.trial or 0]
    recipe = recipe_in("best.safetensors")
    trajectory = Trajectory.open(finished / "run.trajectory")
    assert recipe["coefficients"] == coefficients_of(chosen).tolist()
    assert (recipe["study"], recipe["trial"], recipe["loss"]) == (STUDY, chosen.number, chosen.value)
    assert recipe["metrics"] == chosen.user_attrs["metrics"]
    assert recipe["held_out"] == {**found.means(1), "sampler": None}
    assert recipe["steps"] == list(STEPS)
    assert recipe["checkpoint_sha256"] == list(trajectory.checkpoint_sha256)
    assert recipe["trajectory_sha256"] == trajectory.sha256
    assert (recipe["key"], recipe["dtype"]) == ("", None)
    assert set(recipe["versions"]) == {"python", "torch", "numpy"}
    assert str(finished) not in json.dumps(recipe)  # no paths of the machine
    merged = trajectory.merge(recipe["coefficients"])
    torch.testing.assert_close(load_file("best.safetensors"), merged)
    assert not list(Path().glob(".*"))  # nothing half-written is left


def test_the_answer_of_an_experiment_is_exported_also_if_it_was_there_before(finished: Path, typed: Typed) -> None:
    said = typed("export", "small", "-o", "answer.safetensors").err
    assert "answer.safetensors: EMA* (average of all 5) of small, searched " in said
    assert "lcsc: small: no search was better than EMA*" in said, "the report's warnings"
    recipe = recipe_in("answer.safetensors")
    study = optuna.load_study(study_name=EMA_STUDY, storage=f"sqlite:///{finished / 'studies.db'}")
    chosen = study.trials[recipe["trial"]]
    assert (recipe["study"], recipe["loss"], recipe["metrics"]) == (
        EMA_STUDY,
        chosen.value,
        chosen.user_attrs["metrics"],
    )
    assert recipe["coefficients"] == coefficients_of(chosen).tolist() == [0.2] * 5
    assert set(recipe["held_out"]["metrics"]) == {"fid", "kid"}
    typed("export", EMA_STUDY, "-o", "grid.safetensors")
    assert recipe_in("grid.safetensors") == recipe
    assert "--trial belongs to a study" in typed.refused("export", "small", "--trial", "3", "-o", "best.safetensors")
    assert "bigger: no such experiment; the database holds: small" in typed.refused("export", "bigger", "-o", "a.json")


def test_without_a_report_the_best_searched_trial_is_exported_while_a_search_runs(
    workplace: Path, typed: Typed
) -> None:
    typed("run", str(write_model_study(workplace, budget={"evaluations": 3})))
    study = StoredStudy.open(open_storage(STORAGE, write=True), STUDY)
    with study.hold():
        study.add_candidate(Candidate(np.full(5, 0.2)))  # is being evaluated
        assert "average of all 5" not in typed("export", "small", "-o", "answer.json").err
        typed("export", STUDY, "-o", "best.safetensors")
    recipe = Recipe.read(Path("answer.json"))
    assert (recipe.study, recipe.held_out) == (EMA_STUDY, None)
    exported = recipe_in("best.safetensors")
    best = optuna.load_study(study_name=STUDY, storage=STORAGE).best_trial
    assert (exported["coefficients"], exported["loss"]) == (coefficients_of(best).tolist(), best.value)
    assert exported["held_out"] is None


def test_an_answer_between_two_models_is_exported_and_made_again_from_its_recipe(workplace: Path, typed: Typed) -> None:
    typed("run", str(write_model_study(workplace, space={"rows": "layers"}, budget={"evaluations": 12})))
    storage = open_storage(STORAGE, write=True)
    reader = HistoryReader(storage)
    grid, search = reader.read("small")
    averaged, found = reader.answer(grid), reader.answer(search)
    assert averaged is not None
    assert found is not None
    ema = Model("EMA*", averaged, study=EMA_STUDY)
    half = on_the_way(ema, Model("LCSC, trial 3", found, study=STUDY))[1]
    of_found = {STUDY: dataclasses.replace(measured(2.0, trial=3, images=40), model=Model("", found))}
    of_ema = dataclasses.replace(measured(3.0, images=40), model=ema)
    of_answer = dataclasses.replace(measured(1.5, images=40, fid=1.5), model=half)
    report = report_of(of_found, of_ema)
    parts = (dataclasses.replace(report.parts[0], models=(*report.models, of_answer)),)
    write_report(storage, dataclasses.replace(report, parts=parts, answer=half.name), "small")
    assert (
        "½ of the way from EMA* to LCSC, trial 3 of small, held-out 1.5" in typed("export", "small", "-o", "a.pt").err
    )
    recipe = Recipe.read(Path("a.pt"))
    assert np.array_equal(recipe.coefficients, half.coefficients)
    assert half.coefficients.shape == (3, 5)
    assert (recipe.trial, recipe.loss, (recipe.held_out or {})["images"]) == (None, None, 40)
    typed("apply", "a.pt", "checkpoints", "-o", "again.safetensors")
    merged = Trajectory.open("run.trajectory").in_rows("layers").merge(half.coefficients)
    torch.testing.assert_close(load_file("again.safetensors"), merged)


def test_apply_makes_the_same_weights_from_the_files_elsewhere(finished: Path) -> None:
    assert lcsc(["export", STUDY, "-o", "best.safetensors", "--dtype", "bfloat16"]) == 0
    Path("recipe.json").write_text(json.dumps(recipe_in("best.safetensors")))
    elsewhere = Path("elsewhere")
    elsewhere.mkdir()
    for step in STEPS:
        torch.save({"ema": state_dict(step), "step": step}, elsewhere / f"model{step:06d}.pt")  # another format, too
    made = {
        "packed": ["best.safetensors", str(finished / "run.trajectory")],
        "folder": ["recipe.json", str(finished / "checkpoints")],
        "files": ["best.safetensors", *map(str, sorted(elsewhere.glob("*.pt"))), "--key", "ema"],
    }
    for name, arguments in made.items():
        assert lcsc(["apply", *arguments, "-o", f"{name}.safetensors"]) == 0
        assert_same_weights(f"{name}.safetensors", "best.safetensors")
        assert recipe_in(f"{name}.safetensors") == recipe_in("best.safetensors")


def test_apply_to_other_checkpoints_is_refused(finished: Path, typed: Typed) -> None:
    typed("export", STUDY, "-o", "best.safetensors")
    others = Path("others")
    others.mkdir()
    for step in STEPS:
        weights = state_dict(step)
        weights["conv.weight"][0, 0] += 1e-6 * (step == 30)
        save_file(weights, others / f"model{step:06d}.safetensors")
    said = typed("apply", "best.safetensors", "others", "-o", "out.safetensors", status=2).err.splitlines()[-1]
    assert "model000030.safetensors: this is not the checkpoint of the recipe" in said
    assert not Path("out.safetensors").exists()


BROKEN = [
    ({"checkpoint_sha256": ["0" * 64]}, "1 hashes for 5 steps"),
    ({"coefficients": [1.0, 1.0, 0.0, 0.0, 0.0]}, "sum to one"),
    ({"steps": [], "coefficients": [], "checkpoint_sha256": []}, "it combines no checkpoints"),
    ({"rows": {"w": [1, 0, 2, 1]}, "coefficients": [[0.2] * 5] * 2}, "a tensor has row 3 of 2"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN)
def test_a_recipe_that_cannot_be_followed_is_one_line(
    change: dict[str, object], message: str, finished: Path, typed: Typed
) -> None:
    typed("export", STUDY, "-o", "best.safetensors")
    Path("broken.json").write_text(json.dumps({**recipe_in("best.safetensors"), **change}))
    said = typed("apply", "broken.json", str(finished / "checkpoints"), "-o", "out.safetensors", status=2).err
    assert message in said.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", STUDY, "-o", "plain.safetensors"], "exists already"),
        (["export", STUDY, "-o", "config.json"], "exists already"),
        (["export", STUDY, "-o", "taken", "--overwrite"], "holds files other than an exported model"),
        (["export", STUDY, "-o", "best", "--config", "taken"], "cannot be read as a configuration"),
        (["export", STUDY, "-o", "best.safetensors", "--as", "lora"], "not a LoRA"),
        (["show", "evil.pt"], "holds no recipe that can be read"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], message: str, finished: Path, typed: Typed) -> None:
    Path("taken").mkdir()
    Path("taken/thesis.tex").write_text("years of work")
    save_file({"w": torch.zeros(2)}, "plain.safetensors")
    Path("config.json").write_text("{}")
    Path("evil.pt").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    before = sorted(Path().rglob("*"))
    assert message in typed.refused(*arguments)
    assert sorted(Path().rglob("*")) == before
    assert Path("config.json").read_text() == "{}"


def test_a_disk_that_is_full_in_earnest_is_one_line_and_leaves_what_was_there(
    finished: Path, small_disk: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small_disk)
    old = Path(name := "a.safetensors")
    old.write_bytes(b"precious")
    with contextlib.suppress(OSError), Path("filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    assert re.search(f"{name}: .*No space left on device", typed.refused("export", STUDY, "-o", name, "--overwrite"))
    assert sorted(path.name for path in Path().iterdir()) == [old.name, "filler"]
    assert old.read_bytes() == b"precious"


@pytest.mark.parametrize("name", ["large.safetensors", "large.pt"])
def test_a_disk_that_refuses_is_told_as_the_system_says_it(finished: Path, typed: Typed, name: str) -> None:
    """Torch's writer only knows where it stands then: ``unexpected pos 704 vs 598``."""
    typed("export", STUDY, "-o", "recipe.json")
    recipe = Recipe.read(Path("recipe.json"))
    content = Content({"w": torch.zeros(100_000)}, recipe, config=None, document=None, header={})
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(StudyStoreError, match=rf"^{name}: cannot be written: .*File too large"):
            Destination.of(Path(name)).write(content)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
    assert not Path(name).exists()


def test_rows_are_shown_exported_begun_at_one_and_merged_again(workplace: Path, typed: Typed) -> None:
    file = write_model_study(workplace, space={"rows": "layers"}, optimizers=["LCSC"], budget={"evaluations": 20})
    typed("run", str(file))
    typed("export", STUDY, "-o", "best.safetensors")
    typed("apply", "best.safetensors", "checkpoints", "-o", "again.safetensors")
    assert_same_weights("again.safetensors", "best.safetensors")
    shown = typed.json("show", STUDY)
    rows = shown["coefficients"]
    assert shown["layer_groups"] == {"rows": "layers", "layers": {"conv": 1, "norm": 1, "steps": 1}}
    assert rows[0] != rows[1]
    for row, name in zip(rows[:2], ("conv.weight", "norm.weight"), strict=True):
        total = sum(c * state_dict(step)[name].double() for c, step in zip(row, STEPS, strict=True))
        torch.testing.assert_close(load_file("best.safetensors")[name], total.to(state_dict(10)[name].dtype))
    typed("run", str(file), "name=alike", "space={}")
    typed("run", "alike/LCSC/0", "name=more", "start=alike/LCSC/0", "space.rows=layers", "--budget", "3")
    source, more = (optuna.load_study(study_name=f"{name}/LCSC/0", storage=STORAGE) for name in ("alike", "more"))
    assert [coefficients_of(trial).shape for trial in more.trials] == [(3, 5)] * 3
    begun_at = np.broadcast_to(coefficients_of(source.best_trial), (3, 5))
    np.testing.assert_array_equal(coefficients_of(more.trials[0]), rounded_coefficients(begun_at))
