"""Each metric is torch-fidelity's own: the same images, through its ``calculate_metrics`` and through ours."""

import pytest
import torch
from torch.utils.data import Dataset

from lcsc_opt.metrics import Reference
from lcsc_opt.metrics.distances import NEIGHBOURHOOD, SUBSET_SEED, SUBSET_SIZE, SUBSETS
from lcsc_opt.metrics.feature_metrics import SCORE_SPLITS
from tests.metrics import examples, network_files
from tests.metrics.test_fidelity import drawn, metrics_of, reference_of

THEIR_NAMES = {
    "fid": "frechet_inception_distance",
    "kid": "kernel_inception_distance_mean",
    "precision": "precision",
    "recall": "recall",
}


def smooth_images(count, seed, size=24):
    """``[count, 3, size, size]`` uint8: a few colours each, so that networks see differences."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 3, 3, generator=generator) * (255 - 40 * seed)
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")
    return (smooth + torch.rand(count, 3, size, size, generator=generator) * 30).clamp(0, 255).to(torch.uint8)


def write_folder(path, count):
    return examples.write_folder(path, smooth_images(count, seed=0).permute(0, 2, 3, 1).numpy())


def theirs(folder, samples, real, extractor, weights, **metrics):
    from torch_fidelity import calculate_metrics

    class Images(list, Dataset):  # type: ignore[misc]
        """torch-fidelity asks for the type."""

    return calculate_metrics(
        input1=Images(samples),
        input2=str(folder),
        feature_extractor=extractor,
        feature_extractor_weights_path=str(weights),
        kid_subset_size=real,
        kid=True,
        prc=True,
        cuda=False,
        cache=False,
        save_cpu_ram=True,  # no worker processes
        verbose=False,
        **metrics,
    )


def test_clip_metrics_are_torch_fidelitys(tmp_path):
    weights, folder, samples = tmp_path / "clip.pt", write_folder(tmp_path / "real", 40), smooth_images(48, seed=1)
    network_files.write_clip(weights)
    expected = theirs(folder, samples, 40, "clip-vit-b-32", weights, fid=True)
    loss, *metrics = (f"{formula}@clip" for formula in THEIR_NAMES)
    known = {"reference": str(folder), "weights": {"clip": str(weights)}}
    scores = examples.build_scores(loss=loss, metrics=metrics, **known, batch_size=16, cache=tmp_path)
    found_loss, found = examples.score(scores, samples / 127.5 - 1, size=20)
    assert found_loss == found[loss]
    for formula, name in THEIR_NAMES.items():  # KID's subsets are the same, but torch-fidelity sums in float32
        rel = 1e-4 if formula == "kid" else 1e-6
        assert found[f"{formula}@clip"] == pytest.approx(expected[name], rel=rel), name
    assert 0 < found["precision@clip"] < 1
    assert 0 < found["recall@clip"] < 1
    assert found["kid@clip"] > 0.01


def test_the_inception_score_of_logits_is_torch_fidelitys():
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    batch = examples.images(60)
    expected = isc_features_to_metric(examples.Classifier().features_and_logits(batch)[1], splits=10)
    found = examples.score(examples.suite({"inception": Reference(examples.Classifier())}, loss="is"), batch)[1]["is"]
    assert found == expected[KEY_METRIC_ISC_MEAN], "bit for bit"


def test_constants_are_torch_fidelitys_defaults():
    from torch_fidelity.defaults import DEFAULTS

    ours = (SUBSET_SIZE, SUBSETS, SCORE_SPLITS, SUBSET_SEED, NEIGHBOURHOOD)
    names = ("kid_subset_size", "kid_subsets", "isc_splits", "rng_seed", "prc_neighborhood")
    assert ours == tuple(DEFAULTS[name] for name in names)


@pytest.mark.parametrize(("samples", "real"), [(400, 300), (300, 300), (401, 420)])
def test_kid_of_features_is_torch_fidelitys_also_where_it_needs_no_subsets(samples, real, monkeypatch):
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    monkeypatch.setattr("lcsc_opt.metrics.distances.SUBSET_SIZE", 400)  # 1,000 take seconds
    found, compared = drawn(samples, 8, shift=0.3).float(), drawn(real, 8, seed=1).float()
    size = min(400, samples, real)
    expected = kid_features_to_metric(found, compared, kid_subsets=100, kid_subset_size=size, verbose=False)
    kid = metrics_of(found, reference_of(compared)).compute("kid")
    assert kid == pytest.approx(expected[KEY_METRIC_KID_MEAN], rel=1e-4)


@pytest.mark.usefixtures("blocks")
def test_precision_and_recall_of_features_are_torch_fidelitys_in_any_blocks():
    from torch_fidelity.metric_prc import prc_features_to_metric

    found, compared = drawn(150, 6, shift=0.8).float(), drawn(110, 6, seed=1).float()
    expected = prc_features_to_metric(found, compared, verbose=False)
    metrics = metrics_of(found, reference_of(compared))
    precision, recall = metrics.compute("precision"), metrics.compute("recall")
    assert (precision, recall) == pytest.approx((expected["precision"], expected["recall"]), rel=1e-6)
    assert 0.1 < precision < 0.9
    assert precision != recall
