"""The setting ``reference``: every layout that public code bases write, and what is kept in the cache."""

import dataclasses
import random

import numpy as np
import pytest
import torch

from lcsc_opt.base.errors import MetricError, ObjectiveError
from lcsc_opt.metrics import FrechetReference, Reference
from lcsc_opt.metrics.reference.building import ImageSets, ReferenceSettings
from lcsc_opt.metrics.reference.files import read_reference_file
from tests.metrics import examples, network_files
from tests.metrics.examples import Explosive, image_metrics, suite

D = 12
IMAGES = examples.pixels(30)
FEATURES = torch.from_numpy(IMAGES).permute(0, 3, 1, 2).flatten(1).float().numpy() / 127.5 - 1
MEAN, COV = examples.mean_and_covariance(FEATURES.astype(np.float64))


class Pixels(examples.Pixels):
    dimension = D

    def __init__(self, name="pixels-1"):
        super().__init__()
        self.name = name


def write_folder(path):
    return examples.write_folder(path, IMAGES)


def build(path, alias="inception", extractor=None, *, need=False, cache=None, batch_size=7):
    place = {"batch_size": batch_size, "sets": ImageSets(cache or path.parent / "cache")}
    settings = ReferenceSettings.parse(path if isinstance(path, dict) else str(path))
    return settings.build(alias, extractor or Pixels(), features=need, held_out=False, **place)


def assert_is_reference(reference, *, with_features):
    np.testing.assert_allclose(reference.frechet.mean, MEAN, rtol=0, atol=1e-6)
    np.testing.assert_allclose(reference.frechet.cov, COV, rtol=1e-5, atol=1e-7)
    assert reference.frechet.distance(MEAN, COV) == pytest.approx(0, abs=1e-6)
    if with_features:
        np.testing.assert_allclose(reference.features, FEATURES, rtol=0, atol=1e-6)
    else:
        with pytest.raises(MetricError, match="mean and covariance only"):
            _ = reference.known_features


@pytest.mark.parametrize("need", [False, True])
def test_a_folder_of_images(tmp_path, need):
    reference = build(write_folder(tmp_path / "real"), need=need)
    assert_is_reference(reference, with_features=need)
    assert reference.count == 30


def test_images_to_look_at_come_from_all_parts_of_a_folder_and_of_an_array(tmp_path):
    np.savez(tmp_path / "real.npz", arr_0=IMAGES)
    for path in (write_folder(tmp_path / "real"), tmp_path / "real.npz"):
        images = ReferenceSettings.parse(str(path)).images(ImageSets(tmp_path))
        shown = images.evenly_spaced(3).permute(0, 2, 3, 1)
        assert np.allclose((shown + 1) * 127.5, IMAGES[[0, 14, 29]], atol=1e-3)
        assert len(images.evenly_spaced(100)) == 30


def write_edm(path, mean, cov):
    np.savez(path, mu=mean, sigma=cov)


def write_adm(path, mean, cov):
    """guided-diffusion's VIRTUAL files: images without a name, statistics of two layers."""
    np.savez_compressed(path, IMAGES, mu=mean, sigma=cov, mu_s=np.zeros(5), sigma_s=np.eye(5))


def write_ours(path, mean, cov):
    np.savez(path, mu=mean, sigma=cov, count=30, extractor="pixels-1")


@pytest.mark.parametrize("write", [write_edm, write_adm, write_ours])
def test_statistics_of_pytorch_fid_clean_fid_edm_and_adm(tmp_path, write):
    write(tmp_path / "stats.npz", MEAN, COV)
    extractor, [path] = Pixels(), tmp_path.iterdir()
    assert_is_reference(build(path, extractor=extractor, cache=tmp_path / "cache"), with_features=False)
    assert extractor.seen == 0


def test_adms_statistics_are_inceptions_and_its_images_serve_the_rest(tmp_path):
    write_adm(tmp_path / "VIRTUAL.npz", MEAN + 1, COV)  # published: of more images than the file holds
    inception = build(tmp_path / "VIRTUAL.npz", need=True)
    np.testing.assert_allclose(inception.frechet.mean, MEAN + 1)
    np.testing.assert_allclose(inception.features, FEATURES, rtol=0, atol=1e-6)
    assert_is_reference(build(tmp_path / "VIRTUAL.npz", "clip"), with_features=False)
    assert_is_reference(build(tmp_path / "VIRTUAL.npz", "clip", need=True), with_features=True)


