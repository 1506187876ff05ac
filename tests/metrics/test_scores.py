"""Images → loss and metrics, with an extractor whose features are pixels."""

import sys
import types

import numpy as np
import pytest
import torch

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics import FeatureStatistics, Reference, ReferenceStatistics, Scores, View, frechet_distance
from lcsc_opt.metrics.from_settings import build_scores

IMAGES = 40


class Pixels:
    """Counts what it sees."""

    name, dimension = "pixels", 16

    def __init__(self):
        self.seen = 0

    def __call__(self, images):
        self.seen += len(images)
        return images.flatten(1)


class Classifier(Pixels):
    name = "classifier"

    def features_and_logits(self, images):
        features = self(images)
        return features, features[:, :5] * 4


def images(count=IMAGES, seed=0):
    return torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def statistics(count=60):
    real = images(count, seed=9).flatten(1).double().numpy()
    return ReferenceStatistics.from_statistics(FeatureStatistics.from_features(real), "pixels")


def reference(count=60, size=(4, 4)):
    return Reference(statistics(count), "real", images(count, seed=9).flatten(1).numpy(), size)


def score(scores, batch=None, *, held_out=False, size=7):
    batch = images() if batch is None else batch
    accumulator = scores.accumulator(len(batch), held_out=held_out)
    for part in batch.split(size):
        accumulator.add(part)
    return accumulator.result()


def both(**settings):
    return Scores(
        {"inception": View(Classifier(), reference()), "m:f": View(Pixels(), reference())},
        **settings,
    )


def test_the_simple_case_is_fid():
    loss, metrics = score(Scores.fid(Pixels(), statistics()))
    features = images().flatten(1).double().numpy()
    expected = frechet_distance(features.mean(0), np.cov(features.T), statistics().mean, statistics().cov)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert metrics == {"fid": loss}


def test_a_loss_is_the_weighted_sum_and_metrics_are_reported_as_they_are():
    loss, metrics = score(both(loss={"fid": 2, "is": 3, "recall@m:f": 0.5}, metrics=["kid", "precision"]))
    assert list(metrics) == ["fid", "is", "recall@m:f", "kid", "precision"]
    assert loss == pytest.approx(2 * metrics["fid"] - 3 * metrics["is"] - 0.5 * metrics["recall@m:f"])
    assert metrics["is"] > 1
    assert metrics["precision"] > 0


def test_held_out_metrics_are_computed_only_when_asked_for():
    scores = both(loss="fid", metrics=["is"], held_out_metrics=["kid@m:f", "fid"])
    searched, reported = score(scores), score(scores, held_out=True)
    assert list(searched[1]) == ["fid", "is"]
    assert list(reported[1]) == ["fid", "is", "kid@m:f"]
    assert searched[0] == reported[0]


def test_every_extractor_sees_an_image_once_and_only_when_a_metric_wants_it():
    first, second = Classifier(), Pixels()
    views = {"inception": View(first, reference()), "m:f": View(second, reference())}
    scores = Scores(views, loss={"fid": 1, "kid": 1, "is": 1, "precision": 1}, held_out_metrics=["fid@m:f", "kid@m:f"])
    score(scores)
    assert (first.seen, second.seen) == (IMAGES, 0)
    score(scores, held_out=True)
    assert (first.seen, second.seen) == (2 * IMAGES, IMAGES)


def test_metrics_do_not_depend_on_the_batch_size():
    scores = both(loss={"fid": 1, "kid": 1, "is": 1, "precision": 1, "recall": 1})
    assert score(scores, size=1) == score(scores, size=IMAGES)
    reduced = both(loss="fid")
    assert score(reduced, size=1)[0] == pytest.approx(score(reduced, size=IMAGES)[0], rel=1e-12)


def test_another_number_of_images_than_announced_is_refused():
    accumulator = both().accumulator(IMAGES)
    accumulator.add(images(IMAGES - 1))
    with pytest.raises(MetricError, match="39 images were added and 40 announced"):
        accumulator.result()
    with pytest.raises(MetricError, match="more than the 40 images that were announced"):
        accumulator.add(images(2))


@pytest.mark.parametrize(("count", "total"), [(0, None), (0, 40), (41, 40), (-1, None)])
def test_a_number_of_images_that_makes_no_sense_is_refused(count, total):
    with pytest.raises(MetricError, match="images: expected at least 1"):
        both().accumulator(count, total=total)


def test_features_and_logits_that_are_not_finite_are_refused():
    accumulator = both(loss="fid").accumulator(3)
    with pytest.raises(MetricError, match="not finite"):
        accumulator.add(torch.full((3, 1, 4, 4), torch.nan))
    accumulator = both(loss="is").accumulator(3)
    with pytest.raises(MetricError, match="logits that are not finite"):
        accumulator.add(torch.full((3, 1, 4, 4), torch.inf))


