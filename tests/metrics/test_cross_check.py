"""A cross-check: which one, built when, and what is said where it cannot be had."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics import Scores, View, frechet_distance
from lcsc_opt.metrics import cross_check as module
from lcsc_opt.metrics.cross_check import published_cross_check
from lcsc_opt.metrics.extractors.clip import ClipExtractor
from lcsc_opt.metrics.from_settings import build_scores
from lcsc_opt.metrics.names import MetricName
from lcsc_opt.metrics.scores import CrossCheckSpace
from tests.metrics import network_files
from tests.metrics.test_scores import Pixels, both, images, reference, score, statistics


class Doubled(Pixels):
    """Other features of the same images."""

    name = "doubled"

    def __call__(self, batch):
        return 2 * super().__call__(batch).flip(1)


class Space:
    """Builds a view, and counts how often."""

    def __init__(self, view):
        self.view, self.built = view, 0

    def __call__(self):
        self.built += 1
        return self.view


def cross_check(view=None):
    return Space(View(Doubled(), reference()) if view is None else view)


def test_it_is_built_and_computed_for_held_out_reports_only():
    space = cross_check()
    scores = Scores.fid(Pixels(), statistics(), cross_check=space)
    loss, metrics = score(scores)
    assert (metrics, space.built) == ({"fid": loss}, 0)
    for _ in range(2):
        reported, measured = score(scores, held_out=True)
    assert (reported, list(measured), space.built) == (loss, ["fid", "fid@cross_check"], 1)
    features = 2 * images().flatten(1).flip(1).double().numpy()
    expected = frechet_distance(features.mean(0), np.cov(features.T), statistics().mean, statistics().cov)
    assert measured["fid@cross_check"] == pytest.approx(expected, rel=1e-6)
    assert score(scores)[1] == metrics, "a search does not compute it afterwards either"


def test_it_is_no_part_of_the_description():
    plain, scores = (Scores.fid(Pixels(), statistics(), cross_check=space) for space in (None, cross_check()))
    assert scores.describe() == plain.describe()
    score(scores, held_out=True)
    assert scores.describe() == plain.describe()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"held_out_metrics": ["kid@m:f"]}, "kid@m:f"),
        ({"held_out_metrics": ["kid@m:f", "fid@m:f"]}, "fid@m:f"),
        ({"metrics": ["fid@m:f"]}, "fid@m:f"),
        ({"loss": "fid@m:f", "metrics": ["fid"]}, "fid"),
        ({"held_out_metrics": ["recall@m:f", "kid"]}, "fid@cross_check"),  # no distance in other features
        ({"loss": {"fid": 1, "fid@m:f": 1}}, "fid@cross_check"),
    ],
)
def test_a_distance_that_was_asked_for_comes_first(settings, expected):
    space = cross_check()
    scores = both(**{"loss": "fid", **settings}, cross_check=CrossCheckSpace(MetricName("fid", "cross_check"), space))
    assert str(scores.cross_check_metric) == expected
    assert space.built == (expected == "fid@cross_check")
    assert expected in score(scores, held_out=True)[1]


def test_a_view_that_metrics_use_already_is_not_built_again():
    space = cross_check()
    scores = both(
        loss="fid", held_out_metrics=["recall@m:f"], cross_check=CrossCheckSpace(MetricName("fid", "m:f"), space)
    )
    assert (str(scores.cross_check_metric), space.built) == ("fid@m:f", 0)
    assert list(score(scores, held_out=True)[1]) == ["fid", "recall@m:f", "fid@m:f"]


def test_one_that_cannot_be_built_is_left_out_and_tried_once():
    space = Space(None)
    scores = Scores.fid(Pixels(), statistics(), cross_check=space)
    assert list(score(scores, held_out=True)[1]) == list(score(scores, held_out=True)[1]) == ["fid"]
    assert (scores.cross_check_metric, space.built) == (None, 1)


def test_without_one_there_is_none():
    assert Scores.fid(Pixels(), statistics()).cross_check_metric is None
    assert both(loss="fid", metrics=["precision@m:f"]).cross_check_metric is None


# published extractors


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "ViT-B-32.pt"
    network_files.write_clip(path)
    return path


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "real"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(30):
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def numbers(tmp_path):
    """Statistics of Inception's features, without images."""
    path = tmp_path / "fid.npz"
    np.savez(path, mu=np.zeros(2048), sigma=np.eye(2048))
    return path