def damaged(content, generator):
    """``content`` cut off, or with a few bytes changed."""
    if generator.random() < 0.2:
        return content[: generator.randrange(len(content))]
    changed = bytearray(content)
    for _ in range(generator.choice([1, 1, 3, 10])):
        changed[generator.randrange(len(changed))] = generator.choice([generator.randrange(256), 0, 0x72, 0xFF])
    return bytes(changed)


def test_damaged_files_are_one_line(tmp_path):
    path, generator = tmp_path / "stats.npz", random.Random(0)
    write_edm(path, MEAN, COV)
    content = path.read_bytes()
    refused = []
    for _ in range(100):
        path.write_bytes(damaged(content, generator))
        try:
            build(path)
        except MetricError as error:
            refused.append(str(error))
    assert len(refused) > 50
    assert not any("\n" in message for message in refused)


def test_an_object_array_in_an_npz_is_refused(tmp_path):
    np.savez(tmp_path / "bad.npz", mu=np.array([Explosive()], dtype=object), sigma=COV)
    with pytest.raises(MetricError, match="cannot be read"):
        build(tmp_path / "bad.npz")


def test_references_of_another_extractor_are_refused(tmp_path):
    write_ours(tmp_path / "stats.npz", MEAN, COV)
    with pytest.raises(MetricError, match="was computed with pixels-1 and not with pixels-2"):
        build(tmp_path / "stats.npz", extractor=Pixels("pixels-2"))
    write_edm(tmp_path / "fewer.npz", MEAN[:5], COV[:5, :5])
    with pytest.raises(MetricError, match="has 5 features and the extractor pixels-1 12"):
        build(tmp_path / "fewer.npz")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npz", b"no zip", "cannot be read"),
        ("a.txt", b"", r"is not a reference; expected a folder or .zip of images, or an .npz with arr_0 \(images"),
    ],
)
def test_broken_and_unknown_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with network_files.refused(tmp_path / name, message):
        build(tmp_path / name)
    if name == "a.npz":
        with network_files.refused(tmp_path / name, message):
            _ = ReferenceSettings.parse(str(tmp_path / name)).holds_images


def test_an_array_of_other_content_is_told_what_it_must_hold_and_one_channel_is_enough(tmp_path):
    np.savez(tmp_path / "real.npz", images=IMAGES)
    with network_files.refused(tmp_path / "real.npz", r"arr_0 \(images \[N, H, W, 1 or 3\] in uint8\), or with mu"):
        build(tmp_path / "real.npz")
    np.savez(tmp_path / "real.npz", IMAGES)
    colours = build(tmp_path / "real.npz", need=True)
    np.savez(tmp_path / "grey.npz", examples.pixels(30, height=3, width=4, channels=1))
    grey = build(tmp_path / "grey.npz", need=True, cache=tmp_path / "other")
    assert (len(colours.features), len(grey.features)) == (30, 30)


def test_features_are_extracted_once_for_the_same_images_and_extractor(tmp_path):
    folder, extractor, cache = write_folder(tmp_path / "real"), Pixels(), tmp_path / "cache"
    first = build(folder, extractor=extractor, cache=cache)
    again = build(folder, extractor=extractor, cache=cache, batch_size=30)
    assert extractor.seen == 30
    assert first.identity == again.identity
    with_features = build(folder, extractor=extractor, need=True, cache=cache)
    assert extractor.seen == 60
    assert build(folder, extractor=extractor, need=True, cache=cache).features.shape == (30, D)
    assert extractor.seen == 60
    [features_file] = cache.glob("*.npy")
    whole = features_file.read_bytes()
    for damaged in (whole[:-1], b""):
        features_file.write_bytes(damaged)
        assert build(folder, extractor=extractor, need=True, cache=cache).features.shape == (30, D)
        assert features_file.read_bytes() == whole
    assert with_features.identity == first.identity
    assert build(folder, extractor=Pixels("pixels-2"), cache=cache).identity != first.identity


