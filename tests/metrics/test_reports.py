"""Metrics of held-out reports: which, against what, built when, and what held-out real images would have."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor

from lcsc_opt.metrics import FrechetReference, Loss, MetricSuite, Reference, SuiteMetrics
from lcsc_opt.metrics.extractors.by_name import PUBLISHED
from lcsc_opt.metrics.extractors.published import ClipExtractor
from tests.metrics import network_files
from tests.metrics.examples import (
    Doubled,
    Pixels,
    both,
    build_scores,
    images,
    mean_and_covariance,
    pixels,
    reference,
    score,
    suite,
    write_folder,
)

REAL = pixels(30, 8, 8)
DEFAULT = ["precision", "recall"]


class Colors(Pixels):
    """A user's own extractor of colours: no network that ships has the like."""

    def __call__(self, batch: Tensor) -> Tensor:
        return batch.flatten(1)[:, :16]


def direct_fid(x: Any, y: Any) -> float:
    return FrechetReference(*mean_and_covariance(x)).distance(*mean_and_covariance(y))


def flat(count: int, seed: int) -> Any:
    return images(count, seed).flatten(1).double().numpy()


def builder() -> Mock:
    """Builds references for reports."""
    return Mock(return_value={"cross_check": reference(Doubled())})


def reported(real: Reference, **changes: Any) -> MetricSuite:
    return suite({"inception": real}, report_references=lambda: {"inception": real}, **changes)


def names(scores: MetricSuite) -> list[str]:
    return [str(metric) for metric in scores.evaluation_metrics]


def test_other_features_are_built_and_computed_for_reports_only() -> None:
    build = builder()
    scores = suite({"inception": reference()}, report_references=build)
    described, (loss, metrics) = (scores.describe(), scores.describe_reports()), score(scores)
    assert (metrics, build.call_count) == ({"fid": loss}, 0)
    for _ in range(2):
        found, measured = score(scores, held_out=True)
    assert (found, list(measured), build.call_count) == (loss, ["fid", "fid@cross_check", "outside"], 1)
    expected = direct_fid(2 * flat(40, 0)[:, ::-1], 2 * flat(60, 9)[:, ::-1])
    assert measured["fid@cross_check"] == pytest.approx(expected, rel=1e-6)
    assert score(scores)[1] == metrics, "a search does not compute it afterwards either"
    assert (scores.describe(), scores.describe_reports()) == described, "it is no part of the study"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"held_out_metrics": ["kid@m:f"]}, "kid@m:f"),
        ({"held_out_metrics": ["kid@m:f", "fid@m:f"]}, "fid@m:f"),
        ({"metrics": ["fid@m:f"]}, "fid@m:f"),
        ({"loss": "fid@m:f", "metrics": ["fid"]}, "fid"),
        ({"held_out_metrics": ["recall@m:f", "kid"]}, "fid@cross_check"),  # no distance in other features
        ({"loss": {"fid": 1, "fid@m:f": 1}}, "fid@cross_check"),
    ],
)
def test_a_distance_that_was_asked_for_comes_first(settings: dict[str, Any], expected: str) -> None:
    build = builder()
    scores = both(**{"loss": "fid", **settings}, report_references=build)
    assert str(scores.cross_check_metric) == expected
    assert build.call_count == (expected == "fid@cross_check")
    assert expected in score(scores, held_out=True)[1]


def test_the_loss_alone_is_no_further_metric_but_the_terms_of_a_sum_are() -> None:
    made = reported(reference(), loss={"fid": 1, "near": 2}, held_out_metrics=["kid"])
    assert names(made) == ["fid", "near", "kid", "precision", "recall", "outside"], "a sum says less"
    kept = names(reported(reference(), keep="precision"))
    assert kept == ["fid", "precision", "hinge", *DEFAULT[1:], "outside"], "a loss with a penalty says less"


def test_mean_and_covariance_or_three_images_have_none() -> None:
    lean = dataclasses.replace(reference(), features=None)
    assert list(score(reported(lean), held_out=True)[1]) == ["fid", "outside"]
    three = score(reported(reference(count=3)), held_out=True)[1]
    assert list(three) == ["fid", "outside"], "no third neighbour, and no two covariances"


