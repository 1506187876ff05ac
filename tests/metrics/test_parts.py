"""Evaluations whose images are spread over workers: the parts together are the whole."""

import pickle

import numpy as np
import pytest

from tests.metrics.examples import Doubled, Pixels, both, fill, image_metrics, images, reference, score, suite

COUNT = 43
CUTS = {3: [1, 20, 22], 7: [5, 1, 9, 2, 16, 3, 7]}
ALL = {"fid": 1, "kid": 2, "is": 0.5, "precision": 1, "recall": 1}


def states_of(scores, sizes, **options):
    """What each worker sends, as it arrives from another process."""
    parts = images(sum(sizes)).split(sizes)
    return [
        pickle.loads(pickle.dumps(fill(image_metrics(scores, sum(sizes), **options), part, 4).state)) for part in parts
    ]


def merged(scores, sizes, **options):
    whole = image_metrics(scores, sum(sizes), **options)
    for state in states_of(scores, sizes, **options):
        whole.merge(state)
    return whole


class Far(Pixels):
    def __call__(self, batch):
        return super().__call__(batch) + 1e3


@pytest.mark.parametrize("workers", CUTS)
@pytest.mark.parametrize(
    ("scores", "held_out", "rel"),
    [
        (both(loss="fid", metrics=["fid@m:f"]), False, 1e-11),
        (suite({"inception": reference(Far())}), False, 1e-9),
        (both(loss="fid", held_out_metrics=["kid@m:f", "is", "fid@m:f"]), True, 1e-11),
        (suite({"inception": reference()}, report_references=lambda: {"c": reference(Doubled())}), True, 1e-11),
    ],
)
def test_metrics_do_not_depend_on_the_number_of_parts(workers, scores, held_out, rel):
    loss, metrics = merged(scores, CUTS[workers], group="held-out" if held_out else "search").compute()
    expected = score(scores, images(COUNT), held_out=held_out)
    assert (loss, metrics) == (pytest.approx(expected[0], rel=rel), pytest.approx(expected[1], rel=rel))
    assert len(metrics) > held_out


@pytest.mark.parametrize("workers", CUTS)
@pytest.mark.parametrize("count", [COUNT, 12])  # 16 features
def test_metrics_of_kept_features_are_the_same_bit_for_bit(workers, count):
    scores = both(loss=ALL, metrics=["kid@m:f"])
    sizes = CUTS[workers] if count == COUNT else [count - workers + 1, *[1] * (workers - 1)]
    assert merged(scores, sizes).compute() == score(scores, images(count))


@pytest.mark.parametrize("loss", ["fid", "kid", {"fid": 1, "kid@m:f": 3}], ids=str)
@pytest.mark.parametrize("unbiased", [False, True])
def test_gradients_of_the_loss_in_the_features_of_all_parts(unbiased, loss):
    scores = both(loss=loss)
    whole = fill(image_metrics(scores, COUNT, gradient=True, unbiased=unbiased), images(COUNT))
    parts = merged(scores, CUTS[7], gradient=True, unbiased=unbiased)
    expected, found = whole.gradients(), parts.gradients()
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-9, atol=1e-12)
    without_gradient = fill(image_metrics(scores, COUNT, unbiased=unbiased), images(COUNT))
    assert parts.compute()[0] == pytest.approx(without_gradient.compute()[0], rel=1e-7)
