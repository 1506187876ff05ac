"""Objectives over bundled images: ``trained``, of models that ``lcsc train`` trained, and ``mnist``, which ships."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from lcsc_opt.base.catalog import load_file
from lcsc_opt.base.errors import LcscError, MetricError, ObjectiveError, StudySpecError, TrajectoryError
from lcsc_opt.base.paths import BuildContext
from lcsc_opt.base.records import HELD_OUT, SEARCH, Candidate, Noise
from lcsc_opt.base.study_spec import ObjectiveSpec
from lcsc_opt.coefficients.profiles import ema_coefficients, power_ema_coefficients
from lcsc_opt.metrics import FrechetReference, Reference, extract
from lcsc_opt.metrics.bundled_images import bundled_images
from lcsc_opt.metrics.extractors.bundled import feature_network
from lcsc_opt.objective.loading import load_objective
from lcsc_opt.objective.merge_sample_score import MergeSampleScore
from lcsc_opt.sampling import ImageNoise
from lcsc_opt.sampling.consistency import ConsistencyFunction
from lcsc_opt.training import preparing
from lcsc_opt.training.trainer import Training
from lcsc_opt.trajectory import Trajectory
from objectives.weights import train as training_of_weights
from tests.unet_examples import unet

ROOT = Path(__file__).parents[2]
TINY = {"images": 70, "batch_size": 32}
FIRST, LAST = np.array([0.5, -0.5, 1.0]), np.array([0.0, 0.0, 1.0])
MODULE = load_file(ROOT / "objectives" / "trained.py")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trajectory of three checkpoints of a consistency model, and one of a diffusion model."""
    folder = tmp_path_factory.mktemp("models")
    unet(0).save_config(folder / "tiny")
    for name, recipe in (("digits", "ict"), ("digits_ddpm", "ddpm")):
        AcceleratorState._reset_state(reset_partial_state=True)
        preparing.run(
            Training(
                recipe=preparing.parse_recipe(recipe, {"batch_size": 4}),
                data="digits",
                out=folder / f"{name}.trajectory",
                steps=6,
                checkpoint_every=2,
                network=folder / "tiny",
            )
        )
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


@pytest.fixture
def build(models: Path) -> Any:
    def built(name: str, /, **changes: Any) -> MergeSampleScore:
        settings = {"checkpoints": f"{name}.trajectory", **TINY, **changes}
        objective = load_objective(ObjectiveSpec(file="trained.py", settings=settings), BuildContext(models))
        assert isinstance(objective, MergeSampleScore)
        return objective

    return built


def fid(features: Any, mean: Any, cov: Any) -> float:
    return FrechetReference(features.mean(0), np.cov(features, rowvar=False)).distance(mean, cov)


def test_it_is_an_objective_whose_loss_is_fid_against_the_real_images(build: Any) -> None:
    objective, coefficients = build("digits", loss="fid"), ema_coefficients((2, 4, 6), 0.7)
    assert objective.steps == (2, 4, 6)
    assert objective.sampler.nfe == 1
    first = objective.evaluate(Candidate(coefficients))
    assert first.metrics == {"fid": first.loss}
    assert (first.cost.images, first.cost.model_calls) == (70, 70 * objective.sampler.nfe)
    assert build("digits", loss="fid", batch_size=7)(coefficients) == pytest.approx(first.loss, rel=1e-4)
    other = objective.evaluate(Candidate(coefficients[::-1].copy())).loss
    held_out = objective.evaluate(Candidate(coefficients, noise=HELD_OUT)).loss
    assert objective.evaluate(Candidate(coefficients)).loss == first.loss
    assert len({first.loss, other, held_out}) == 3
    assert objective.describe() == json.loads(json.dumps(objective.describe()))
    sampled = objective.features(objective.images(coefficients, SEARCH, 70))
    real = objective.features(bundled_images("digits")[0])
    assert first.loss == pytest.approx(fid(sampled, real.mean(0), np.cov(real, rowvar=False)), rel=1e-4)