def space_of(tmp_path, loss="fid", **settings):
    return published_cross_check(loss, **{"reference": None, "cache": tmp_path / "cache", **settings})


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("fid", "fid@clip"),
        ("kid", "fid@clip"),
        ("fid@clip", "fid"),
        ("fid@dinov2", "fid"),
        ({"fid": 1, "recall@clip": 1}, "fid@dinov2"),
        ({"fid": 1, "fid@m:f": 1}, "fid@clip"),
    ],
)
def test_the_first_published_extractor_that_the_loss_does_not_look_through(tmp_path, loss, expected):
    assert str(space_of(tmp_path, loss).metric) == expected


def test_a_loss_through_all_of_them_leaves_none(tmp_path):
    assert space_of(tmp_path, {"fid": 1, "fid@clip": 1, "fid@dinov2": 1}) is None


@pytest.mark.parametrize("form", ["shared", "of inception", "of its own", "ADM's"])
def test_clip_sees_the_reference_images(tmp_path, archive, photographs, numbers, form):
    adm = tmp_path / "adm.npz"
    pixels = np.stack([np.asarray(Image.open(photographs / f"{i}.png")) for i in range(30)])
    np.savez(adm, arr_0=pixels, mu=np.zeros(2048), sigma=np.eye(2048))
    given = {
        "shared": str(photographs),
        "of inception": {"inception": str(photographs)},
        "of its own": {"inception": str(numbers), "clip": str(photographs)},
        "ADM's": str(adm),
    }[form]
    view = space_of(tmp_path, reference=given, weights={"clip": str(archive)}).build()
    features = ClipExtractor(archive)(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1).double().numpy()
    np.testing.assert_allclose(view.reference.statistics.mean, features.mean(0), atol=1e-5)
    np.testing.assert_allclose(view.reference.statistics.cov, np.cov(features.T), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"reference": None}, "it needs reference images"),
        ({"reference": "numbers"}, "it needs reference images"),
        ({"reference": {"inception": "numbers"}}, "reference images; give them under reference: {clip: a folder"),
        ({"reference": {"clip": "numbers"}}, "the reference statistics have 2048 features"),
        ({"weights": {"clip": "missing.pt"}}, "missing.pt does not exist"),
        ({"loss": "fid@m:f"}, "its features may not suit your images, since the loss uses your own, m:f"),
    ],
)
def test_what_is_missing_is_said_in_one_line(tmp_path, archive, photographs, numbers, capsys, changes, reason):
    given = {"reference": str(photographs), "weights": {"clip": str(archive)}, **changes}
    if isinstance(given["reference"], dict):
        given["reference"] = dict.fromkeys(given["reference"], str(numbers))
    elif given["reference"] == "numbers":
        given["reference"] = str(numbers)
    assert space_of(tmp_path, **given).build() is None
    (line,) = capsys.readouterr().err.splitlines()
    assert "no cross-check: fid" in line
    assert reason in line
    assert "held_out_metrics" in line


def test_weights_that_cannot_be_downloaded_are_no_error(tmp_path, photographs, monkeypatch, capsys):
    def refuse(url, *_, **__):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    assert space_of(tmp_path, reference=str(photographs)).build() is None
    said = capsys.readouterr().err.splitlines()[-1]
    assert "cannot be downloaded (Network is unreachable)" in said
    assert "weights: {clip: PATH}" in said


def test_scores_of_a_study_file_take_its_reference_and_weights(tmp_path, archive, photographs, monkeypatch, capsys):
    monkeypatch.setitem(module.build_extractor.__globals__["PUBLISHED"], "inception", lambda *_, **__: Doubled())
    features = tmp_path / "features.safetensors"
    save_file({"features": images(60).flatten(1)}, features)
    shared = {
        "reference": {"inception": str(features), "clip": str(photographs)},
        "weights": {"clip": str(archive)},
        "cache": tmp_path / "cache",
    }
    with pytest.raises(MetricError, match="no metric uses an extractor 'clip'"):
        build_scores(**shared)
    capsys.readouterr()
    scores = build_scores(cross_check=published_cross_check("fid", **shared), **shared)
    assert list(score(scores, held_out=True)[1]) == ["fid", "fid@clip"]
    assert "not read" not in capsys.readouterr().err
