"""Images → loss and metrics, with an extractor whose features are pixels."""

import re
import sys
import types

import numpy as np
import pytest
import torch

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics import FrechetReference, Reference
from tests.metrics.examples import (
    Classifier,
    Pixels,
    both,
    build_scores,
    fill,
    image_metrics,
    images,
    reference,
    score,
    suite,
)


def test_a_loss_is_the_weighted_sum_and_metrics_are_reported_as_they_are():
    loss, metrics = score(both(loss={"fid": 2, "is": 3, "recall@m:f": 0.5}, metrics=["kid", "precision"]))
    assert list(metrics) == ["fid", "is", "recall@m:f", "kid", "precision"]
    assert loss == pytest.approx(2 * metrics["fid"] - 3 * metrics["is"] - 0.5 * metrics["recall@m:f"])
    assert metrics["is"] > 1
    assert metrics["precision"] > 0


@pytest.mark.parametrize(("loss", "value", "message"), [("fid", np.nan, "features"), ("is", np.nan, "logits")])
def test_features_and_logits_that_are_not_finite_are_refused(loss, value, message):
    with pytest.raises(MetricError, match=f"{message} .*not finite"):
        fill(image_metrics(both(loss=loss), 3), torch.full((3, 1, 4, 4), value))


@pytest.mark.parametrize(("metric", "count"), [("is", 9), ("precision", 3), ("fid", 1)])
def test_too_few_images_for_a_metric_are_named(metric, count):
    with pytest.raises(MetricError, match="at least"):
        score(both(loss=metric), images(count))


STATISTICS = Reference.of_gaussian(Pixels(), FrechetReference(np.zeros(16), np.eye(16)))


@pytest.mark.parametrize(
    ("known", "settings", "message"),
    [
        *((STATISTICS, {"loss": name}, f"{name}: .*mean and covariance only") for name in ("kid", "precision")),
        (Reference(Pixels()), {"loss": "is"}, "is: the extractor pixels has no classes"),
        (Reference(Pixels()), {}, "fid: needs a reference"),
        (STATISTICS, {"loss": "fid@clip"}, "no extractor 'clip' was given"),
        (reference(), {"held_out_metrics": ["fid_held_out"]}, "fid_held_out: .*none are held out"),
    ],
)
def test_metrics_and_references_that_do_not_belong_together_are_refused(known, settings, message):
    with pytest.raises(MetricError, match=message):
        suite({"inception": known}, **settings)


def test_warnings_say_what_few_images_mean():
    [line] = both(loss="fid", metrics=["kid"]).warnings(10)
    assert "10 images for 16 features" in line
    assert "the reference set has 12 images" in suite({"inception": reference(count=12)}).warnings(100)[0]
    assert "16 images for 16 features" in both(loss="fid").warnings(16)[0], "a covariance of rank 15"
    assert both(loss="fid").warnings(17) == []


def test_description_names_what_decides_the_loss_and_that_of_reports_the_rest():
    made = both(loss={"fid": 2}, metrics=["is"], held_out_metrics=["kid@m:f"])

    def described(name):
        return {name: {"name": made.references[name].extractor.name, "reference": made.references[name].identity}}

    assert made.describe() == {"loss": {"fid": 2.0}, "extractors": described("inception")}
    assert made.describe_reports() == {"extractors": described("m:f")}, "names of metrics change no other value"
    kept = both(keep={"precision@m:f": 0.5})
    assert kept.describe() == {
        "loss": {"fid": 1.0},
        "keep": "precision@m:f",
        "bound": 0.5,
        "extractors": {**described("inception"), **described("m:f")},
    }
    assert both(loss="fid@m:f", metrics=["fid"]).extractor.name == "pixels", "it orders pairs"


@pytest.fixture
def own(monkeypatch):
    module = types.ModuleType("own_extractors")
    module.plain, module.nothing = Pixels, object
    module.devices = []

    def on_device(device="none"):
        module.devices.append(str(device))
        return Classifier()

    module.on_device = on_device
    monkeypatch.setitem(sys.modules, "own_extractors", module)
    return module


@pytest.fixture
def statistics(tmp_path):
    frechet = reference().frechet
    np.savez(tmp_path / "real.npz", mu=frechet.mean, sigma=frechet.cov)
    return str(tmp_path / "real.npz")


def test_own_extractors_are_made_by_their_dotted_name(own, tmp_path, statistics):
    names = ["fid@own_extractors:plain", "fid@own_extractors:on_device"]
    scores = build_scores(loss=dict.fromkeys(names, 1), reference=statistics, device="cpu", cache=tmp_path)
    loss, metrics = score(scores)
    assert own.devices == ["cpu"]
    assert metrics == pytest.approx(dict.fromkeys(names, score(both(loss="fid"))[1]["fid"]), rel=1e-9)
    assert loss == pytest.approx(sum(metrics.values()))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module_at_all:f", "cannot be imported: No module named"),
        ("own_extractors:nothing", "made object, which lacks name"),
    ],
)
def test_own_extractors_that_are_none_are_refused(own, tmp_path, name, message):
    with pytest.raises(MetricError, match=message):
        build_scores(loss=f"is@{name}", cache=tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "reference: is missing for own_extractors:plain"),
        ({"reference": {"own_extractors:plane": "x.npy"}}, "did you mean 'own_extractors:plain'"),
        ({"reference": "REAL", "weights": {"own_extractors:plain": "x"}}, "needs no file: its factory loads"),
    ],
)
def test_settings_that_make_no_sense_are_refused(own, tmp_path, statistics, settings, message):
    if settings.get("reference") == "REAL":
        settings = {**settings, "reference": statistics}
    with pytest.raises(MetricError, match=message):
        build_scores(loss="fid@own_extractors:plain", cache=tmp_path, **settings)


class InNumpy(Pixels):
    def __call__(self, images):
        return torch.from_numpy(super().__call__(images).numpy())


class WithoutGrad(Pixels):
    @torch.no_grad()
    def __call__(self, images):
        return 2 * super().__call__(images)


@pytest.mark.parametrize(
    ("extractor", "reason"),
    [(Pixels, None), (InNumpy, "with an autograd graph, .*raised.*numpy"), (WithoutGrad, "no graph back to the image")],
)
def test_own_extractors_without_a_graph_say_so_before_a_gradient_is_wanted(extractor, reason):
    scores = suite({"m:f": reference(extractor())}, loss="fid@m:f")
    found = scores.why_no_graph(lambda: (images(2), None))
    assert found is None if reason is None else re.search(reason, found)


def test_a_device_without_memory_does_not_mean_that_own_features_have_no_graph():
    class Full(Pixels):
        def __call__(self, images):
            if torch.is_grad_enabled():
                raise torch.OutOfMemoryError("full")
            return super().__call__(images)

    with torch.no_grad():
        scores = suite({"m:f": reference(Full())}, loss="fid@m:f")
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        scores.why_no_graph(lambda: (images(2), None))


def test_metrics_of_single_images_are_in_the_features_of_the_loss():
    scores = both(loss="fid@m:f", metrics=["recall"], held_out_metrics=["precision", "kid"])
    assert list(score(scores)[1]) == ["fid@m:f", "recall@m:f"]
    assert {"precision@m:f", "kid"} <= score(scores, held_out=True)[1].keys()