def test_held_out_images_are_compared_with_and_have_values_of_their_own() -> None:
    found = reported(dataclasses.replace(reference(count=80, seed=1), held_out=reference(count=40, seed=3)))
    assert names(found) == [*DEFAULT, "fid_held_out", "outside"]
    values, real_values = score(found, images(50, 2), held_out=True)[1], found.real_halves()
    real, other, own = flat(80, 1), flat(40, 3), flat(50, 2)
    assert values["fid_held_out"] == pytest.approx(direct_fid(own, other), rel=1e-4)
    assert real_values["fid_held_out"] == pytest.approx(direct_fid(real, other), rel=1e-4)
    assert real_values.keys() == found.signs.keys() - {"outside"}
    few = reported(dataclasses.replace(reference(), held_out=reference(count=3, seed=3)))
    assert few.real_halves() == {}


@pytest.mark.parametrize(
    ("loss", "keep", "expected"),
    [
        ("fid", None, "clip"),
        ("fid", "precision@clip", "dinov2"),  # a metric that is kept decides, too
        ("fid@clip", None, "inception"),
        ("fid@digits", None, "digits2"),
        ("fid@digits2", None, "cross_check"),
    ],
)
def test_the_default_cross_check_is_in_features_that_decide_nothing(loss: str, keep: str | None, expected: str) -> None:
    parsed = Loss.parse(loss, keep)
    assert SuiteMetrics.of(parsed, held_out_metrics=None, rewards=["reward"]).default_cross_check == expected
    assert SuiteMetrics.of(parsed, rewards=["reward"]).default_cross_check is None


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("clip") / "ViT-B-32.pt"
    network_files.write_clip(path)
    return str(path)


