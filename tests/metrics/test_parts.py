"""Evaluations whose images are spread over workers: the parts together are the whole."""

import pickle

import numpy as np
import pytest
import torch

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics import FeatureStatistics, ReferenceStatistics, Scores, View
from tests.metrics.test_cross_check import Doubled, cross_check
from tests.metrics.test_scores import Classifier, Pixels, both, images, reference, score, statistics

COUNT = 43
CUTS = {1: [43], 2: [30, 13], 3: [1, 20, 22], 7: [5, 1, 9, 2, 16, 3, 7]}
ALL = {"fid": 1, "kid": 2, "is": 0.5, "precision": 1, "recall": 1}


def parts_of(scores, sizes, *, batch=None, held_out=False, gradient=False, batch_size=4):
    """One part for each worker, as it arrives from another process."""
    batch = images(sum(sizes)) if batch is None else batch
    parts = []
    for some in batch.split(sizes):
        accumulator = scores.accumulator(len(some), total=len(batch), held_out=held_out, gradient=gradient)
        for images_ in some.split(batch_size):
            accumulator.add(images_)
        parts.append(pickle.loads(pickle.dumps(accumulator.part())))
    return parts


@pytest.mark.parametrize("workers", CUTS)
def test_fid_does_not_depend_on_the_number_of_parts(workers):
    scores = both(loss="fid", metrics=["fid@m:f"])
    expected_loss, expected = score(scores, images(COUNT))
    loss, metrics = scores.whole(parts_of(scores, CUTS[workers])).result()
    assert loss == pytest.approx(expected_loss, rel=1e-11)
    assert metrics == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("workers", CUTS)
def test_fid_far_from_the_origin_does_not_depend_on_the_number_of_parts_either(workers):
    class Far(Pixels):
        def __call__(self, batch):
            return super().__call__(batch) + 1e3

    real = FeatureStatistics.from_features(Far()(images(60, seed=9)).double().numpy())
    scores = Scores.fid(Far(), ReferenceStatistics.from_statistics(real))
    expected = score(scores, images(COUNT))[0]
    assert scores.whole(parts_of(scores, CUTS[workers])).result()[0] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("workers", CUTS)
@pytest.mark.parametrize("count", [COUNT, 12])  # 16 features
def test_metrics_of_kept_features_are_the_same_bit_for_bit(workers, count):
    scores = both(loss=ALL, metrics=["kid@m:f"])
    sizes = CUTS[workers] if count == COUNT else [count - workers + 1, *[1] * (workers - 1)]
    assert scores.whole(parts_of(scores, sizes)).result() == score(scores, images(count))


@pytest.mark.parametrize("workers", CUTS)
def test_held_out_metrics_and_the_cross_check_have_parts_too(workers):
    scores = Scores.fid(Pixels(), statistics(), cross_check=cross_check())
    expected = score(scores, images(COUNT), held_out=True)[1]
    found = scores.whole(parts_of(scores, CUTS[workers], held_out=True), held_out=True).result()[1]
    assert list(found) == ["fid", "fid@cross_check"]
    assert found == pytest.approx(expected, rel=1e-11)
    scores = both(loss="fid", held_out_metrics=["kid@m:f", "is", "fid@m:f"])
    expected = score(scores, images(COUNT), held_out=True)[1]
    assert scores.whole(parts_of(scores, CUTS[workers], held_out=True), held_out=True).result()[1] == pytest.approx(
        expected, rel=1e-11
    )


@pytest.mark.parametrize("loss", ["fid", "kid", {"fid": 1, "kid@m:f": 3}], ids=str)
@pytest.mark.parametrize("workers", CUTS)
def test_gradients_of_the_loss_in_the_features_of_all_parts(workers, loss):
    scores = both(loss=loss)
    accumulator = scores.accumulator(COUNT, gradient=True)
    accumulator.add(images(COUNT))
    expected = accumulator.loss_gradients()
    parts = parts_of(scores, CUTS[workers], gradient=True)
    found = scores.whole(parts).loss_gradients()
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient.dtype == np.float64
        np.testing.assert_allclose(gradient, expected[name].numpy(), rtol=1e-5, atol=1e-9)
    whole = scores.whole(parts)
    for name, gradient in whole.loss_gradients().items():
        np.testing.assert_array_equal(gradient, found[name])
    assert whole.result()[0] == pytest.approx(score(scores, images(COUNT))[0], rel=1e-7)


def test_the_cross_check_is_built_where_parts_are_put_together():
    spaces = cross_check(), cross_check()
    worker, main = (Scores.fid(Pixels(), statistics(), cross_check=space) for space in spaces)
    found = main.whole(parts_of(worker, [20, 23], held_out=True), held_out=True).result()
    assert found[1] == pytest.approx(score(worker, images(COUNT), held_out=True)[1], rel=1e-11)
    assert [space.built for space in spaces] == [1, 1]


