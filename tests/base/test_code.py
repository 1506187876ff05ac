"""The user's own code: what is followed, and what counts as a change."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lcsc_opt.base.code import local_code, module_file
from lcsc_opt.base.paths import BuildContext
from lcsc_opt.base.study_spec import ObjectiveSpec
from lcsc_opt.objective.loading import load_objective

SAMPLER = """
import torch
import numpy
from code_helpers import scale
from code_package import inner

@torch.no_grad()
def sample(model, noise):
    from code_late import shift
    return model(scale(noise)) + shift
"""
FILES = {
    "code_sampler.py": SAMPLER,
    "code_helpers.py": "def scale(noise):\n    return 2 * noise\n",
    "code_late.py": "shift = 1\n",
    "code_package/__init__.py": "from . import sibling\n",
    "code_package/folder/deep.py": "value = 5\n",  # in a folder without __init__.py
    "code_package/inner.py": "from .folder.deep import value\nfrom .sibling import value\n",
    "code_package/sibling.py": "value = 3\n",
    "code_package/unused.py": "value = 4\n",
    "code_broken.py": "def (\n",
}
FOLLOWED = [
    "code_helpers",
    "code_late",
    "code_package",
    "code_package.folder.deep",
    "code_package.inner",
    "code_package.sibling",
    "code_sampler",
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "code_package" / "folder").mkdir(parents=True)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    return tmp_path


def read(folder: Path) -> dict[str, str]:
    return local_code({"code_sampler": folder / "code_sampler.py"})


def test_every_local_module_that_it_imports_is_followed_and_none_is_imported(folder: Path) -> None:
    assert list(read(folder)) == FOLLOWED
    assert not [name for name in sys.modules if name.startswith("code_")]


@pytest.mark.parametrize("name", [name for name in FILES if name not in ("code_package/unused.py", "code_broken.py")])
def test_a_change_in_any_of_them_is_named(folder: Path, name: str) -> None:
    before, path = read(folder), folder / name
    path.write_text(FILES[name] + "\nother = 1\n")
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    assert {changed for changed, _ in before.items() ^ read(folder).items()} == {module}


WRITTEN = """# a sampler
import math  # of Python

TEXT = '''# no comment

f{math.pi}'''


def sample(net, noise):
    return net(noise)


if __name__ == "__main__":
    print(sample(abs, 1))
"""


@pytest.mark.parametrize(
    ("old", "new", "is_other"),
    [
        ("# a sampler\n", "", False),
        ("# of Python", "# of Guido", False),
        ("    return", "\n    # the network's own\n    return", False),
        ("print(sample(abs, 1))", "for budget in (40, 80):\n        print(sample(abs, budget))", False),
        ("# no comment", "# a comment", True),
        ("# no comment\n\n", "# no comment\n", True),
        ("net(noise)", "net(-noise)", True),
        ('if __name__ == "__main__":\n    print(sample(abs, 1))', "print(sample(abs, 1))", True),
        ("    print(sample(abs, 1))", "    pass\nelse:\n    math.pi = 3", True),
        ("    print(sample(abs, 1))", "    TEXT = 3", True),
        ("    print(sample(abs, 1))", "    math.pi = 3", True),
        ("    print(sample(abs, 1))", "    def score(net):\n        return 1", True),
        ("    print(sample(abs, 1))", "    print(sample(lambda noise: 1, 1))", True),
        ("\n", "\r\n", False),
    ],
)
def test_comments_and_the_call_of_a_script_are_no_part_of_its_code(
    folder: Path, old: str, new: str, is_other: bool
) -> None:
    script = folder / "code_script.py"
    script.write_bytes(WRITTEN.encode())
    before = local_code({"code_script": script})
    assert old in WRITTEN
    script.write_bytes(WRITTEN.replace(old, new).encode())
    assert (local_code({"code_script": script}) != before) == is_other


def test_code_that_python_runs_and_its_tokenizer_refuses_is_compared_byte_for_byte(folder: Path) -> None:
    script = folder / "code_script.py"
    digests = set()
    for content in (b"x = 1  # Gr\xf6\xdfe\n", b"x = 2  # Gr\xf6\xdfe\n"):
        script.write_bytes(content)
        digests.add(local_code({"code_script": script})["code_script"])
    assert len(digests) == 2


def test_what_is_installed_or_cannot_be_read_is_left_out(folder: Path) -> None:
    import torch

    import lcsc_opt.sampling.function

    files = {"torch": Path(torch.__file__), "json": Path(importlib.import_module("json").__file__ or "")}
    files["own"] = Path(lcsc_opt.sampling.function.__file__)
    assert local_code({**files, "code_broken": folder / "code_broken.py", "gone": folder / "gone.py"}) == {}
    assert module_file("code_nowhere.inner") is None
    assert module_file("sys") is None
    assert module_file("__phello__") is None, "Python has it frozen"


def test_an_objective_knows_its_file_and_what_its_settings_name(folder: Path) -> None:
    (folder / "code_loss.py").write_text("import code_late\n\ndef lose(a):\n    return float(a[0])\n")
    settings = {"callable": "code_loss:lose", "steps": [1, 2]}
    objective = load_objective(ObjectiveSpec(file="function.py", settings=settings), BuildContext(folder))  # type: ignore[arg-type]
    assert objective([0.5, 0.5]) == 0.5, "modules next to the study file can be imported"
    assert list(objective.code) == ["code_late", "code_loss"], "the shipped file is the library's own"
    (folder / "code_objective.py").write_text(
        "import code_helpers, dataclasses\nfrom lcsc_opt.objective import Evaluation, Objective\n\n"
        "@dataclasses.dataclass(frozen=True)\nclass Frozen(Objective):\n    size: int = 1\n    steps = (1, 2)\n"
        "    def evaluate(self, candidate):\n        return Evaluation(0.0)\n"
        "    def describe(self):\n        return {}\n\n"
        "def build(settings):\n    return Frozen()\n"
    )
    objective = load_objective(ObjectiveSpec(file="code_objective.py", settings={}), BuildContext(folder))
    assert list(objective.code) == ["code_helpers", "code_objective.py"]
    digests = {f"code {name}": file.sha256 for name, file in objective.code.items()}
    assert digests.items() <= objective.key.decides.items()


# edited while the process runs

OWN_OBJECTIVE = """
from lcsc_opt.objective import CoefficientFunction
from reloaded_package import inner

