"""Studies of one experiment are compared with each other, so their losses have to mean the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lcsc_opt.cli import run as lcsc
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import study_names

MODULE = """
def loss(c):
    return float((c**2).sum())

def doubled(c):
    return 2 * loss(c)
"""
STUDY: dict[str, Any] = {
    "name": "a",
    "objective": {"file": "function.py", "settings": {"callable": "sibling_losses:loss", "steps": [1, 2, 3, 4]}},
    "optimizers": ["EMAGrid", "LCSC"],
    "budget": {"evaluations": 9},
    "held_out": None,
}


@pytest.fixture
def begun(workplace: Path) -> Path:
    """An experiment with seed 0."""
    (workplace / "sibling_losses.py").write_text(MODULE)
    (workplace / "a.yaml").write_text(yaml.safe_dump(STUDY))
    assert lcsc(["run", "a.yaml"]) == 0
    return workplace


def names() -> list[str]:
    return study_names(open_storage("sqlite:///studies.db", write=False))


def test_another_seed_with_other_settings_is_refused(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = names()
    for override, said in (
        ("objective.settings.callable=sibling_losses:doubled", 'callable was "sibling_losses:loss", is now "sibling_l'),
        ('optimizers=[{"LCSC": {"mutation": 0.5}}]', "optimizer.options.mutation was null, is now 0.5"),
        ("space=convex", 'space.kind was "affine", is now "convex"'),
    ):
        for how in ([], ["--dry-run"]):
            capsys.readouterr()
            assert lcsc(["run", "a.yaml", "seeds=[1]", override, *how]) == 2
            line = capsys.readouterr().err
            assert "/1: its losses would not compare with those of a/" in line
            assert said in line
        assert lcsc(["run", "a.yaml", "seeds=[1]", override, "name=b", "--dry-run"]) == 0
    assert names() == before, "and what changes no loss is allowed"
    assert lcsc(["run", "a.yaml", "seeds=[1]", "budget.evaluations=12", "tells=as-completed"]) == 0
    assert lcsc(["run", "a.yaml", "optimizers=[CMA]", "space=convex"]) == 0


def test_another_seed_with_other_code_is_refused_unless_it_is_accepted(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    objective = {"file": "function.py", "settings": {"callable": "edited_sibling:loss", "steps": [1, 2]}}
    (workplace / "a.yaml").write_text(yaml.safe_dump(STUDY | {"objective": objective}))
    (workplace / "edited_sibling.py").write_text(MODULE)
    assert lcsc(["run", "a.yaml"]) == 0
    (workplace / "edited_sibling.py").write_text(MODULE.replace("(c**2)", "((c - 1) ** 2)"))
    assert lcsc(["run", "a.yaml", "seeds=[1]"]) == 2
    assert "would not compare with those of a/EMAGrid/0: edited_sibling changed" in capsys.readouterr().err
    assert lcsc(["run", "a.yaml", "seeds=[1]", "--accept-changes"]) == 0


def test_other_data_are_refused(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = """
from pathlib import Path
from lcsc_opt.objective.contract import CoefficientFunction


class Own(CoefficientFunction):
    def fingerprint(self):
        known = super().fingerprint()
        known["objective"] |= {"reference": Path("reference").read_text(), "metrics": ["fid"]}
        return known


def build(settings):
    return Own(lambda c: float((c**2).sum()), (1, 2, 3), name="own")
"""
    (workplace / "own_siblings.py").write_text(own)
    (workplace / "reference").write_text("first")
    study = {**STUDY, "objective": {"file": "own_siblings.py"}, "optimizers": ["LCSC"]}
    (workplace / "a.yaml").write_text(yaml.safe_dump(study))
    assert lcsc(["run", "a.yaml"]) == 0
    (workplace / "reference").write_text("second")
    assert lcsc(["run", "a.yaml", "seeds=[1]"]) == 2
    assert 'objective.reference was "first", is now "second"' in capsys.readouterr().err
