"""Objectives that train their own model: ``digits``, ``digits_ddpm``, ``photographs``, and any recipe."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lcsc_opt.base.catalog import load_file
from lcsc_opt.base.errors import LcscError, MetricError, StudySpecError, TrainingError, TrajectoryError
from lcsc_opt.base.records import HELD_OUT, SEARCH, Candidate, Noise
from lcsc_opt.base.study_file import ObjectiveSpec
from lcsc_opt.coefficients.profiles import ema_coefficients, power_ema_coefficients
from lcsc_opt.metrics import FrechetReference, Reference, extract
from lcsc_opt.metrics.bundled_images import Bundled, bundled_images, drawn_characters
from lcsc_opt.metrics.extractors import bundled
from lcsc_opt.metrics.extractors.bundled import feature_network
from lcsc_opt.objective import small_images
from lcsc_opt.objective.loading import check_objective
from lcsc_opt.objective.merge_sample_score import MergeSampleScore
from lcsc_opt.sampling import DiffusersFolder, ImageNoise
from lcsc_opt.sampling.consistency import ConsistencyFunction
from lcsc_opt.training import preparing
from lcsc_opt.training.models import Model
from lcsc_opt.training.recipes.consistency import Ct

ROOT = Path(__file__).parents[2]
TINY = {"images": 70, "batch_size": 32, "training_steps": 6, "checkpoint_every": 2}
CT = {**TINY, "recipe": "ct", "recipe_settings": {"batch_size": 4}}
EDM = {"recipe": "edm", "recipe_settings": {"batch_size": 4}, "training_steps": 4, "checkpoint_every": 2}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "digits": ("digits", {**TINY, "nfe": 2}),
    "digits_ddpm": ("digits_ddpm", {**TINY, "nfe": 4}),
    "photographs": ("photographs", TINY),
    "characters": ("characters", {**TINY, "nfe": 2}),
    "ct": ("trained", {**CT, "nfe": 2}),
}
OWN = ["digits", "digits_ddpm", "photographs", "characters"]
FIRST, LAST = np.array([0.5, -0.5, 1.0]), np.array([0.0, 0.0, 1.0])
MODULE = load_file(ROOT / "objectives" / "trained.py")
CROPS, PARTS = bundled_images("photographs")
LETTERS = torch.from_numpy(drawn_characters(list("ABCDEFGHIJ" * 30), np.random.default_rng(0))).float()[:, None]
FEW = {
    "digits": bundled_images("digits"),
    "photographs": (CROPS[::8].clone(), PARTS[::8].clone()),
    "characters": (LETTERS, torch.arange(300) % 10),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def use_cache(cache: Path, networks_train_briefly: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (bundled, small_images):
        monkeypatch.setattr(module, "bundled_images", FEW.__getitem__)
    monkeypatch.setenv("LCSC_CACHE", str(cache))


def build(name: str, /, **changes: Any) -> MergeSampleScore:
    file, settings = KINDS[name]
    objective = load_file(ROOT / "objectives" / f"{file}.py").build({**settings, **changes})
    assert isinstance(objective, MergeSampleScore)
    return objective


def dataset(name: str) -> Bundled:
    return name if name in ("photographs", "characters") else "digits"  # type: ignore[return-value]


def fid(features: Any, mean: Any, cov: Any) -> float:
    return FrechetReference(features.mean(0), np.cov(features, rowvar=False)).distance(mean, cov)


# what all of them do


@pytest.mark.parametrize("name", [name for name in KINDS if name != "characters"])  # for which: the test of parts
def test_it_is_an_objective_whose_loss_is_fid_against_the_real_images(name: str) -> None:
    objective, coefficients = build(name, loss="fid"), ema_coefficients((2, 4, 6), 0.7)
    assert objective.steps == (2, 4, 6)
    assert objective.sampler.nfe == KINDS[name][1].get("nfe", 1)
    first = objective.evaluate(Candidate(coefficients))
    assert first.metrics == {"fid": first.loss}
    assert (first.cost.images, first.cost.model_calls) == (70, 70 * objective.sampler.nfe)
    assert build(name, loss="fid", batch_size=7)(coefficients) == pytest.approx(first.loss, rel=1e-4)
    other = objective.evaluate(Candidate(coefficients[::-1].copy())).loss
    held_out = objective.evaluate(Candidate(coefficients, noise=HELD_OUT)).loss
    assert objective.evaluate(Candidate(coefficients)).loss == first.loss
    assert len({first.loss, other, held_out}) == 3
    assert objective.describe() == json.loads(json.dumps(objective.describe()))
    sampled = objective.features(objective.images(coefficients, SEARCH, 70))
    real = objective.features(FEW[dataset(name)][0])
    assert first.loss == pytest.approx(fid(sampled, real.mean(0), np.cov(real, rowvar=False)), rel=1e-4)


def test_the_default_loss_is_relative_to_one_average_whatever_is_evaluated_first() -> None:
    average, other = power_ema_coefficients((2, 4, 6), 0.10), ema_coefficients((2, 4, 6), 0.7)
    first, again = build("digits"), build("digits")
    assert first(average) == pytest.approx(1.0)
    found = again.evaluate(Candidate(other))
    assert first(other) == found.loss
    units = first.evaluate(Candidate(average)).metrics
    ratios = [found.metrics[name] / units[name] for name in ("fid", "fid@pixels")]
    assert found.loss == pytest.approx(sum(ratios) / 2)
    assert first.describe() == again.describe() == build("digits").describe()


def test_a_network_that_no_search_looks_at_sees_what_is_reported() -> None:
    objective, coefficients = build(name := "digits_ddpm", loss="fid"), ema_coefficients((2, 4, 6), 0.7)
    described = objective.describe()
    assert "cross_check" not in json.dumps(described)
    reported = objective.evaluate(Candidate(coefficients, noise=HELD_OUT))
    assert list(reported.metrics) == ["fid", "fid@cross_check", "precision", "recall", "outside"]
    assert list(objective.evaluate(Candidate(coefficients, noise=Noise("gradient", 3))).metrics) == ["fid"]
    assert objective.describe() == described
    second = feature_network(dataset(name), second=True)
    features = extract(second, objective.images(coefficients, HELD_OUT, 70), batch_size=70)
    real = Reference.of_images(second, FEW[dataset(name)][0]).frechet
    assert reported.metrics["fid@cross_check"] == pytest.approx(fid(features, real.mean, real.cov), rel=1e-4)


def test_named_metrics_and_the_second_network_are_reported_and_nothing_if_none_is_wanted(
    tmp_path: Path, monkeypatch: Any
) -> None:
    (tmp_path / "own_reward.py").write_text("def bright(images):\n    return images.mean((1, 2, 3))\n")
    monkeypatch.syspath_prepend(tmp_path)
    reward = {"reward": "own_reward:bright"}

    def reported(**settings: Any) -> list[str]:
        objective = build("digits_ddpm", **{"loss": "fid", **settings})
        return list(objective.evaluate(Candidate(ema_coefficients((2, 4, 6), 0.7), noise=HELD_OUT)).metrics)

    assert reported(held_out_metrics=[]) == ["fid", "outside"]
    assert reported(held_out_metrics=[], **reward) == ["fid", "reward", "outside"]
    assert reported(held_out_metrics=["recall"]) == ["fid", "recall", "fid@cross_check", "outside"]
    searched = reported(held_out_metrics=[], loss={"fid": 1, "reward": -1}, **reward)
    assert {"recall", "fid@cross_check"} <= set(searched)


@pytest.mark.parametrize(
    ("name", "data", "searched", "kept"),
    [
        ("digits", "half", slice(0, None, 2), slice(1, None, 2)),
        ("characters", "thirds", slice(1, None, 3), slice(2, None, 3)),
    ],
)
def test_a_part_of_the_images_is_kept_for_reports(name: str, data: str, searched: slice, kept: slice) -> None:
    part, real = build(name, loss="fid", data=data), FEW[dataset(name)][0]
    assert part.trajectory.path.stem.endswith(f"-{data}")
    seen = Reference.of_images(part.scores.extractor, real[searched]).frechet
    sampled = part.features(part.images(LAST, SEARCH, 70))
    assert part(LAST) == pytest.approx(fid(sampled, seen.mean, seen.cov), rel=1e-4)
    other = Reference.of_images(part.scores.extractor, real[kept]).frechet
    assert part.evaluate(Candidate(LAST)).unseen == pytest.approx(fid(sampled, other.mean, other.cov), rel=1e-4)
    assert part.evaluate(Candidate(LAST), gradient=True).unseen is None
    assert "fid_held_out" in part.evaluate(Candidate(LAST, noise=HELD_OUT)).metrics


def test_nothing_is_trained_on_the_characters_that_searches_and_reports_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LCSC_CACHE", str(tmp_path))
    seen = (LETTERS.clone(), FEW["characters"][1])
    seen[0][1::3] = seen[0][2::3] = torch.nan
    for module in (bundled, small_images):
        monkeypatch.setattr(module, "bundled_images", lambda _: seen)
    assert all(weight.isfinite().all() for weight in feature_network("characters").parameters())
    with pytest.raises(MetricError, match="finite"):  # of the reference; the training went well
        build("characters", data="thirds")
    assert len(list(tmp_path.glob("characters-*.trajectory"))) == 1


@pytest.mark.parametrize(("name", "sigma"), [("digits", 20.0), ("photographs", 80.0), ("ct", 20.0)])
def test_one_step_of_a_consistency_model_is_its_function_of_noise(name: str, sigma: float) -> None:
    objective = build(name, nfe=1)
    found = objective.images(FIRST, HELD_OUT, 5)  # which loads the weights
    network = objective.sampler.weights.trained  # type: ignore[attr-defined]
    noise = ImageNoise(0).batch(HELD_OUT, 0, 5, CROPS.shape[1:] if name == "photographs" else (1, 8, 8))
    with torch.no_grad():
        expected = ConsistencyFunction(network)(sigma * noise, torch.full((5,), sigma)).clamp(-1, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


# which model is trained


def test_the_seed_alone_decides_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sha256, threads = build("digits_ddpm").trajectory.sha256, torch.get_num_threads()
    monkeypatch.setenv("LCSC_CACHE", str(tmp_path))
    torch.set_num_threads(4)
    with torch.no_grad():
        again = build("digits_ddpm")
    assert torch.get_num_threads() == 4
    torch.set_num_threads(threads)
    assert again.trajectory.sha256 == sha256
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("name", "kind", "method", "calls"),
    [("ct", Ct, "loss", 3), ("ct", Model, "write_weights", 0)],
)
def test_a_training_that_was_killed_comes_to_the_same_weights(
    name: str, kind: type, method: str, calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, run, made = build(name)([0.2, 0.3, 0.5]), getattr(kind, method), itertools.count()
    monkeypatch.setenv("LCSC_CACHE", str(tmp_path))

    def killed(*given: Any) -> Any:
        if next(made) == calls:
            raise KeyboardInterrupt
        return run(*given)

    with monkeypatch.context() as patch:
        patch.setattr(kind, method, killed)
        with pytest.raises(KeyboardInterrupt):
            build(name)
    assert build(name)([0.2, 0.3, 0.5]) == whole


@pytest.mark.parametrize("recipe", ["cd", "ect"])
def test_the_teacher_is_trained_before_and_once(recipe: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, run = [], preparing.run
    monkeypatch.setattr(
        preparing, "run", lambda training, **how: (trained.append(training.recipe.name), run(training, **how))[1]
    )
    teacher = {**EDM, "training_seed": len(recipe)}
    objective = build("ct", recipe=recipe, teacher=teacher)
    again = build("ct", recipe=recipe, teacher=teacher, nfe=1, select={"last_step": 4})
    assert trained == ["edm", recipe]
    assert (again.trajectory.path, again.steps) == (objective.trajectory.path, (2, 4))
    settings = {**CT, "recipe": recipe, "teacher": {**teacher, "training_steps": 6}}
    assert MODULE.place(MODULE.Settings(**settings), cache).name != objective.trajectory.path.name


def test_seconds_of_training_are_those_of_the_curve_up_to_the_last_selected_checkpoint(tmp_path: Path) -> None:
    assert MODULE.training_seconds(CT, tmp_path) is None
    curve = MODULE.sibling_path(MODULE.place(MODULE.Settings(**CT), tmp_path), ".jsonl")
    curve.write_text("".join(json.dumps({"step": step, "loss": 1, "seconds": step / 2}) + "\n" for step in (2, 4, 6)))
    assert MODULE.training_seconds(CT, tmp_path) == 3
    assert MODULE.training_seconds({**CT, "select": {"last_step": 5}}, tmp_path) == 2


# what is refused, before anything is trained


OF_ALL: list[tuple[dict[str, Any], type[LcscError], str]] = [
    ({"training_steps": 3}, TrainingError, "checkpoint_every: .* every 2 steps .* of 3 training_steps; at most 1"),
    ({"reward": "clip_score"}, MetricError, "reward: expected 'module:function', got 'clip_score'"),
    ({"select": {"window": 1}}, TrajectoryError, "window 1 leaves 1 of 3 checkpoints"),
    ({"images": 64}, StudySpecError, "objective.settings: images"),
    ({"loss": {"reward": -1, "fid": 1}}, StudySpecError, "reward is a metric here, so give reward: module:function"),
    ({"keep": "recal"}, MetricError, "keep: 'recal' cannot be kept"),
    ({"keep": {"precision": 70}}, MetricError, "keep: {'precision': 70.0} cannot be kept"),
    ({"metrics": ["kid@clip"]}, MetricError, "kid@clip: these images have features of one network only"),
]
OF_RECIPES: list[tuple[dict[str, Any], type[LcscError], str]] = [
    ({"recipe": "ctt"}, TrainingError, "ctt: no such recipe"),
    ({"recipe": "slct"}, TrainingError, "slct: trains on latents"),
    ({"recipe": "cd"}, TrainingError, "teacher: cd needs a model"),
    (
        {"recipe": "cd", "teacher": {**EDM, "checkpoint_every": 3}},
        TrainingError,
        "checkpoint_every: .* every 3 steps .* of 4 training_steps; at most 2",
    ),
    ({"teacher": EDM}, TrainingError, "teacher: ct needs no model"),
    ({"recipe_settings": {"sigma_mx": 3}}, StudySpecError, "sigma_mx: unknown key"),
]


@pytest.mark.parametrize(
    ("name", "wrong"), [*(("digits", wrong) for wrong in OF_ALL), *(("ct", wrong) for wrong in OF_RECIPES)]
)
def test_settings_that_do_not_fit(name: str, wrong: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("LCSC_CACHE", str(tmp_path / "empty"))
    change, error, message = wrong
    with pytest.raises(error, match=message):
        build(name, **change)
    assert not (tmp_path / "empty").exists()


@pytest.mark.parametrize("name", OWN)
def test_precision_can_be_kept_and_losses_summed(name: str) -> None:
    check_objective(ObjectiveSpec(file=f"{name}.py", settings={"keep": "precision", "loss": {"fid": 1, "near": 6}}))


def test_what_a_training_left_before_its_first_state_is_no_hindrance(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("LCSC_CACHE", str(tmp_path))
    model = MODULE.sibling_path(MODULE.place(MODULE.Settings(**CT), tmp_path), ".model")
    model.mkdir(parents=True)
    (model / "training.json").write_text("{")
    assert DiffusersFolder.read(build("ct").trajectory.path).path == model
