"""What ``--dry-run`` can know of an objective's settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.study_file import ObjectiveSpec
from lcsc_opt.cli import run as lcsc
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


def test_a_dry_run_names_an_objective_without_a_check(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("checked_settings.py").write_text(CHECKED + BUILD)
    Path("unchecked_settings.py").write_text(CHECKED[: CHECKED.index("    def")] + BUILD)
    Path("runs").mkdir()
    assert dry_run("checked_settings.py", capsys) == ""
    assert dry_run("unchecked_settings.py", capsys) == (
        "lcsc: unchecked_settings.py: its settings have no check, so whether what they name is there is not known yet\n"
    )


def dry_run(objective: str, capsys: pytest.CaptureFixture[str]) -> str:
    settings = {"file": objective, "settings": {"checkpoints": "runs"}}
    study = {"name": "checks", "objective": settings, "optimizers": ["LCSC"], "budget": {"evaluations": 9}}
    Path("checks.yaml").write_text(yaml.safe_dump(study))
    assert lcsc(["run", "checks.yaml", "--dry-run"]) == 0
    return capsys.readouterr().err
