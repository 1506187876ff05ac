"""Which held-out metrics objectives over images take from their settings: a cross-check, and evaluation metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics import Scores
from lcsc_opt.metrics.extractors import by_name
from lcsc_opt.objective.settings import ImageObjectiveSettings
from tests.objectives.image_objectives import PIXELS, Means, settings

EXTRACTOR = PIXELS.removeprefix("fid")
DEFAULT = [f"{formula}{EXTRACTOR}" for formula in ("precision", "recall", "sliced", "near")]
HELD_OUT = [f"{formula}{EXTRACTOR}" for formula in ("fid_held_out", "nearer_train", "authenticity")]


@pytest.fixture(autouse=True)
def published(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small extractor in place of the published ones."""
    for name in ("inception", "clip"):
        monkeypatch.setitem(by_name.PUBLISHED, name, lambda weights, device: Means(name="tests-corners"))


@pytest.fixture
def real(folder: Path) -> str:
    for name, count in (("real", 20), ("others", 12)):
        (folder / name).mkdir()
        for i, pixels in enumerate(np.random.default_rng(count).integers(0, 256, (count, 8, 8), dtype=np.uint8)):
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return str(folder / "real")


def scores(folder: Path, **changes: Any) -> Scores:
    return ImageObjectiveSettings(checkpoints="any", **settings(folder, **changes)).scores()


def evaluation_metrics(found: Scores) -> list[str]:
    return [str(metric) for metric in found.evaluation_metrics]


@pytest.mark.parametrize(("loss", "cross_check"), [("fid", "fid@clip"), ("kid", "fid@clip"), ("fid@clip", "fid")])
def test_without_held_out_metrics_the_cross_check_is_in_the_other_published_features(
    folder: Path, real: str, loss: str, cross_check: str
) -> None:
    automatic = scores(folder, loss=loss, reference=real)
    assert str(automatic.cross_check_metric) == cross_check
    none = scores(folder, loss=loss, reference=real, held_out_metrics=[])
    assert none.cross_check_metric is None
    for other in ("kid", "recall@clip"):
        assert scores(folder, loss="fid", reference=real, held_out_metrics=[other]).cross_check_metric is None
    assert automatic.describe() == none.describe(), "what is added is no part of the study"
    named = scores(folder, loss=loss, reference=real, held_out_metrics=[cross_check])
    assert str(named.cross_check_metric) == cross_check
    assert named.describe() != automatic.describe()


def test_a_folder_of_images_has_the_usual_ones(folder: Path, real: str) -> None:
    found = scores(folder, reference=real)
    described = found.describe()
    assert found.references[EXTRACTOR.removeprefix("@")].features is None  # read when a report needs them
    assert evaluation_metrics(found) == DEFAULT
    assert found.describe() == described
    assert found.real_halves() == {}


def test_a_file_of_mean_and_covariance_has_none_and_downloads_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings(folder)  # which writes the file
    own = scores(folder, reference=str(folder / "reference.npz"))
    assert (own.cross_check_metric, evaluation_metrics(own)) == (None, [])
    assert "cross-check" not in capsys.readouterr().err


@pytest.mark.usefixtures("real")
def test_a_reference_in_two_folders_has_more(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    found = scores(folder, reference={"train": "real", "held_out": "others"})
    assert found.references[EXTRACTOR.removeprefix("@")].held_out is not None  # also before a report
    assert evaluation_metrics(found) == [*DEFAULT, *HELD_OUT]
    halves = found.real_halves()
    assert list(halves) == list(found.signs) == [*evaluation_metrics(found), "fdr"]
    assert halves[f"nearer_train{EXTRACTOR}"] == 20 / 32
    assert found.describe() == scores(folder, reference="real", held_out_metrics=[]).describe()
    with pytest.raises(MetricError, match="missing"):
        scores(folder, reference={"train": "real", "held_out": "missing"})
