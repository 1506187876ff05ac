"""Default judges: which, against what, and what held-out real images would have."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics import FeatureStatistics, Reference, ReferenceStatistics, Scores, View, frechet_distance
from lcsc_opt.metrics import judges as module
from lcsc_opt.metrics.distances import nearer_share
from lcsc_opt.metrics.judges import few_enough, known_features
from lcsc_opt.metrics.names import MetricName, parse_loss
from lcsc_opt.metrics.scores import CrossCheckSpace

DEFAULT = ["precision", "recall", "sliced", "near"]


class JudgedPixels:
    name, dimension = "judged-pixels", 4

    def __call__(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def images(count: int, seed: int) -> Tensor:
    return torch.rand(count, 1, 2, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def reference(count: int = 80, seed: int = 1, held_out: Reference | None = None) -> Reference:
    features = images(count, seed).flatten(1).numpy()
    statistics = ReferenceStatistics.from_statistics(FeatureStatistics.from_features(features), "judged-pixels")
    return Reference(statistics, f"{count} {seed}", features, held_out=held_out)


def scores(real: Reference, **changes: Any) -> Scores:
    return Scores({"inception": View(JudgedPixels(), real)}, judge_reference=known_features, **changes)


def measured(found: Scores, samples: Tensor, *, held_out: bool = True) -> dict[str, float]:
    accumulator = found.accumulator(len(samples), held_out=held_out)
    accumulator.add(samples)
    return accumulator.result()[1]


def test_reports_have_them_and_searches_do_not() -> None:
    found = scores(reference())
    assert [str(judge) for judge in found.judges] == DEFAULT
    assert list(measured(found, images(50, 2))) == ["fid", *DEFAULT, "fdr"]
    assert list(measured(found, images(50, 2), held_out=False)) == ["fid"]
    assert found.floors() == {}
    plain = Scores({"inception": View(JudgedPixels(), reference())})
    assert (plain.judges, plain.describe()) == ((), found.describe())


def test_metrics_that_are_named_are_judges_too_and_the_loss_is_none() -> None:
    found = scores(reference(), held_out_metrics=["kid"])
    assert [str(judge) for judge in found.judges] == ["kid", *DEFAULT]


def test_the_parts_of_a_sum_are_none() -> None:
    found = scores(reference(), loss={"fid": 1, "near": 2}, held_out_metrics=["kid"])
    assert [str(judge) for judge in found.judges] == ["kid", "precision", "recall", "sliced"]


def test_what_a_penalty_hides_is_a_judge() -> None:
    found = scores(reference(), keep="precision")
    assert [str(judge) for judge in found.judges] == ["fid", "hinge", *DEFAULT]
    assert found.signs["fid"] == 1


def test_mean_and_covariance_have_none() -> None:
    assert scores(dataclasses.replace(reference(), all_features=None)).judges == ()
    assert scores(reference(3)).judges == (), "three images have no third neighbour"


def test_what_is_built_for_them_takes_the_place_of_what_the_loss_had() -> None:
    full, asked = reference(), []

    def build(name: str, view: View) -> Reference:
        asked.append(name)
        return full

    lean = dataclasses.replace(full, all_features=None)
    found = Scores({"inception": View(JudgedPixels(), lean)}, judge_reference=build)
    loss = measured(found, images(50, 2), held_out=False)["fid"]
    assert asked == []
    assert measured(found, images(50, 2))["near"] > 0
    assert measured(found, images(50, 2))["fid"] == pytest.approx(loss, rel=1e-9)
    assert asked == ["inception"]


def test_held_out_images_are_judges_and_have_values_of_their_own() -> None:
    unseen = reference(40, seed=3)
    found = scores(reference(held_out=unseen))
    assert [str(judge) for judge in found.judges] == [*DEFAULT, "fid_held_out", "nearer_train", "authenticity"]
    values, floors = measured(found, images(50, 2)), found.floors()
    real, other, own = (images(count, seed).flatten(1).double().numpy() for count, seed in ((80, 1), (40, 3), (50, 2)))

    def fid(x: Any, y: Any) -> float:
        return frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))

    assert values["fid_held_out"] == pytest.approx(fid(own, other), rel=1e-4)
    assert floors["fid_held_out"] == pytest.approx(fid(real, other), rel=1e-4)
    apart = np.linalg.norm(other[:, None] - real[None], axis=2).min(axis=1)
    assert floors["near"] == pytest.approx(apart.mean(), rel=1e-4)
    assert floors["nearer_train"] == 80 / 120
    assert floors["authenticity"] == pytest.approx(direct_authenticity(real, other))
    assert floors.keys() == found.signs.keys()


def direct_authenticity(real: Any, samples: Any) -> float:
    """Alaa et al. 2022: a sample is no copy where its nearest real image has a nearer one among the real images."""
    authentic = 0
    for sample in samples:
        distances = np.linalg.norm(real - sample, axis=1)
        nearest = int(distances.argmin())
        others = np.delete(real, nearest, axis=0)
        authentic += np.linalg.norm(others - real[nearest], axis=1).min() < distances[nearest]
    return authentic / len(samples)


def test_authenticity_is_what_its_definition_says(monkeypatch: pytest.MonkeyPatch) -> None:
    found = scores(reference(), held_out_metrics=["authenticity"])
    real = images(80, 1).flatten(1).double().numpy()
    fresh, near_copies = images(60, 2), images(80, 1) + 0.2 * images(80, 5)
    values = [measured(found, samples)["authenticity"] for samples in (fresh, near_copies, images(80, 1))]
    direct = [direct_authenticity(real, some.flatten(1).double().numpy()) for some in (fresh, near_copies)]
    assert values == [pytest.approx(direct[0]), pytest.approx(direct[1]), 0.0]
    assert 0 < values[1] < values[0] < 1
    monkeypatch.setattr("lcsc_opt.metrics.distances.BLOCK", 100)
    assert measured(found, fresh)["authenticity"] == values[0], "blocks of rows change nothing"
    assert found.signs["authenticity"] == -1


def direct_fid(x: Any, y: Any) -> float:
    return frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))


class JudgedSquares(JudgedPixels):
    name = "judged-squares"

    def __call__(self, images: Tensor) -> Tensor:
        return images.flatten(1) ** 2


def test_fdr_is_fid_over_that_of_real_images_mean_over_all_spaces() -> None:
    real, own = (images(count, seed).flatten(1).double().numpy() for count, seed in ((80, 1), (50, 2)))
    statistics = ReferenceStatistics.from_statistics(FeatureStatistics.from_features(real**2), "judged-squares")
    squares = View(JudgedSquares(), Reference(statistics, "squares", (real**2).astype(np.float32)))
    space = CrossCheckSpace(MetricName("fid", "cross_check"), lambda: squares)
    found = scores(reference(), cross_check=space)
    ratios = [direct_fid(f(own), f(real)) / direct_fid(f(real[::2]), f(real[1::2])) for f in (np.array, np.square)]
    values = measured(found, images(50, 2))
    assert values["fdr"] == pytest.approx(np.mean(ratios), rel=1e-4)
    assert list(found.splits) == ["inception", "cross_check"]
    assert found.signs["fdr"] == 1
    part = [found.accumulator(25, held_out=True, total=50) for _ in range(2)]
    for accumulator, rows in zip(part, torch.split(images(50, 2), 25), strict=True):
        accumulator.add(rows)
    whole = found.whole([accumulator.part() for accumulator in part], held_out=True)
    assert whole.result()[1]["fdr"] == pytest.approx(values["fdr"], rel=1e-9)


def test_fdr_has_the_held_out_images_for_its_unit_where_there_are_some() -> None:
    found = scores(reference(held_out=reference(40, seed=3)), loss="near")
    real, other, own = (images(count, seed).flatten(1).double().numpy() for count, seed in ((80, 1), (40, 3), (50, 2)))
    assert measured(found, images(50, 2))["fdr"] == pytest.approx(
        direct_fid(own, real) / direct_fid(other, real), rel=1e-4
    )
    assert found.floors()["fdr"] == 1
    assert measured(found, images(40, 3))["fdr"] == pytest.approx(1, rel=1e-4), "held-out images as samples"


def test_without_features_or_default_judges_there_is_no_fdr() -> None:
    lean = dataclasses.replace(reference(), all_features=None)
    assert "fdr" not in measured(scores(lean), images(50, 2))
    plain = Scores({"inception": View(JudgedPixels(), reference())}, held_out_metrics=["near"])
    assert list(measured(plain, images(50, 2))) == ["fid", "near"]
    assert "fdr" not in measured(scores(reference(3)), images(50, 2)), "three images make no two covariances"


def test_three_held_out_images_have_no_values_of_their_own() -> None:
    found = scores(reference(held_out=reference(3, seed=3)))
    assert "fid_held_out" in measured(found, images(50, 2))
    assert found.floors() == {"fdr": 1}


def test_copies_of_real_images_are_found() -> None:
    unseen = reference(40, seed=3)
    found = scores(reference(held_out=unseen))
    assert measured(found, images(80, 1))["nearer_train"] == 1, "copies of what the loss sees"
    assert measured(found, images(40, 3))["nearer_train"] == 0, "copies of what it does not see"
    fresh = measured(found, images(3000, 4))["nearer_train"]
    assert fresh == pytest.approx(80 / 120, abs=0.1)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sets = [images(count, seed).flatten(1) for count, seed in ((30, 0), (20, 1), (25, 2))]
    whole = nearer_share(*sets)
    monkeypatch.setattr("lcsc_opt.metrics.distances.BLOCK", 100)
    assert nearer_share(*sets) == whole
    assert 0 < whole < 1


def test_held_out_images_cannot_be_in_a_loss_nor_be_missing() -> None:
    for name in ("fid_held_out", "nearer_train@clip"):
        assert MetricName.parse(name).sign == 1
        with pytest.raises(MetricError, match="move it to held_out_metrics"):
            parse_loss({"fid": 1, name: 1})
    with pytest.raises(MetricError, match=r"fid_held_out: .*none are held out"):
        scores(reference(), held_out_metrics=["fid_held_out"])


def test_very_many_real_images_are_said_to_be_too_many(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "MOST_IMAGES", 10)
    assert few_enough("inception", 10)
    assert capsys.readouterr().err == ""
    assert not few_enough("inception", 11)
    assert "name precision, recall, sliced, near in held_out_metrics" in capsys.readouterr().err
