"""What commands say on stderr: notices, with ``-v`` details too, with ``-q`` errors only."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands import Typed

STUDY = """
name: said
objective: {file: function.py, settings: {callable: "said_loss:lose", steps: [1, 2]}}
optimizers: [{Grid: {profile: single}}]
budget: {evaluations: 2}
held_out: {images: 10}
"""


@pytest.fixture
def study_file(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.syspath_prepend(str(workplace))
    (workplace / "said_loss.py").write_text("def lose(coefficients):\n    return coefficients[0]\n")
    (workplace / "said.yaml").write_text(STUDY)
    return "said.yaml"


def test_a_quiet_command_prints_errors_only(study_file: str, typed: Typed) -> None:
    assert "nothing is held out" in typed("run", study_file).err
    assert typed("-q", "run", study_file, "name=quiet") == ("", "")
    assert typed("--quiet", "show", "nowhere", status=2).err.startswith("lcsc: nowhere: no such study")
    assert "nothing is held out" in typed("run", study_file, "name=again").err, "the next command is not quiet"


def test_a_verbose_command_prints_where_an_error_was_raised(workplace: Path, typed: Typed) -> None:
    assert "Traceback" not in typed("list", status=2).err
    said = typed("-v", "list", status=2).err
    assert said.startswith("lcsc: studies.db: no such database")
    assert "Traceback" in said
