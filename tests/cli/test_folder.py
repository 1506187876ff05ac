"""Commands in the folder of a study file find its database."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands import Typed
from tests.model_studies import STUDY, write_model_study


def test_commands_find_the_database_of_the_study_file(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    typed = Typed(capsys)
    budget = {"evaluations": 6}
    write_model_study(workplace, optimizers=["LCSC"], storage="sqlite:///elsewhere.db", budget=budget)
    typed("run", "small.yaml")
    assert not Path("studies.db").exists()
    assert [row["study"] for row in typed.json("list")] == [STUDY]
    assert typed.json("show", STUDY)["state"] == "finished"
    assert [row["study"] for row in typed.json("compare", "small")] == [STUDY]
    typed("report", "small")
    typed("export", STUDY, "-o", "best.safetensors")
    assert Path("small.html").exists()
    assert Path("best.safetensors").exists()
    assert typed("show", STUDY, "--storage", "sqlite:///studies.db", status=2), "an option counts more"