def test_a_gradient_is_had_on_held_out_noise_too():
    worker, main = (Scores.fid(Pixels(), statistics(), cross_check=cross_check()) for _ in range(2))
    parts = parts_of(worker, [20, 23], held_out=True, gradient=True)
    assert main.whole(parts, held_out=True).loss_gradients()["inception"].shape == (COUNT, 16)


def test_a_part_for_fid_holds_no_features():
    scores = both(loss="fid", held_out_metrics=["fid@m:f"])
    part = parts_of(scores, [300, 300], held_out=True)[0]
    assert (part.count, part.total) == (300, 600)
    shapes = {name: seen.samples.scatter.shape for name, seen in part.seen.items()}
    assert shapes == {"inception": (16, 16), "m:f": (16, 16)}
    assert len(pickle.dumps(part)) < 2 * (16 * 16 + 16) * 8 + 1500 < 300 * 16 * 4


@pytest.mark.parametrize(
    ("loss", "total", "gradient", "kept"),
    [
        ("fid", 16, False, False),
        ("fid", 15, False, True),  # fewer than features: smaller than a scatter
        ("fid", 16, True, True),
        ({"fid": 1, "kid": 1}, 40, False, True),
        ({"fid": 1, "recall": 1}, 40, False, True),
        ({"fid": 1, "is": 1}, 40, False, False),
    ],
)
def test_features_are_kept_where_something_needs_them(loss, total, gradient, kept):
    part = parts_of(both(loss=loss), [10, total - 10], gradient=gradient)[0]
    samples = part.seen["inception"].samples
    assert isinstance(samples, FeatureStatistics) != kept
    if kept:
        assert (samples.shape, samples.dtype) == ((10, 16), np.float32)


def test_only_the_features_of_the_loss_are_kept_for_its_gradient():
    part = parts_of(both(loss="fid", metrics=["fid@m:f"]), [COUNT], gradient=True)[0]
    assert isinstance(part.seen["m:f"].samples, FeatureStatistics)
    assert part.seen["inception"].samples.shape == (COUNT, 16)


def test_a_part_is_no_evaluation():
    scores = both(loss="fid")
    accumulator = scores.accumulator(10, total=30)
    accumulator.add(images(9))
    with pytest.raises(MetricError, match="9 images were added and 10 announced"):
        accumulator.part()
    accumulator.add(images(1))
    with pytest.raises(MetricError, match="hold 10 images of 30; give all parts"):
        accumulator.result()
    assert accumulator.part().count == 10


def refused(scores, parts, message, **options):
    with pytest.raises(MetricError, match=message) as caught:
        scores.whole(parts, **options).result()
    assert "\n" not in str(caught.value)


def test_parts_that_do_not_belong_together_are_refused():
    scores, size = both(loss="fid", held_out_metrics=["kid"]), [20, 20]
    parts = parts_of(scores, size)
    refused(scores, [], "there are none")
    refused(scores, parts[:1], "hold 20 images of 40")
    refused(scores, [*parts, parts[0]], "hold 60 images of 40")
    refused(scores, [parts[0], parts_of(scores, [20, 21])[1]], "of evaluations of 40 and of 41 images")
    refused(scores, [parts[0], parts_of(scores, size, held_out=True)[1]], "one is for fid, kid and one for fid; make")
    refused(scores, parts, "are for fid and not for fid, kid; make them", held_out=True)
    refused(both(loss="kid"), parts, "are for fid and not for kid; make them")
    refused(scores, [parts[0], parts_of(scores, size, gradient=True)[1]], "some keep features for a gradient")


def test_parts_that_another_network_saw_are_refused():
    scores = Scores({"inception": View(Pixels(), reference())})
    other = Scores({"inception": View(Doubled(), reference())})
    parts = [parts_of(scores, [20, 20])[0], parts_of(other, [20, 20])[1]]
    refused(scores, parts, "inception is doubled for one and pixels for others; give")
    refused(
        Scores({"inception": View(Classifier(), reference())}, loss="fid"),
        parts,
        "inception is pixels for one and classifier for others",
    )


def test_a_gradient_of_parts_without_features_says_what_to_do():
    scores = both(loss="fid")
    with pytest.raises(MetricError, match="gradient=True"):
        scores.whole(parts_of(scores, [20, 20])).loss_gradients()


def test_parts_hold_numpy_only():
    part = parts_of(both(loss=ALL, metrics=["fid@m:f"]), [COUNT])[0]
    arrays = [value for seen in part.seen.values() for value in (seen.samples, seen.logits) if value is not None]
    assert not any(isinstance(value, torch.Tensor) for value in arrays)
    assert b"torch" not in pickle.dumps(part)