def test_the_default_loss_is_relative_to_one_average_whatever_is_evaluated_first(build: Any) -> None:
    average, other = power_ema_coefficients((2, 4, 6), 0.10), ema_coefficients((2, 4, 6), 0.7)
    first, again = build("digits"), build("digits")
    described = first.describe()
    assert first(average) == pytest.approx(1.0)
    assert first.fixed_average.tolist() == average.tolist()
    measured = again.evaluate(Candidate(average))
    units = measured.metrics
    found = again.evaluate(Candidate(other, yardstick=again.yardstick(measured)))
    assert first(other) == found.loss
    ratios = [found.metrics[name] / units[name] for name in ("fid", "fid@pixels", "tones")]
    assert found.loss == pytest.approx(sum(ratios) / 3)
    assert first.describe() == again.describe() == described


def test_a_network_that_no_search_looks_at_sees_what_is_reported(build: Any) -> None:
    objective, coefficients = build("digits", loss="fid"), ema_coefficients((2, 4, 6), 0.7)
    described = [objective.describe(), objective.describe_reports()]
    assert "cross_check" not in json.dumps(described)
    reported = objective.evaluate(Candidate(coefficients, noise=HELD_OUT))
    assert list(reported.metrics) == ["fid", "fid@cross_check", "precision", "recall", "outside"]
    assert list(objective.evaluate(Candidate(coefficients, noise=Noise("gradient", 3))).metrics) == ["fid"]
    assert [objective.describe(), objective.describe_reports()] == described
    assert objective.reported_metrics().cross_check_text == (
        "fid@cross_check: a second network trained on digits; what is certainly worse there is not the answer"
    )
    assert objective.reported_metrics().judges == ("fid@cross_check",)
    of_fdr = build("digits").reported_metrics().judges
    assert of_fdr == ("fid@cross_check", "fid"), "fdr can fall by pixels and tones alone"
    second = feature_network("digits", second=True)
    features = extract(second, objective.images(coefficients, HELD_OUT, 70), batch_size=70)
    real = Reference.of_images(second, bundled_images("digits")[0]).frechet
    assert reported.metrics["fid@cross_check"] == pytest.approx(fid(features, real.mean, real.cov), rel=1e-4)


def test_named_metrics_and_the_second_network_are_reported_and_nothing_if_none_is_wanted(
    tmp_path: Path, monkeypatch: Any, build: Any
) -> None:
    (tmp_path / "own_reward.py").write_text("def bright(images):\n    return images.mean((1, 2, 3))\n")
    monkeypatch.syspath_prepend(tmp_path)
    reward = {"reward": "own_reward:bright"}

    def reported(**settings: Any) -> list[str]:
        objective = build("digits", **{"loss": "fid", **settings})
        return list(objective.evaluate(Candidate(ema_coefficients((2, 4, 6), 0.7), noise=HELD_OUT)).metrics)

    assert reported(held_out_metrics=[]) == ["fid", "outside"]
    assert reported(held_out_metrics=[], **reward) == ["fid", "reward", "outside"]
    assert reported(held_out_metrics=["recall"]) == ["fid", "recall", "fid@cross_check", "outside"]
    searched = reported(held_out_metrics=[], loss={"fid": 1, "reward": -1}, **reward)
    assert {"recall", "fid@cross_check"} <= set(searched)


def test_searches_of_mnist_see_one_quarter_and_reports_another() -> None:
    objective = load_file(ROOT / "objectives" / "mnist.py").build({**TINY, "nfe": 2, "loss": "fid"})
    digits = bundled_images("mnist")[0]
    last = np.eye(len(objective.steps))[-1]
    searched = Reference.of_images(objective.scores.extractor, digits[2_500:3_750]).frechet
    held_out = Reference.of_images(objective.scores.extractor, digits[3_750:][::2]).frechet
    sampled = objective.features(objective.images(last, SEARCH, 70))
    assert objective(last) == pytest.approx(fid(sampled, searched.mean, searched.cov), rel=1e-4)
    unseen = objective.evaluate(Candidate(last, error=True)).unseen
    assert unseen == pytest.approx(fid(sampled, held_out.mean, held_out.cov), rel=1e-4)
    assert objective.evaluate(Candidate(last)).unseen is None
    assert "fid_held_out" in objective.evaluate(Candidate(last, noise=HELD_OUT)).metrics


