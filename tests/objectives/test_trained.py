"""``objectives/trained.py``: any recipe, trained into the cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lcsc_opt.base.errors import LcscError, StudySpecError, TrainingError, TrajectoryError
from lcsc_opt.base.records import HELD_OUT, Candidate
from lcsc_opt.objective.merge_sample_score import MergeSampleScore
from lcsc_opt.sampling.consistency import ConsistencyFunction
from lcsc_opt.training import preparing
from lcsc_opt.training.images import digits_images, second_digits_view
from tests.objectives import trained_objectives

SMALL = {"recipe": "ct", "recipe_settings": {"batch_size": 4}}
EDM = {"recipe": "edm", "recipe_settings": {"batch_size": 4}, "training_steps": 4, "checkpoint_every": 2}
MODULE = trained_objectives.load("trained")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def use_cache(cache: Path, networks_train_briefly: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LCSC_CACHE", str(cache))


def build(**changes: Any) -> MergeSampleScore:
    return trained_objectives.build("trained", **{**SMALL, **changes})


@pytest.mark.parametrize("recipe", ["ct", "ddpm"])
def test_it_is_an_objective(recipe: str, cache: Path) -> None:
    objective = build(recipe=recipe, nfe=2)
    assert objective.steps == (2, 4, 6)
    assert objective.sampler.nfe == 2
    trained_objectives.check(objective)
    trained_objectives.check_the_loss(objective, digits_images())
    trained_objectives.check_the_cross_check(objective, second_digits_view(cache))


def test_one_step_of_a_consistency_model_is_its_function_of_noise() -> None:
    objective = build()
    coefficients = np.array([0.5, -0.5, 1.0])
    network = MODULE.DiffusersFolder.read(MODULE.beside(objective.trajectory.path, ".model")).network().eval()
    network.load_state_dict(objective.trajectory.merge(coefficients))
    noise = MODULE.ImageNoise(0).batch(HELD_OUT, 0, 5, (1, 8, 8))
    with torch.no_grad():
        expected = ConsistencyFunction(network)(20.0 * noise, torch.full((5,), 20.0)).clamp(-1, 1)
    images = objective.images(coefficients, HELD_OUT, 5)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("recipe", ["cd", "ect"])
def test_the_teacher_is_trained_before_and_once(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []
    run = preparing.run

    def counted(request: preparing.Request, **how: Any) -> Path | None:
        trained.append(request.recipe)
        return run(request, **how)

    monkeypatch.setattr(preparing, "run", counted)
    objective = build(recipe=recipe, teacher={**EDM, "training_seed": len(recipe)})
    assert trained == ["edm", recipe]
    again = build(recipe=recipe, teacher={**EDM, "training_seed": len(recipe)}, nfe=2, select={"last_step": 4})
    assert trained == ["edm", recipe]
    assert (again.trajectory.path, again.steps) == (objective.trajectory.path, (2, 4))


@pytest.mark.parametrize(
    "change",
    [{"training_seed": 1}, {"training_steps": 8}, {"checkpoint_every": 3}, {"recipe_settings": {"batch_size": 5}}],
)
def test_other_training_is_another_trajectory(change: dict[str, Any]) -> None:
    assert MODULE.place(settings(**change), Path()) != MODULE.place(settings(), Path())


def test_another_teacher_is_another_trajectory() -> None:
    places = {
        MODULE.place(settings(recipe="cd", teacher={**EDM, "training_steps": steps}), Path()) for steps in (4, 6, 6)
    }
    assert len(places) == 2


def settings(**changes: Any) -> Any:
    return MODULE.Settings(**{**trained_objectives.TINY, **SMALL, **changes})


def test_an_interrupted_training_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build()
    monkeypatch.setenv("LCSC_CACHE", str(tmp_path))
    stop = preparing._write_average

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(preparing, "_write_average", killed)
    with pytest.raises(KeyboardInterrupt):
        build()
    monkeypatch.setattr(preparing, "_write_average", stop)
    again = build()
    assert again([0.2, 0.3, 0.5]) == whole([0.2, 0.3, 0.5])


def test_the_same_weights_are_trained_on_any_number_of_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sha256, threads = build().trajectory.sha256, torch.get_num_threads()
    monkeypatch.setenv("LCSC_CACHE", str(tmp_path))
    torch.set_num_threads(4)
    try:
        assert build().trajectory.sha256 == sha256
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(threads)


def test_what_a_training_left_before_its_first_state_is_no_hindrance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LCSC_CACHE", str(tmp_path))
    path = MODULE.place(settings(), tmp_path)
    MODULE.beside(path, ".model").mkdir(parents=True)
    (MODULE.beside(path, ".model") / "training.json").write_text("{")
    assert build().steps == (2, 4, 6)


def test_seconds_of_training_are_those_of_the_curve_up_to_the_last_selected_checkpoint(tmp_path: Path) -> None:
    chosen = {**trained_objectives.TINY, **SMALL}
    assert MODULE.training_seconds(chosen, tmp_path) is None
    curve = MODULE.beside(MODULE.place(settings(), tmp_path), ".jsonl")
    curve.write_text("".join(json.dumps({"step": step, "loss": 1, "seconds": step / 2}) + "\n" for step in (2, 4, 6)))
    assert MODULE.training_seconds(chosen, tmp_path) == 3
    assert MODULE.training_seconds({**chosen, "select": {"last_step": 5}}, tmp_path) == 2


def test_judges_may_be_named() -> None:
    objective = build(held_out_metrics=["is", "precision", "recall"])
    reported = objective.evaluate(Candidate(np.array([0.2, 0.3, 0.5]), noise=HELD_OUT))
    assert list(reported.metrics) == ["fid", "is", "precision", "recall", "fid@cross_check"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"recipe": "ctt"}, TrainingError, "ctt: no such recipe"),
        ({"recipe": "slct"}, TrainingError, "slct: is of latents"),
        ({"recipe": "cd"}, TrainingError, "teacher: cd needs a model"),
        ({"teacher": EDM}, TrainingError, "teacher: ct needs no model"),
        ({"recipe": "cd", "teacher": {"recipe": "ect"}}, TrainingError, "teacher: ect needs a model before it"),
        ({"recipe": "cd", "teacher": {"recipe": "edn"}}, TrainingError, "edn: no such recipe"),
        ({"recipe_settings": {"sigma_mx": 3}}, StudySpecError, "sigma_mx: unknown key"),
        ({"select": {"last_step": 2}}, TrajectoryError, "last_step 2 leaves 1 of 3"),
        ({"data": "half"}, StudySpecError, "data"),
        ({"nfe": 0}, StudySpecError, "nfe"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(
    change: dict[str, Any], error: type[LcscError], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LCSC_CACHE", str(tmp_path / "empty"))
    with pytest.raises(error, match=message):
        build(**change)
    assert not (tmp_path / "empty").exists()