@pytest.fixture
def settings(tmp_path: Any, archive: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A folder of images for CLIP, features for what stands for Inception, and numbers without images."""
    monkeypatch.setitem(PUBLISHED, "inception", Mock(side_effect=lambda *_, **__: Colors()))
    write_folder(tmp_path / "real", REAL)
    np.savez(tmp_path / "fid.npz", mu=np.zeros(16), sigma=np.eye(16))
    monkeypatch.chdir(tmp_path)
    return {"reference": "real", "weights": {"clip": archive}, "cache": tmp_path / "cache", "held_out_metrics": None}


@pytest.mark.parametrize("reference", ["real", {"inception": "fid.npz", "clip": "real"}], ids=str)
def test_clip_sees_the_reference_images(settings: dict[str, Any], archive: str, reference: Any) -> None:
    scores = build_scores(**{**settings, "reference": reference})
    described = scores.describe()
    assert str(scores.cross_check_metric) == "fid@clip"
    assert scores.cross_check_text is not None
    assert scores.cross_check_text.startswith("fid@clip: features that the loss does not use")
    assert scores.describe() == described
    features = ClipExtractor(archive)(torch.from_numpy(REAL).permute(0, 3, 1, 2) / 127.5 - 1).double().numpy()  # type: ignore[arg-type]
    np.testing.assert_allclose(scores.references["clip"].frechet.mean, features.mean(0), atol=1e-5)
    np.testing.assert_allclose(scores.references["clip"].frechet.cov, np.cov(features.T), atol=1e-5)


@pytest.mark.parametrize("named", [{"held_out_metrics": ["fid_held_out"]}, {}], ids=["named", "by default"])
@pytest.mark.usefixtures("few_unseen")
def test_real_images_may_be_held_out_from_statistics(settings: dict[str, Any], named: dict[str, Any]) -> None:
    """Distances to held-out images need no features of those that the loss sees."""
    reference = {"train": "fid.npz", "held_out": "real"}
    scores = build_scores(**{**settings, "reference": reference, "loss": "fid", **named})
    samples = torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    _, values = score(scores, samples, held_out=True)
    unseen = scores.references["inception"].unseen.known_features
    assert len(unseen) < len(REAL), "the others choose the answer"
    expected = FrechetReference(*mean_and_covariance(unseen)).distance_from_features(samples.flatten(1)[:, :16])
    assert values["fid_held_out"] == pytest.approx(expected, rel=1e-6)


def test_what_is_missing_for_other_features_is_one_line(settings: Any, capsys: pytest.CaptureFixture[str]) -> None:
    scores = build_scores(**{**settings, "reference": {"inception": "fid.npz"}})
    assert (scores.cross_check_metric, scores.cross_check_text) == (None, None)
    line = capsys.readouterr().err.splitlines()[-1]
    assert "no cross-check: fid" in line
    assert "clip needs real images; give them under reference: {clip: a folder" in line


def test_a_report_goes_on_without_a_cross_check_that_cannot_be_computed(
    settings: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.nn.Module, "to", Mock(side_effect=torch.OutOfMemoryError("no memory")))
    grey = write_folder(Path("grey"), REAL[..., 0])
    scores = build_scores(**{**settings, "loss": f"fid@{__name__}:Colors", "reference": str(grey), "weights": {}})
    assert scores.cross_check_metric is None
    [line] = [line for line in capsys.readouterr().err.splitlines() if "cross-check" in line]
    assert line.endswith("cannot be measured: no memory")


def test_where_the_features_that_stand_in_cannot_be_made_either_there_is_no_cross_check(
    settings: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """It was said that they take the place, and the run ended with their error."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "hub")
    monkeypatch.setattr(torch.hub, "download_url_to_file", Mock(side_effect=OSError("Network is unreachable")))
    monkeypatch.setattr(torch.nn.Module, "to", Mock(side_effect=torch.OutOfMemoryError("no memory")))
    grey = write_folder(Path("grey"), REAL[..., 0])
    scores = build_scores(**{**settings, "loss": "fid", "reference": str(grey), "weights": {}})
    assert scores.cross_check_metric is None
    first, second = [line for line in capsys.readouterr().err.splitlines() if "cross-check" in line]
    assert first.endswith("fid@cross_check takes its place")
    assert second.endswith("cannot be measured: no memory")


@pytest.mark.parametrize(
    ("loss", "weights", "missing", "reason"),
    [
        ("fid", {}, "fid@clip", "Network is unreachable"),
        ({"fid": 1, "fid@clip": 1}, {"clip": "ViT-B-32.pt", "dinov2": "real"}, "fid@dinov2", "pip install"),
    ],
)
def test_where_no_published_network_can_be_had_bundled_or_random_features_stand_in(
    settings: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any, loss: Any, weights: Any, missing: str, reason: str
) -> None:
    Path("ViT-B-32.pt").symlink_to(settings["weights"]["clip"])
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "hub")
    monkeypatch.setattr(torch.hub, "download_url_to_file", Mock(side_effect=OSError("Network is unreachable")))
    monkeypatch.setitem(sys.modules, "transformers", None)  # it comes with another extra
    scores = build_scores(**{**settings, "loss": loss, "weights": weights})
    assert scores.cross_check_text == (
        "fid@cross_check: convolutions with random weights, since no bundled network is trained on such images; "
        "what is certainly worse there is not the answer"
    )
    [line] = [line for line in capsys.readouterr().err.splitlines() if "cross-check" in line]
    assert missing in line
    assert reason in line
    assert "fid@cross_check takes its place" in line
    assert scores.judges == ["fid@cross_check"], "the loss looks at no pixels itself"


@pytest.mark.parametrize(
    ("loss", "judges"),
    [
        ("fdr", ["fid"]),
        ({"fdr": ["pixels", "tones"]}, ["fid@cross_check"]),
        ("fid@pixels", ["fid@cross_check"]),
    ],
)
def test_random_convolutions_refuse_nothing_where_the_loss_looks_at_a_network_and_at_pixels(
    settings: Any, monkeypatch: pytest.MonkeyPatch, loss: Any, judges: list[str]
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "hub")
    monkeypatch.setattr(torch.hub, "download_url_to_file", Mock(side_effect=OSError("Network is unreachable")))
    scores = build_scores(**{**settings, "loss": loss, "weights": {}})
    assert str(scores.cross_check_metric) == "fid@cross_check"
    assert scores.judges == judges
    refuses = "fid@cross_check" in judges
    assert ("refuses nothing" in (scores.cross_check_text or "")) != refuses
