"""Each metric is torch-fidelity's own: the same images, through its ``calculate_metrics`` and through ours."""

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from lcsc_opt.metrics.distances import NEIGHBOURHOOD, SUBSET_SEED, SUBSET_SIZE, SUBSETS
from lcsc_opt.metrics.feature_metrics import SCORE_SPLITS
from tests.metrics import examples, network_files
from tests.metrics.test_fidelity import metrics_of, reference_of

THEIR_NAMES = {
    "fid": "frechet_inception_distance",
    "kid": "kernel_inception_distance_mean",
    "is": "inception_score_mean",
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


def tolerance(formula):
    """KID's subsets are the same ones; what is left is that torch-fidelity sums its kernels in float32."""
    return 1e-4 if formula == "kid" else 1e-6


def compared(place, count, real, extractor, alias, weights, left_out, **asked):
    """Our metrics of so many samples and real images, each of which is torch-fidelity's."""
    folder, samples = write_folder(place / "real", real), smooth_images(count, seed=1)
    expected = theirs(folder, samples, real, extractor, weights, **asked)
    formulas = [formula for formula in THEIR_NAMES if formula != left_out]
    loss, *metrics = names = [formula if alias == "inception" else f"{formula}@{alias}" for formula in formulas]
    known = {"reference": str(folder), "weights": {alias: str(weights)}}
    scores = examples.build_scores(loss=loss, metrics=metrics, **known, batch_size=16, cache=place)
    found_loss, found = examples.score(scores, samples / 127.5 - 1, size=20)
    assert found_loss == found[loss]
    for name, formula in zip(names, formulas, strict=True):
        assert found[name] == pytest.approx(expected[THEIR_NAMES[formula]], rel=tolerance(formula)), name
    return found


def test_clip_metrics_are_torch_fidelitys(tmp_path):
    network_files.write_clip(tmp_path / "clip.pt")
    found = compared(tmp_path, 48, 40, "clip-vit-b-32", "clip", tmp_path / "clip.pt", "is", fid=True)
    assert 0 < found["precision@clip"] < 1
    assert 0 < found["recall@clip"] < 1
    assert found["kid@clip"] > 0.01


@pytest.mark.slow
def test_inception_metrics_are_torch_fidelitys(tmp_path, monkeypatch):
    """A dozen images, and not FID: torch-fidelity's takes half a minute for 2,048 features on one core.

    Both networks see them smaller than they do; in their own size, features are compared in ``test_published.py``.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    monkeypatch.setattr(FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", 107)
    weights = tmp_path / "inception.pth"
    torch.save(network_files.random_inception().state_dict(), weights)
    found = compared(tmp_path, 12, 6, "inception-v3-compat", "inception", weights, "fid", isc=True)
    assert found["is"] > 1.001
    assert found["kid"] > 0.001


def test_constants_are_torch_fidelitys_defaults():
    from torch_fidelity.defaults import DEFAULTS

    ours = (SUBSET_SIZE, SUBSETS, SCORE_SPLITS, SUBSET_SEED, NEIGHBOURHOOD)
    names = ("kid_subset_size", "kid_subsets", "isc_splits", "rng_seed", "prc_neighborhood")
    assert ours == tuple(DEFAULTS[name] for name in names)


def normal(count, dimension, seed, shift=0.0):
    return torch.from_numpy(np.random.default_rng(seed).normal(shift, 1, (count, dimension)).astype(np.float32))


@pytest.mark.parametrize(("samples", "real"), [(1300, 1200), (1000, 1000), (300, 1200)])
def test_kid_of_features_is_torch_fidelitys_also_where_it_needs_no_subsets(samples, real, monkeypatch):
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    monkeypatch.setattr("lcsc_opt.metrics.distances.SUBSETS", 5)
    found, compared = normal(samples, 8, 0, 0.3), normal(real, 8, 1)
    size = min(1000, samples, real)
    expected = kid_features_to_metric(found, compared, kid_subsets=5, kid_subset_size=size, verbose=False)
    kid = metrics_of(found, reference_of(compared)).compute("kid")
    assert kid == pytest.approx(expected[KEY_METRIC_KID_MEAN], rel=1e-4)


@pytest.mark.parametrize("block", [2**27, 700])
def test_precision_and_recall_of_features_are_torch_fidelitys_in_any_blocks(block, monkeypatch):
    from torch_fidelity.metric_prc import prc_features_to_metric

    monkeypatch.setattr("lcsc_opt.metrics.distances.BLOCK", block)
    found, compared = normal(150, 6, 0, 0.8), normal(110, 6, 1)
    expected = prc_features_to_metric(found, compared, verbose=False)
    metrics = metrics_of(found, reference_of(compared))
    precision, recall = metrics.compute("precision"), metrics.compute("recall")
    assert (precision, recall) == pytest.approx((expected["precision"], expected["recall"]), rel=1e-6)
    assert 0.1 < precision < 0.9
    assert precision != recall
