"""Requests that are refused before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from lcsc_opt.base.errors import TrainingError
from lcsc_opt.training.preparing import run
from lcsc_opt.training.recipes.diffusion import Flow
from lcsc_opt.training.trainer import Training


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (".", "-o .: expected the name of a new trajectory, such as run.trajectory"),
        ("..", r"\.\. exists already: not created by lcsc train; move it"),
        ("taken", "taken exists already: not created by lcsc train; move it, or name another trajectory"),
    ],
)
def test_a_training_is_not_written_into_a_folder_of_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, message: str
) -> None:
    place = tmp_path / "place"
    (place / "taken").mkdir(parents=True)
    monkeypatch.chdir(place)
    with pytest.raises(TrainingError, match=message):
        run(Training(Flow(), "digits", Path(out), steps=4, checkpoint_every=2))
    assert list(place.iterdir()) == [place / "taken"]
