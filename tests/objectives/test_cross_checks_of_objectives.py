"""Which cross-check objectives over images take from their settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lcsc_opt.metrics import Scores
from lcsc_opt.metrics.extractors import by_name
from lcsc_opt.objective.settings import ImageObjectiveSettings
from tests.objectives.image_objectives import Means, settings


class Corners(Means):
    """Stands for a published extractor."""

    def __init__(self) -> None:
        super().__init__(name="tests-corners")


@pytest.fixture(autouse=True)
def published(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("inception", "clip"):
        monkeypatch.setitem(by_name.PUBLISHED, name, lambda weights, device: Corners())


@pytest.fixture
def real(folder: Path) -> str:
    images = folder / "real"
    images.mkdir()
    generator = np.random.default_rng(0)
    for i in range(20):
        Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8)).save(images / f"{i}.png")
    return str(images)


def scores(folder: Path, **changes: Any) -> Scores:
    return ImageObjectiveSettings(checkpoints="any", **settings(folder, **changes)).scores()


@pytest.mark.parametrize(("loss", "cross_check"), [("fid", "fid@clip"), ("kid", "fid@clip"), ("fid@clip", "fid")])
def test_without_held_out_metrics_it_is_the_other_published_extractor(
    folder: Path, real: str, loss: str, cross_check: str
) -> None:
    assert str(scores(folder, loss=loss, reference=real).cross_check_metric) == cross_check


@pytest.mark.parametrize("named", [[], ["kid"], ["recall@clip"]])
def test_who_names_held_out_metrics_gets_those(
    folder: Path, real: str, named: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert scores(folder, loss="fid", reference=real, held_out_metrics=named).cross_check_metric is None
    assert "cross_check" not in capsys.readouterr().err


def test_what_is_added_is_no_part_of_the_study(folder: Path, real: str) -> None:
    automatic = scores(folder, loss="fid", reference=real)
    assert automatic.cross_check_metric is not None
    assert automatic.describe() == scores(folder, loss="fid", reference=real, held_out_metrics=[]).describe()
    named = scores(folder, loss="fid", reference=real, held_out_metrics=["fid@clip"])
    assert str(named.cross_check_metric) == "fid@clip"
    assert named.describe() != automatic.describe()


def test_nothing_is_downloaded_for_an_extractor_of_ones_own(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = scores(folder, reference=str(folder / "reference.npz"))
    assert own.cross_check_metric is None
    assert "cross-check" not in capsys.readouterr().err
