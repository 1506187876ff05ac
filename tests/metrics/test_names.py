"""Names of metrics and the loss that they make."""

import pytest

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics.loss import Loss
from lcsc_opt.metrics.names import FORMULAS, OWN_FEATURES, MetricName


@pytest.mark.parametrize("name", [*FORMULAS, "precision@dinov2", "is@digits", "kid@my_module:make.extractor"])
def test_names_come_back_as_they_were_and_without_extractor_are_inceptions(name):
    assert str(MetricName.parse(name)) == name
    assert "@" in name or name in OWN_FEATURES or MetricName.parse(f"{name}@inception") == MetricName.parse(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fidd", "did you mean 'fid'"),
        ("", "is not a metric"),
        ("fid@dinov3", "did you mean 'dinov2'"),
        ("reward@my:f", "the setting reward names the function"),
        ("fid@module:", "is not an extractor"),
        ("tones@clip", "tones has features of its own"),
        ("outside@my:f", "outside has features of its own"),
    ],
)
def test_unknown_names_and_extractors_that_a_metric_cannot_have_are_refused(name, message):
    with pytest.raises(MetricError, match=message):
        MetricName.parse(name)


def test_a_loss_is_one_metric_or_a_weighted_sum():
    assert Loss.parse("kid@clip").weights == {MetricName("kid", "clip"): 1.0}
    assert Loss.parse({"fid": 1, "kid": 100.0}).weights == {MetricName("fid"): 1.0, MetricName("kid"): 100.0}
    assert Loss.parse({"fid": 1, "near": 0}).weights == {MetricName("fid"): 1.0}


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({}, "names no metric"),
        ({"fid": 1, "fid@inception": 1}, "named twice"),
        ({"fid": -1}, "lower is better"),
        ({"fid": True}, "expected a number"),
        ({"fid": 1, "fid_held_out@clip": 1}, "decides nothing; move it to held_out_metrics"),
        ("held_out_reward", "held_out_reward is held out, and decides nothing"),
    ],
)
def test_losses_that_make_no_sense_are_refused(loss, message):
    with pytest.raises(MetricError, match=message):
        Loss.parse(loss)