@pytest.mark.parametrize(("metric", "count"), [("is", 9), ("precision", 3), ("fid", 1)])
def test_too_few_images_for_a_metric_are_named(metric, count):
    with pytest.raises(MetricError, match=r"at least 10|more than 3|at least 2"):
        score(both(loss=metric), images(count))


@pytest.mark.parametrize("metric", ["kid", "precision", "recall"])
def test_mean_and_covariance_are_not_enough_for_metrics_of_features(metric):
    view = View(Pixels(), Reference.from_statistics(statistics()))
    with pytest.raises(MetricError, match=f"{metric}: .*mean and covariance only; give the images"):
        Scores({"inception": view}, loss=metric)


def test_extractors_and_references_that_do_not_belong_together_are_refused():
    with pytest.raises(MetricError, match="is: the extractor pixels tells no classes apart"):
        Scores({"inception": View(Pixels())}, loss="is")
    with pytest.raises(MetricError, match="fid: needs a reference"):
        Scores({"inception": View(Pixels())}, loss="fid")
    with pytest.raises(MetricError, match="no extractor 'clip' was given"):
        Scores({"inception": View(Pixels(), reference())}, loss="fid@clip")
    other = ReferenceStatistics(np.zeros(8), np.eye(8), 100, "other")
    with pytest.raises(MetricError, match="have 8 features and the extractor pixels 16"):
        Scores.fid(Pixels(), other)


def test_the_inception_score_needs_no_reference():
    loss, metrics = score(Scores({"inception": View(Classifier())}, loss="is"))
    assert loss == -metrics["is"]


def test_warnings_say_what_few_images_mean():
    scores = both(loss="fid", metrics=["kid"], held_out_metrics=["kid@m:f"])
    few, more = scores.warnings(10), scores.warnings(100)
    assert ["10 images for 16 features" in few[0], "subsets of 10 images" in few[1]] == [True, True]
    assert len(more) == 1
    assert "subsets of 60 images" in more[0]
    small = Scores({"inception": View(Pixels(), reference(12))}).warnings(100)
    assert "the reference set has 12 images" in small[0]


def test_samples_of_another_size_than_the_reference_are_said_once(capsys):
    scores = Scores({"inception": View(Pixels(), reference(size=(32, 8)))})
    score(scores), score(scores)
    (line,) = capsys.readouterr().err.splitlines()
    assert "samples are 4x4 and reference images 32x8" in line
    score(both())
    assert capsys.readouterr().err == ""


def test_description_names_what_decides_results():
    described = both(loss={"fid": 2}, metrics=["is"], held_out_metrics=["kid@m:f"]).describe()
    assert described == {
        "loss": {"fid": 2.0},
        "metrics": ["fid", "is"],
        "held_out_metrics": ["fid", "is", "kid@m:f"],
        "extractors": {
            "inception": {"name": "classifier", "reference": "real"},
            "m:f": {"name": "pixels", "reference": "real"},
        },
    }


def test_pairs_are_ordered_by_the_extractor_of_the_loss():
    assert both(loss="fid@m:f", metrics=["fid"]).extractor.name == "pixels"


@pytest.fixture
def own(monkeypatch):
    module = types.ModuleType("own_extractors")
    module.plain, module.nothing, module.number = Pixels, object, 3
    module.devices = []

    def on_device(device="none"):
        module.devices.append(str(device))
        return Classifier()

    module.on_device = on_device
    monkeypatch.setitem(sys.modules, "own_extractors", module)
    return module


@pytest.fixture
def real_features(tmp_path):
    np.save(tmp_path / "real.npy", reference().features)
    return str(tmp_path / "real.npy")


def test_own_extractors_are_made_by_their_dotted_name(own, tmp_path, real_features):
    names = ["fid@own_extractors:plain", "kid@own_extractors:on_device"]
    scores = build_scores(loss=dict.fromkeys(names, 1), reference=real_features, device="cpu", cache=tmp_path)
    loss, metrics = score(scores)
    assert own.devices == ["cpu"]
    expected = score(both(loss={"fid": 1, "kid": 1}))[1]
    assert metrics == pytest.approx(dict(zip(names, expected.values(), strict=True)), rel=1e-9)
    assert loss == pytest.approx(sum(metrics.values()))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_extractors:missing", "cannot be imported"),
        ("no_such_module_at_all:f", "cannot be imported: No module named"),
        ("own_extractors:nothing", "made object, which lacks name"),
        ("own_extractors:number", "is a int; expected a function"),
    ],
)
def test_own_extractors_that_are_none_are_refused(own, tmp_path, name, message):
    with pytest.raises(MetricError, match=message):
        build_scores(loss=f"is@{name}", cache=tmp_path)