def test_statistics_are_loaded_bit_for_bit_and_identified_by_all_that_they_say(tmp_path):
    mean, cov = MEAN, COV
    write_ours(tmp_path / "digits.npz", mean, cov)
    statistics, _ = read_reference_file(tmp_path / "digits.npz", "inception", images=False)
    assert statistics is not None
    gaussian = statistics.gaussian
    assert np.array_equal(gaussian.mean, mean)
    assert np.array_equal(gaussian.cov, cov)
    assert (statistics.count, statistics.extractor) == (30, "pixels-1")
    identity = Reference.of_gaussian(Pixels(), gaussian, 30).identity

    def identity_of(mean, cov, count, name="pixels-1"):
        return Reference.of_gaussian(Pixels(name), FrechetReference(mean, cov), count).identity

    assert identity == identity_of(mean, cov, 30)
    changed = [(mean + 1e-9, cov, 30), (mean, cov * (1 + 1e-9), 30), (mean, cov, 31), (mean, cov, None)]
    others = {identity_of(*other) for other in [*changed, (mean, cov, 30, "pixels-2")]}
    assert len(others - {identity}) == 5


MU, SIGMA = np.zeros(3), np.eye(3)


@pytest.mark.parametrize(
    "arrays",
    [
        {"mu": MU},
        {"mu": MU, "sigma": np.eye(4)},
        {"mu": MU, "sigma": SIGMA, "count": [10, 11]},
        {"mu": MU, "sigma": SIGMA * np.nan},
        {"mu": MU, "sigma": -SIGMA},
        {"mu": MU, "sigma": np.diag([1.0, 1.0, -1e-3])},
        {"mu": MU, "sigma": SIGMA + np.eye(3, k=1) * 0.1},
    ],
    ids=str,
)
def test_arrays_that_are_no_statistics_are_refused(tmp_path, arrays):
    np.savez(tmp_path / "bad.npz", **arrays)
    with network_files.refused(tmp_path / "bad.npz"):
        read_reference_file(tmp_path / "bad.npz", "inception", images=False)


def test_a_covariance_of_few_images_in_float32_is_accepted(tmp_path):
    features = np.random.default_rng(0).standard_normal((10, 64)).astype(np.float32)
    deviations = features - features.mean(axis=0)
    sigma = deviations.T @ deviations / np.float32(9)
    assert np.linalg.eigvalsh(sigma.astype(np.float64))[0] < 0  # by rounding
    np.savez(tmp_path / "stats.npz", mu=features.mean(axis=0), sigma=sigma)
    statistics, _ = read_reference_file(tmp_path / "stats.npz", "inception", images=False)
    assert statistics is not None


@pytest.mark.parametrize("changes", [{}, {"held_out": examples.reference(), "size": (2, 8)}], ids=["seen", "held out"])
def test_samples_of_another_size_than_real_images_are_refused(changes):
    reference = dataclasses.replace(examples.reference(), **changes)
    metrics = image_metrics(suite({"inception": reference}), 10, group="held-out")
    with pytest.raises(ObjectiveError, match="samples are 2x8 and the images of the reference 4x4"):
        metrics.update(torch.zeros(10, 1, 2, 8))


def test_statistics_alone_are_of_any_size():
    reference = Reference.of_gaussian(examples.Pixels(), FrechetReference(np.zeros(16), np.eye(16)))
    metrics = image_metrics(suite({"inception": reference}), 10)
    for shape in [(1, 4, 4), (1, 2, 8)]:
        metrics.update(torch.rand(5, *shape))
    assert metrics.compute()[0] > 0


def test_real_images_that_an_extractor_does_not_take_are_named_with_their_size(tmp_path):
    class Refusing(Pixels):
        def __call__(self, images):
            return images.flatten(1) @ torch.zeros(5, D)

    refused = r"reference: mine, given images of 3x2x2, raised RuntimeError: .*shape"
    with pytest.raises(MetricError, match=refused):
        build(write_folder(tmp_path / "real"), "mine", Refusing())
