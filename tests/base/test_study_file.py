"""A study file is parsed once; whatever is wrong in it becomes one line that says where, what, and what instead."""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.settings import dump_yaml, parse_yaml
from lcsc_opt.base.study_file import DEFAULT_STORAGE, StudyFile, parse_study_file, read_study_file, storage_of_folder
from lcsc_opt.base.study_spec import OptimizerSpec, SpaceSpec, experiment_name

MINIMAL = """
name: digits
objective: {file: trained.py}
optimizers: [LCSC]
budget: {evaluations: 300}
"""
ROWS = "space.rows: expected layers, channels, auto or {channels: 8}, got "
TOP = f"expected one of {', '.join(StudyFile.model_fields)}"


def study(**changes: Any) -> StudyFile:
    return parse_study_file(content(changes), source="test")


def content(changes: Mapping[Any, Any]) -> dict[Any, Any]:
    """The minimal study file with some keys changed, or left out where the value is ``...``."""
    changed = {**yaml.safe_load(MINIMAL), **changes}
    return {key: value for key, value in changed.items() if value is not ...}


def complaint(changes: Mapping[Any, Any]) -> str:
    """What is said of such a study file: one line, after the name of its source."""
    with pytest.raises(StudySpecError) as caught:
        parse_study_file(content(changes), source="some/study.yaml")
    source, _, message = str(caught.value).partition(": ")
    assert source == "some/study.yaml"
    assert "\n" not in message
    return message


# what is right


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("LCSC", OptimizerSpec(name="LCSC")),
        ({"LCSC": {}}, OptimizerSpec(name="LCSC")),
        ({"LCSC": None}, OptimizerSpec(name="LCSC")),
        ({"CMA": {"step_size": 0.1}}, OptimizerSpec(name="CMA", options={"step_size": 0.1})),
        ({"name": "CMA", "options": {"step_size": 0.1}}, OptimizerSpec(name="CMA", options={"step_size": 0.1})),
        ("affine", SpaceSpec()),
        ("convex", SpaceSpec(kind="convex")),
        ({"kind": "convex", "rows": "layers"}, SpaceSpec(kind="convex", rows="layers")),
    ],
)
def test_ways_to_write_an_optimizer_and_a_space(written: Any, meant: OptimizerSpec | SpaceSpec) -> None:
    of_optimizer = isinstance(meant, OptimizerSpec)
    spec = study(optimizers=[written]) if of_optimizer else study(space=written)
    assert (spec.optimizers[0] if of_optimizer else spec.space) == meant


def test_a_name_has_letters_of_any_language() -> None:
    assert study(name=experiment_name("_Übung 東京/3")).name == "Übung-東京-3"


def test_a_number_may_have_an_exponent_without_a_point_and_begin_with_zeros(tmp_path: Path) -> None:
    """As YAML 1.2 reads it, and as the names of checkpoints have their steps."""
    file = tmp_path / "numbers.yaml"
    written = "1e-3, -2E+1, 9e999, 1.5e-3, 2.e3, 1e-3x, 7e, 10_000, .5, 4.0, 002000, 089, 0o17, 1:30"
    meant = [1e-3, -20, math.inf, 1.5e-3, 2000, "1e-3x", "7e", 10_000, 0.5, 4.0, 2000, 89, 15, "1:30"]
    file.write_text(MINIMAL.replace("[LCSC]", f"[{{LCSC: {{values: [{written}]}}}}]"))
    (optimizer,) = read_study_file(file).optimizers
    assert optimizer.options["values"] == meant
    (optimizer,) = read_study_file(file, ["optimizers.LCSC.mutation=2e-4"]).optimizers
    assert optimizer.options["mutation"] == 2e-4


@pytest.mark.parametrize(
    "text", ["007", "089", "1e-4", "0o17", "1:30", "two\nlines", "caf\udce9", "1_000", "yes", ".5"]
)
def test_text_that_looks_like_a_number_is_written_so_that_it_stays_text(text: str) -> None:
    assert parse_yaml(dump_yaml({"key": text, "list": [text]})) == {"key": text, "list": [text]}


