"""What ``--dry-run`` can know of an objective's settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.study_file import ObjectiveSpec
from lcsc_opt.objective.loading import check_objective

CHECKED = """
from pathlib import Path
from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.settings import FrozenModel


class Settings(FrozenModel):
    checkpoints: str

    def check(self):
        if not Path(self.checkpoints).exists():
            raise ObjectiveError(f"{self.checkpoints}: no such folder")
"""
BUILD = "\ndef build(settings):\n    raise AssertionError('nothing is built')\n"


def test_an_objective_checks_its_settings(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("checked_settings.py").write_text(CHECKED + BUILD)
    with pytest.raises(ObjectiveError, match="runs: no such folder"):
        check_objective(ObjectiveSpec(file="checked_settings.py", settings={"checkpoints": "runs"}))
    Path("runs").mkdir()
    check_objective(ObjectiveSpec(file="checked_settings.py", settings={"checkpoints": "runs"}))
    assert capsys.readouterr().err == ""


def test_an_objective_without_a_check_says_so(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("unchecked_settings.py").write_text(CHECKED[: CHECKED.index("    def")] + BUILD)
    check_objective(ObjectiveSpec(file="unchecked_settings.py", settings={"checkpoints": "runs"}))
    said = "unchecked_settings.py: its settings have no check, so whether what they name is there is not known yet"
    assert said in capsys.readouterr().err
