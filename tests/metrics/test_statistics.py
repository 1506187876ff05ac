"""Statistics of features: merging, and the reference file."""

import io
import pickle
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics import FeatureStatistics, ReferenceStatistics, reference_warning


def features_of(count, dimension=5, seed=0):
    return np.random.default_rng(seed).normal(3.0, 2.0, (count, dimension))


def reference_of(count=20, extractor="digits-5-abc"):
    return ReferenceStatistics.from_statistics(FeatureStatistics.from_features(features_of(count)), extractor)


def assert_same(first, second):
    assert first.count == second.count
    np.testing.assert_allclose(first.mean, second.mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(first.scatter, second.scatter, rtol=1e-9, atol=1e-9)


def test_covariance_is_that_of_numpy():
    features = features_of(20)
    statistics = FeatureStatistics.from_features(features)
    assert statistics.count == 20
    np.testing.assert_allclose(statistics.mean, features.mean(axis=0))
    np.testing.assert_allclose(statistics.covariance, np.cov(features, rowvar=False))


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_parts_merge_into_the_whole(counts, seed):
    features = features_of(sum(counts), seed=seed)
    parts = np.split(features, np.cumsum(counts)[:-1])
    merged = FeatureStatistics.from_features(parts[0])
    for part in parts[1:]:
        merged = merged.merge(FeatureStatistics.from_features(part))
    assert_same(merged, FeatureStatistics.from_features(features))


@settings(deadline=None)
@given(st.tuples(*[st.integers(1, 30)] * 3), st.integers(0, 2**32 - 1))
def test_merging_is_associative_and_commutative(counts, seed):
    a, b, c = (FeatureStatistics.from_features(features_of(n, seed=seed + i)) for i, n in enumerate(counts))
    assert_same(a.merge(b).merge(c), a.merge(b.merge(c)))
    assert_same(a.merge(b), b.merge(a))


def test_merging_is_exact_far_from_the_origin():
    features = features_of(40) * 1e-3 + 1e6
    first, second = (FeatureStatistics.from_features(part) for part in np.split(features, 2))
    expected = np.cov(features, rowvar=False)
    np.testing.assert_allclose(first.merge(second).covariance, expected, rtol=1e-4, atol=1e-4 * expected.max())


def test_statistics_of_other_dimensions_do_not_merge():
    with pytest.raises(MetricError, match="5 and of 4 features"):
        FeatureStatistics.from_features(features_of(5)).merge(FeatureStatistics.from_features(features_of(5, 4)))


def test_one_image_has_no_covariance():
    with pytest.raises(MetricError, match="at least 2 images"):
        _ = FeatureStatistics.from_features(features_of(1)).covariance


def test_saved_reference_is_loaded_bit_for_bit(tmp_path):
    saved = reference_of()
    path = tmp_path / "new folder" / "digits.npz"
    saved.save(path)
    loaded = ReferenceStatistics.load(path)
    np.testing.assert_array_equal(loaded.mean, saved.mean)
    np.testing.assert_array_equal(loaded.cov, saved.cov)
    assert (loaded.count, loaded.extractor) == (20, "digits-5-abc")
    assert loaded.sha256 == saved.sha256
    assert [file.name for file in path.parent.iterdir()] == ["digits.npz"]


def test_saved_reference_can_be_read_as_pytorch_fid_does(tmp_path):
    reference = reference_of(extractor=None)
    reference.save(tmp_path / "digits.npz")
    with np.load(tmp_path / "digits.npz") as file:
        np.testing.assert_array_equal(file["mu"][:], reference.mean)
        np.testing.assert_array_equal(file["sigma"][:], reference.cov)
        assert "extractor" not in file


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_files_that_hold_only_mu_and_sigma_are_read(tmp_path, dtype, write):
    reference = reference_of()
    path = tmp_path / "theirs.npz"
    write(path, mu=reference.mean.astype(dtype), sigma=reference.cov.astype(dtype))
    loaded = ReferenceStatistics.load(path)
    assert loaded.count is None
    assert loaded.extractor is None
    assert loaded.cov.dtype == np.float64
    np.testing.assert_allclose(loaded.cov, reference.cov, rtol=1e-5, atol=1e-6)


def test_digest_tells_every_field_apart():
    one = reference_of()
    others = [
        ReferenceStatistics(one.mean + 1e-9, one.cov, one.count, one.extractor),
        ReferenceStatistics(one.mean, one.cov * (1 + 1e-9), one.count, one.extractor),
        ReferenceStatistics(one.mean, one.cov, 21, one.extractor),
        ReferenceStatistics(one.mean, one.cov, None, one.extractor),
        ReferenceStatistics(one.mean, one.cov, one.count, "other"),
    ]
    assert len({one.sha256, *(other.sha256 for other in others)}) == 6
    assert one.sha256 == ReferenceStatistics(one.mean, one.cov, one.count, one.extractor).sha256


MU, SIGMA = np.zeros(3), np.eye(3)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": MU}, "holds no sigma"),
        ({"sigma": SIGMA}, "holds no mu"),
        ({"features": MU}, "no mu and no sigma"),
        ({"mu": MU[None], "sigma": SIGMA}, "mu: expected a vector"),
        ({"mu": MU, "sigma": np.eye(4)}, r"sigma: expected the shape \[3, 3\]"),
        ({"mu": MU, "sigma": SIGMA * np.nan}, "sigma: holds NaN"),
        ({"mu": MU, "sigma": -SIGMA}, "sigma: has negative eigenvalues"),
        ({"mu": MU, "sigma": SIGMA, "count": 1}, "at least 2 images"),
        ({"mu": MU, "sigma": SIGMA, "count": 10.5}, "count: expected one integer"),
        ({"mu": MU, "sigma": SIGMA, "count": [10, 11]}, "count: expected one integer"),
        ({"mu": MU, "sigma": SIGMA, "extractor": 3}, "extractor: expected one string"),
        ({"mu": np.array(["a"] * 3), "sigma": SIGMA}, "mu: expected real numbers"),
    ],
)
def test_wrong_arrays_are_refused_with_the_file_named(tmp_path, arrays, message):
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(MetricError, match=message) as caught:
        ReferenceStatistics.load(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


class Explosive:
    def __reduce__(self):
        return (pytest.fail, ("the file was executed",))


def truncated_npz():
    buffer = io.BytesIO()
    np.savez(buffer, mu=MU, sigma=SIGMA)
    return buffer.getvalue()[:-60]


def damaged_npz():
    buffer = io.BytesIO()
    np.savez(buffer, mu=MU, sigma=SIGMA)
    content = bytearray(buffer.getvalue())
    position = content.find(b"descr")
    content[position : position + 5] = b"-----"
    return bytes(content)


def npz_with_objects():
    buffer = io.BytesIO()
    np.savez(buffer, mu=np.array([Explosive()], dtype=object), sigma=SIGMA)
    return buffer.getvalue()


def npz_with_text():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("mu.npy", "not an array")
        file.writestr("sigma.npy", "not an array")
    return buffer.getvalue()


def single_array():
    buffer = io.BytesIO()
    np.save(buffer, SIGMA)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"these are no statistics",
        pickle.dumps({"mu": MU, "sigma": Explosive()}),
        truncated_npz(),
        damaged_npz(),
        npz_with_objects(),
        npz_with_text(),
        single_array(),
    ],
    ids=["empty", "text", "pickle", "truncated", "damaged", "objects", "npz-of-text", "npy"],
)
def test_files_that_are_no_statistics_are_refused_unexecuted(tmp_path, content):
    path = tmp_path / "bad.npz"
    path.write_bytes(content)
    with pytest.raises(MetricError, match=r"expected an \.npz|expected real numbers") as caught:
        ReferenceStatistics.load(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder_are_refused(tmp_path):
    with pytest.raises(MetricError, match="does not exist"):
        ReferenceStatistics.load(tmp_path / "missing.npz")
    with pytest.raises(MetricError, match="cannot be read"):
        ReferenceStatistics.load(tmp_path)


def test_saving_elsewhere_than_npz_is_refused(tmp_path):
    with pytest.raises(MetricError, match=r"written as \.npz"):
        reference_of().save(tmp_path / "digits.pt")


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "digits.npz"
    reference_of().save(path)
    before = path.read_bytes()

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(MetricError, match="No space left"):
        reference_of(count=30).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("count", "dimension", "warns"), [(64, 64, True), (65, 64, False), (None, 64, False)])
def test_too_few_images_are_warned_of(count, dimension, warns):
    warning = reference_warning(count, dimension)
    assert (warning is not None) is warns


def test_warning_says_what_the_number_means():
    warning = reference_warning(50, 64, what="sample")
    assert "the sample has 50 images for 64 features" in warning
    assert "rank 49" in warning
    assert "biased" in warning
    assert "\n" not in warning
