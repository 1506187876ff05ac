"""The functions of an objective's file are called with the context, or without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lcsc_opt.base.errors import LcscError, StudySpecError
from lcsc_opt.base.paths import BuildContext, KnownCheckpoints
from lcsc_opt.base.study_spec import ObjectiveSpec
from lcsc_opt.objective.loading import load_objective

WITH_CONTEXT = """
from lcsc_opt.objective import CoefficientFunction

def build(settings, context):
    name = context.path(settings["data"]).read_text()
    return CoefficientFunction(sum, context.checkpoints.steps, name=name)
"""
WITHOUT_CONTEXT = """
from lcsc_opt.objective import CoefficientFunction

def build(settings, shown=False):
    if settings["name"] == "refused":
        raise ValueError(settings["name"])
    if settings["name"] == "exits":
        raise SystemExit(2)
    return CoefficientFunction(sum, [1, 2], name=f"{settings['name']} {shown}")
"""
CHECKPOINTS = KnownCheckpoints("0" * 64, (10, 20))


@pytest.fixture
def study(workplace: Path) -> Path:
    folder = workplace / "study"
    folder.mkdir()
    (folder / "with_context.py").write_text(WITH_CONTEXT)
    (folder / "without_context.py").write_text(WITHOUT_CONTEXT)
    (folder / "data.txt").write_text("the data")
    return folder


def test_functions_of_an_objectives_file_get_the_context(study: Path) -> None:
    spec = ObjectiveSpec(file="with_context.py", settings={"data": "data.txt"})
    objective = load_objective(spec, BuildContext(study, CHECKPOINTS))
    assert objective.steps == (10, 20)
    assert "the data" in str(objective.describe())


def test_functions_of_an_objectives_file_may_leave_the_context_out(study: Path) -> None:
    spec = ObjectiveSpec(file="without_context.py", settings={"name": "sum"})
    objective = load_objective(spec, BuildContext(study, CHECKPOINTS))
    assert "sum False" in str(objective.describe()), "another parameter keeps its default"


@pytest.mark.parametrize(("name", "said"), [("refused", "ValueError: refused"), ("exits", "SystemExit: 2")])
@pytest.mark.parametrize("partial", [False, True])
def test_what_build_raises_is_one_line(study: Path, name: str, said: str, partial: bool) -> None:
    if partial:
        content = f"{WITHOUT_CONTEXT}\nimport functools\nbuild = functools.partial(build, shown=True)"
        (study / "without_context.py").write_text(content)
    spec = ObjectiveSpec(file="without_context.py", settings={"name": name})
    with pytest.raises(StudySpecError, match=rf"without_context\.py: build raised {said}$"):
        load_objective(spec, BuildContext(study))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("def broken(:", "importing 'loading_own:broken' raised SyntaxError: invalid syntax"),
        ("raise SystemExit(2)", "importing 'loading_own:broken' raised SystemExit: 2"),
        ("open('nowhere.txt')", "importing 'loading_own:broken' raised FileNotFoundError: .*nowhere.txt"),
        ("", "'loading_own:broken' cannot be imported: module 'loading_own' has no attribute 'broken'"),
    ],
)
def test_what_a_users_module_raises_is_one_line_in_which_the_setting_is_named(
    study: Path, content: str, said: str
) -> None:
    (study / "loading_own.py").write_text(content)
    spec = ObjectiveSpec(file="function.py", settings={"callable": "loading_own:broken", "steps": [1, 2]})
    with pytest.raises(LcscError, match=rf"^objective\.settings\.callable: {said}"):
        load_objective(spec, BuildContext(study))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"callable": "math:hypot", "steps": [1, 2, 2]}, r"^objective\.settings\.steps\[2\]: expected a whole number"),
        ({"callable": "math.hypot", "steps": [1, 2]}, r"^objective\.settings\.callable: expected 'module:function'"),
    ],
)
def test_an_error_about_a_setting_says_where_the_setting_is(settings: dict[str, Any], said: str) -> None:
    spec = ObjectiveSpec(file="function.py", settings=settings)
    with pytest.raises(LcscError, match=said):
        load_objective(spec, BuildContext())