def test_one_step_of_a_consistency_model_is_its_function_of_noise(build: Any) -> None:
    objective = build("digits", nfe=1)
    found = objective.images(FIRST, HELD_OUT, 5)  # which loads the weights
    network = objective.sampler.weights.trained  # type: ignore[attr-defined]
    noise = ImageNoise(0, (1, 8, 8)).batch(HELD_OUT, 0, 5)
    with torch.no_grad():
        expected = ConsistencyFunction(network)(20.0 * noise, torch.full((5,), 20.0)).clamp(-1, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


# which model, and what is refused


def test_a_selection_is_as_if_training_had_ended_there(build: Any) -> None:
    assert build("digits", select={"last_step": 4}).steps == (2, 4)


def test_settings_replace_the_record_of_the_training(build: Any, models: Path) -> None:
    assert build("digits_ddpm", loss="fid").sampler.nfe == 10
    assert build("digits_ddpm", loss="fid", nfe=3).sampler.nfe == 3
    record = models / "digits_ddpm.model" / "training.json"
    written = record.read_text()
    record.unlink()
    try:
        with pytest.raises(ObjectiveError, match="dataset: expected one of digits, photographs, mnist, got None"):
            build("digits_ddpm")
        with pytest.raises(ObjectiveError, match=r"nfe: digits_ddpm\.trajectory has no record of its training"):
            build("digits_ddpm", dataset="digits")
        assert build("digits_ddpm", loss="fid", dataset="digits", nfe=2).sampler.nfe == 2
    finally:
        record.write_text(written)


@pytest.mark.parametrize("name", MODULE.COMMANDS)
def test_a_missing_trajectory_is_refused_with_the_command_that_trains_it(name: str, tmp_path: Path) -> None:
    spec = ObjectiveSpec(file="trained.py", settings={"checkpoints": f"models/{name}.trajectory"})
    with pytest.raises(ObjectiveError) as refused:
        load_objective(spec, BuildContext(tmp_path))
    assert str(refused.value).endswith(f"does not exist; train it first: {MODULE.COMMANDS[name]}")


@pytest.mark.parametrize(
    "path", [*ROOT.glob("studies/*.yaml"), *ROOT.glob("studies/paper/*.yaml")], ids=lambda p: p.stem
)
def test_a_study_file_begins_with_the_commands_that_train_its_models(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.startswith("# lcsc train "))
    named = re.findall(r"models/(\w+)\.trajectory", text)
    for of_loop in re.findall("# for model in (.*?);", text):
        named += of_loop.split()
    needed = [name for name in MODULE.COMMANDS if name in named]
    if "cd" in needed:
        needed = ["edm", *needed]
    assert lines[: len(needed)] == [f"# {MODULE.COMMANDS[name]}" for name in needed]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"reward": "clip_score"}, MetricError, "reward: expected 'module:function', got 'clip_score'"),
        ({"select": {"window": 1}}, TrajectoryError, "window 1 leaves 1 of 3 checkpoints"),
        ({"images": 64}, StudySpecError, "objective.settings: images"),
        ({"loss": {"reward": -1, "fid": 1}}, MetricError, "reward is a metric here, so give reward: module:function"),
        ({"keep": "recal"}, MetricError, "keep: 'recal' cannot be kept"),
        ({"keep": {"precision": 70}}, MetricError, "keep: {'precision': 70.0} cannot be kept"),
        ({"metrics": ["kid@clip"]}, MetricError, "kid@clip: these images have features of one network only"),
    ],
)
def test_settings_that_do_not_fit(change: dict[str, Any], error: type[LcscError], message: str, build: Any) -> None:
    with pytest.raises(error, match=message):
        build("digits", **change)


def test_the_shipped_model_can_be_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_of_weights, "STEPS", 2)
    monkeypatch.setattr(training_of_weights, "EVERY", 1)
    training_of_weights.train(tmp_path / "mnist.trajectory")
    trajectory = Trajectory.open(tmp_path / "mnist.trajectory")
    trajectory.verify()
    assert trajectory.steps == (1, 2)
    assert trajectory.trainer_ema() is not None