def test_a_reference_can_differ_by_extractor(own, tmp_path, real_features):
    np.save(tmp_path / "others.npy", images(50, seed=5).flatten(1).numpy())
    names = ["own_extractors:plain", "own_extractors:on_device"]
    references = dict(zip(names, [real_features, str(tmp_path / "others.npy")], strict=True))
    scores = build_scores(loss={f"fid@{name}": 1 for name in names}, reference=references, cache=tmp_path)
    first, second = score(scores)[1].values()
    assert first == pytest.approx(score(both())[0], rel=1e-9)
    assert abs(first - second) > 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "reference: is missing for own_extractors:plain"),
        ({"reference": {"own_extractors:plane": "x.npy"}}, "did you mean 'own_extractors:plain'"),
        ({"reference": {"own_extractors:plain": 3}}, "expected a path"),
        ({"reference": "REAL", "weights": {"inceptoin": "x"}}, "did you mean 'inception'"),
        ({"reference": "REAL", "weights": {"own_extractors:plain": "x"}}, "takes no file: it is made by a factory"),
        ({"reference": "REAL", "weights": {"own_extractors:plain": "x"}, "metrics": ["fud"]}, "did you mean 'fid'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(own, tmp_path, real_features, settings, message):
    if settings.get("reference") == "REAL":
        settings = {**settings, "reference": real_features}
    with pytest.raises(MetricError, match=message):
        build_scores(loss="fid@own_extractors:plain", cache=tmp_path, **settings)


def test_weights_that_no_metric_uses_are_said(own, tmp_path, real_features, capsys):
    build_scores(
        loss="fid@own_extractors:plain", reference=real_features, weights={"clip": "missing.pt"}, cache=tmp_path
    )
    assert "no metric uses clip" in capsys.readouterr().err


class LargePixels(Pixels):
    name = "large-pixels"

    def __call__(self, images):
        return 7 * super().__call__(images)


def in_two_spaces(**settings):
    real = images(60, seed=9).flatten(1).double().numpy()
    large = ReferenceStatistics.from_statistics(FeatureStatistics.from_features(7 * real), "large-pixels")
    other = View(LargePixels(), Reference(large, "large", (7 * real).astype(np.float32)))
    return Scores({"inception": View(Pixels(), reference()), "clip": other}, **settings)


@pytest.mark.parametrize(("formula", "power"), [("fid", 1), ("near", 0.5), ("sliced", 1), ("clusters", 1)])
def test_scaled_by_the_trace_spaces_of_other_units_count_the_same(formula, power):
    alone = score(in_two_spaces(loss=formula, loss_scale="trace"))[0]
    trace = np.trace(reference().statistics.cov)
    assert alone == pytest.approx(score(in_two_spaces(loss=formula))[0] / trace**power, rel=1e-6)
    other = score(in_two_spaces(loss=f"{formula}@clip", loss_scale="trace"))[0]
    assert other == pytest.approx(alone, rel=1e-4)
    both_spaces = in_two_spaces(loss={formula: 1, f"{formula}@clip": 2}, loss_scale="trace")
    loss, metrics = score(both_spaces)
    assert loss == pytest.approx(3 * alone, rel=1e-4)
    assert metrics[f"{formula}@clip"] == pytest.approx(metrics[formula] * 7 ** (2 * power), rel=1e-4), "as they are"
    assert both_spaces.describe()["loss"] == {formula: 1, f"{formula}@clip": 2}
    assert both_spaces.describe()["loss_scale"] == "trace"


def test_gradients_are_of_the_scaled_loss():
    found = in_two_spaces(loss={"fid": 1, "near@clip": 2}, loss_scale="trace")
    batch = images().double()

    def loss(values):
        accumulator = found.accumulator(len(values), gradient=True)
        accumulator.add(values)
        return accumulator

    gradients = loss(batch).loss_gradients()
    direction = torch.randn(batch.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    step = 1e-5
    ahead, behind = (loss(batch + sign * step * direction).result()[0] for sign in (1, -1))
    flat = direction.flatten(1)
    along = (gradients["inception"] * flat).sum() + 7 * (gradients["clip"] * flat).sum()
    assert float(along) == pytest.approx((ahead - behind) / (2 * step), rel=1e-5)


def test_what_has_no_unit_or_no_reference_is_not_scaled():
    loss = {"precision": 1, "is": 2}
    views = {"inception": View(Classifier(), reference())}
    assert Scores(views, loss=loss, loss_scale="trace").loss.weights == Scores(views, loss=loss).loss.weights


def test_real_images_that_look_alike_have_no_scale():
    real = np.zeros((60, 16))
    flat = Reference(ReferenceStatistics(np.zeros(16), np.zeros((16, 16)), 60, "pixels"), "flat", real.astype("f4"))
    with pytest.raises(MetricError, match="loss_scale: trace: fid sees no difference"):
        Scores({"inception": View(Pixels(), flat)}, loss_scale="trace")