# what is wrong


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        # unknown keys
        ({"budgt": 3}, f"budgt: unknown key (did you mean 'budget'?); {TOP}"),
        (
            {"optimizers": ["CMA", {"name": "LCSC", "opts": {}}], "name": ...},
            "name: Field required; "
            "optimizers[1].opts: unknown key (did you mean 'options'?); expected one of name, options",
        ),
        ({"space": {1: 2}}, "space[1]: Keys should be strings, got 1"),
        ({"objective": {"file": "x.py", "str": 3}}, "objective.str: unknown key; expected one of file, settings"),
        # missing keys
        ({"objective": {"settings": {}}}, "objective.file: Field required"),
        # wrong types
        ({"optimizers": 3}, "optimizers: expected names, or mappings from names to options, got 3"),
        ({"name": 3}, "name: Input should be a valid string, got 3"),
        (
            {"objective": {"file": "x.py", "settings": {"day": datetime.date(2024, 1, 2)}}},
            "objective.settings.day: input was not a valid JSON value, got datetime.date(2024, 1, 2)",
        ),
        # wrong values
        (
            {"budget": {"evaluations": 3, "images": 3}},
            "budget: expected one unit, as in {evaluations: 100}, {images: 50000} or 5 min, got evaluations and images",
        ),
        ({"budget": {}}, "budget: expected one unit, as in {evaluations: 100}, {images: 50000} or 5 min, got none"),
        ({"budget": 300}, "budget: expected one unit, as in {evaluations: 100}, {images: 50000} or 5 min, got 300"),
        ({"budget": "soon"}, "budget: expected a time such as 5 min, got 'soon'"),
        ({"seeds": []}, "seeds: expected whole numbers, got []"),
        ({"seeds": [0, 1, 0]}, "seeds: 0 is given twice; each study needs its own name"),
        ({"space": "afine"}, "space.kind: Input should be 'affine' or 'convex', got 'afine'"),
        ({"space": {"rows": "layer"}}, f"{ROWS}'layer'"),
        ({"space": {"rows": {"layers": 8}}}, f"{ROWS}{{'layers': 8}}"),
        ({"space": {"rows": {"channels": 0}}}, f"{ROWS}{{'channels': 0}}"),
        ({"optimizers": [{"LCSC": 3}]}, "optimizers[0].options: Input should be a valid dictionary, got 3"),
        ({"workers": {"ray": 1, "gpus": "all"}}, "workers: gpus: Input should be a valid number, got 'all'"),
        ({"name": "a/b"}, "name: expected at most 100 letters, digits, dots, dashes and underscores, got 'a/b'"),
        (
            {"objective": {"file": []}, "workers": 0},
            "objective.file: Input should be a valid string, got []; "
            "workers: expected a number from 1, auto, devices such as [cuda:0, cuda:1], or {ray: 8}, got 0",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else re.sub(r"[^\w.:-]+", " ", str(value))[:60],
)
def test_what_is_wrong_is_said_with_its_path(changes: dict[Any, Any], said: str) -> None:
    assert complaint(changes) == said


# what cannot be read


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1, 2\n", "not valid YAML: while parsing a flow sequence"),
        ("seeds: [" + "9" * 5000 + "]\n", "not valid YAML: Exceeds the limit"),
        ("a: " + "[" * 700, "not valid YAML: nested too deeply"),
        ("a: \x00", "not valid YAML: unacceptable character"),
        (
            "name: a\nbudget: 1\nbudget: 2\n",
            'not valid YAML: found duplicate key "budget"',
        ),
        ("", "is empty; a study file has at least name"),
    ],
    ids=lambda text: re.sub(r"\W+", " ", text)[:30],
)
def test_a_file_that_is_no_yaml_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(StudySpecError) as caught:
        read_study_file(path)
    assert str(caught.value).startswith(f"{path}: {said}")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(bytes(range(256)))
    for path in (tmp_path / "missing.yaml", tmp_path, binary):
        with pytest.raises(StudySpecError, match=re.escape(f"{path}: cannot be read as a study file")):
            read_study_file(path)


def test_python_objects_in_yaml_are_not_made(tmp_path: Path) -> None:
    path, trace = tmp_path / "study.yaml", tmp_path / "executed"
    path.write_text(f"{MINIMAL}\nstorage: !!python/object/apply:os.mkdir ['{trace}']\n")
    with pytest.raises(StudySpecError, match="not valid YAML: could not determine a constructor for the tag"):
        read_study_file(path)
    assert not trace.exists()


def test_a_folder_has_the_database_of_its_study_files(tmp_path: Path) -> None:
    assert storage_of_folder(tmp_path) is None
    (tmp_path / "other.yaml").write_text("- no\n- study")
    (tmp_path / "broken.yaml").write_text("{name: [")
    study = "name: {0}\nobjective: {{file: FILL IN}}\nstorage: sqlite:///{0}.db\n"
    (tmp_path / "study.yaml").write_text(study.format("mine"))
    assert storage_of_folder(tmp_path) == "sqlite:///mine.db"
    assert storage_of_folder(tmp_path, "renamed/LCSC/0") == "sqlite:///mine.db"
    (tmp_path / "second.yml").write_text(study.format("second"))
    assert storage_of_folder(tmp_path) is None, "which of two is not known"
    assert storage_of_folder(tmp_path, "second/LCSC/0") == "sqlite:///second.db"
    (tmp_path / "third.yaml").write_text("name: third\nobjective: {file: FILL IN}")
    assert storage_of_folder(tmp_path, "third/LCSC/0") == DEFAULT_STORAGE, "where lcsc run puts it"


def test_a_key_that_is_given_twice_is_told_in_one_line_whatever_its_values_are() -> None:
    with pytest.raises(ValueError, match="duplicate key") as raised:
        parse_yaml("a: |\n  one\n  two\na: |\n  three\n  four\n")
    assert "\n" not in str(raised.value)
