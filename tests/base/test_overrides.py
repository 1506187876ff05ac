"""Overrides of a command line are values of the study file, and checked as the file is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.overrides import with_overrides
from lcsc_opt.base.study_file import read_study_file


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text("name: digits\nobjective: {file: trained.py}\noptimizers: [LCSC]\nbudget: {evaluations: 300}\n")
    return path


def test_a_tilde_removes_a_key(minimal: Path) -> None:
    given = ["held_out.images=30", "objective.settings.images=500", "objective.settings.nfe=2"]
    assert read_study_file(minimal, given).held_out is not None
    spec = read_study_file(minimal, [*given, "~held_out", "~objective.settings.images"])
    assert spec.held_out is None
    assert spec.objective.settings == {"nfe": 2}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sedes=[0]", "sedes: unknown key (did you mean 'seeds'?)"),
        ("seeds", "seeds: expected KEY=VALUE, as in objective.settings.images=500, or ~KEY, as in ~held_out"),
        ("~sedes", "~sedes: there is no key 'sedes'"),
        ("~objective.file.name", "~objective.file.name: there is no key 'name'"),
        ("~", "there is no key ''"),
        ("~held_out=1", "~held_out=1: expected KEY=VALUE"),
        ("~name", "name"),  # without which there is no study
        ("objective..file=a", "expected KEY=VALUE"),
        ("seeds=[0", "seeds=[0: not valid YAML"),
        ("name.first=1", "'digits' has no key 'first'; set name itself"),
    ],
)
def test_overrides_are_checked_as_the_file_is(minimal: Path, override: str, message: str) -> None:
    with pytest.raises(StudySpecError) as caught:
        read_study_file(minimal, [override])
    assert message in str(caught.value)
    assert override in str(caught.value)


@pytest.mark.parametrize("entry", ["LCSC", {"LCSC": {"max_parents": 3}}, {"LCSC": None}])
def test_an_option_of_an_optimizer_is_reached_by_its_name(entry: Any) -> None:
    content = {"optimizers": ["CMA", entry]}
    kept = {"max_parents": 3} if isinstance(entry, dict) and entry["LCSC"] else {}
    changed = with_overrides(content, ["optimizers.LCSC.mutation=0.1"])
    assert changed == {"optimizers": ["CMA", {"LCSC": {**kept, "mutation": 0.1}}]}
    assert content == {"optimizers": ["CMA", entry]}, "the content is left as it is"
    with pytest.raises(StudySpecError, match=r"^optimizers\.DE\.x=1: \['CMA'.* has no 'DE'$"):
        with_overrides(content, ["optimizers.DE.x=1"])


@pytest.mark.parametrize("entry", ["LCSC", {"LCSC": {"max_parents": 3, "mutation": 0.1}}])
def test_an_optimizer_of_a_list_and_its_option_are_removed_by_name(entry: Any) -> None:
    content = {"optimizers": [entry, "CMA"]}
    assert with_overrides(content, ["~optimizers.LCSC"]) == {"optimizers": ["CMA"]}
    if isinstance(entry, dict):
        changed = with_overrides(content, ["~optimizers.LCSC.mutation"])
        assert changed == {"optimizers": [{"LCSC": {"max_parents": 3}}, "CMA"]}
    with pytest.raises(StudySpecError, match="no key 'DE'"):
        with_overrides(content, ["~optimizers.DE"])
    assert content == {"optimizers": [entry, "CMA"]}, "the content is left as it is"