def build(settings):
    return CoefficientFunction(lambda coefficients: inner.VALUE + 10, [1, 2], name="own")
"""


@pytest.fixture
def workplace_with_code(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(str(workplace))
    (workplace / "reloaded_package").mkdir()
    (workplace / "reloaded_package" / "__init__.py").touch()
    (workplace / "reloaded_package" / "inner.py").write_text("VALUE = 1\n")
    (workplace / "reloaded_loss.py").write_text(
        "from reloaded_package.inner import VALUE\n\ndef lose(coefficients):\n    return VALUE\n"
    )
    (workplace / "reloaded_objective.py").write_text(OWN_OBJECTIVE)
    yield workplace
    for name in [name for name in sys.modules if name.startswith("reloaded_")]:
        del sys.modules[name]


def loss(file: str) -> float:
    """What the objective that a next study would load gives."""
    settings: dict[str, Any] = {}
    if file == "function.py":
        settings = {"callable": "reloaded_loss:lose", "steps": [1, 2]}
    return load_objective(ObjectiveSpec(file=file, settings=settings), BuildContext(Path.cwd()))([0.5, 0.5])


EDITS = [
    ("function.py", "reloaded_loss.py", "def lose(coefficients):\n    return 2\n", [1, 2]),
    ("function.py", "reloaded_package/inner.py", "VALUE = 2\n", [1, 2]),
    ("reloaded_objective.py", "reloaded_objective.py", OWN_OBJECTIVE.replace("10", "20"), [11, 21]),
    ("reloaded_objective.py", "reloaded_package/inner.py", "VALUE = 2\n", [11, 12]),
]


@pytest.mark.parametrize(("file", "edited", "text", "losses"), EDITS)
def test_code_that_was_edited_between_two_studies_is_evaluated_as_it_is_now(
    workplace_with_code: Path, file: str, edited: str, text: str, losses: list[float]
) -> None:
    first = loss(file)
    (workplace_with_code / edited).write_text(text)
    assert [first, loss(file)] == losses


def test_a_module_that_a_script_imported_before_it_was_edited_is_imported_again(workplace_with_code: Path) -> None:
    module = importlib.import_module("reloaded_loss")
    (workplace_with_code / "reloaded_loss.py").write_text("def lose(coefficients):\n    return 5\n")
    assert loss("function.py") == 5
    assert module.lose(None) == 1, "what the script holds is left alone"
