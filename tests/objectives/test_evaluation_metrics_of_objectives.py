"""Which evaluation metrics objectives over images take from their settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics import Scores
from lcsc_opt.objective.settings import ImageObjectiveSettings
from tests.objectives.image_objectives import PIXELS, settings

EXTRACTOR = PIXELS.removeprefix("fid")
DEFAULT = [f"{formula}{EXTRACTOR}" for formula in ("precision", "recall", "sliced", "near")]
HELD_OUT = [f"{formula}{EXTRACTOR}" for formula in ("fid_held_out", "nearer_train", "authenticity")]


def real(folder: Path, name: str, count: int = 20) -> str:
    images = folder / name
    images.mkdir()
    generator = np.random.default_rng(len(name))
    for i in range(count):
        Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8)).save(images / f"{i}.png")
    return name


def scores(folder: Path, **changes: Any) -> Scores:
    return ImageObjectiveSettings(checkpoints="any", **settings(folder, **changes)).scores()


def evaluation_metrics(found: Scores) -> list[str]:
    return [str(metric) for metric in found.evaluation_metrics]


def test_a_folder_has_them_and_its_features_are_read_when_a_report_needs_them(folder: Path) -> None:
    found = scores(folder, reference=str(folder / real(folder, "real")))
    described = found.describe()
    assert found.references[EXTRACTOR.removeprefix("@")].features is None
    assert evaluation_metrics(found) == DEFAULT
    assert found.describe() == described
    assert found.real_halves() == {}


def test_files_of_mean_and_covariance_have_none_and_nothing_is_said_of_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings(folder)  # which writes the file
    found = scores(folder, reference=str(folder / "reference.npz"))
    capsys.readouterr()
    assert evaluation_metrics(found) == []
    assert "judge" not in capsys.readouterr().err


def test_two_folders_lie_beside_the_study_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    split = {"train": real(folder, "real"), "held_out": real(folder, "others", 12)}
    found = scores(folder, reference=split)
    assert evaluation_metrics(found) == [*DEFAULT, *HELD_OUT]
    floors = found.real_halves()
    assert list(floors) == list(found.signs) == [*evaluation_metrics(found), "fdr"]
    assert floors[f"nearer_train{EXTRACTOR}"] == 20 / 32
    assert found.describe() == scores(folder, reference=split["train"], held_out_metrics=[]).describe()
    with pytest.raises(MetricError, match="missing"):
        scores(folder, reference={"train": "real", "held_out": "missing"})
