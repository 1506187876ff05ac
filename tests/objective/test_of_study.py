"""What an experiment knows of the checkpoints that it began with."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lcsc_opt.base.paths import BuildContext, KnownCheckpoints
from lcsc_opt.base.study_spec import ObjectiveSpec
from lcsc_opt.objective.checkpoints_alone import CheckpointsAlone, checkpoint_changes
from lcsc_opt.objective.of_study import found_checkpoints, known_checkpoints, moved, say_found


@pytest.mark.parametrize("text", ["run/*.pt", "*/model.pt", "**/model.pt", "run/model.pt"])
def test_a_glob_that_finds_other_files_from_another_folder_has_moved(tmp_path: Path, text: str) -> None:
    for project in ("first", "second"):
        (tmp_path / project / "run").mkdir(parents=True)
        (tmp_path / project / "run" / "model.pt").touch()
    stored: dict[str, Any] = {"places": {text: str(tmp_path / "first" / text)}}
    assert moved(tmp_path / "second", stored) == [text]
    assert moved(tmp_path / "first", stored) == []


@pytest.mark.parametrize(
    "settings", [{"checkpoints": 20}, {"checkpoints": "run/*.pt", "select": "best"}, {"checkpoints": "a", "steps": 4}]
)
def test_settings_of_these_names_may_mean_something_else_in_an_objective_of_the_users_own(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    spec = ObjectiveSpec(file="own.py", settings=settings)
    stored: dict[str, Any] = {"checkpoints": "0" * 64, "steps": [1, 2], "directory": None, "places": {}}
    stored["objective"] = {"file": spec.file, "settings": spec.settings}
    assert known_checkpoints(spec, None, stored) == KnownCheckpoints("0" * 64, (1, 2))
    assert not any(checkpoint_changes(stored, tmp_path))
    assert CheckpointsAlone.of(stored, None, tmp_path) is None


def test_the_files_of_a_study_are_named_in_the_order_of_their_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"epoch={epoch}-step={50 * epoch}.ckpt" for epoch in (10, 2, 8)]  # as a shell lists them
    for name in names:
        (tmp_path / name).write_bytes(bytes(100))
    settings: dict[str, Any] = {"checkpoints": names, "steps": [500, 100, 400]}
    say_found(found_checkpoints(ObjectiveSpec(file="torch_module.py", settings=settings), BuildContext(tmp_path)))
    assert re.search(r"3 checkpoints, .*epoch=2-step=100.ckpt to epoch=10-step=500.ckpt", capsys.readouterr().err)
