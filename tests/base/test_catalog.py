from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest
import yaml

from lcsc_opt.base.catalog import find, load_file
from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.paths import SHIPPED, BuildContext
from lcsc_opt.base.study_spec import ObjectiveSpec
from lcsc_opt.checkpoints.finding import find_checkpoints
from lcsc_opt.objective.loading import load_objective
from tests.commands import Typed

GOOD = """
from lcsc_opt.objective import CoefficientFunction

def build(settings):
    return CoefficientFunction(sum, [1, 2], name="sum")
"""


def write(folder: Path, name: str, text: str = GOOD) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


def test_a_name_is_looked_for_beside_the_study_then_here_then_among_the_shipped(workplace: Path) -> None:
    study = workplace / "elsewhere"
    assert find("objectives", "trained.py", study_folder=study) == (SHIPPED / "objectives") / "trained.py"
    here = write(workplace / "objectives", "trained.py")
    assert find("objectives", "trained.py", study_folder=study) == here
    near = write(study / "objectives", "trained.py")
    write(workplace, "trained.py")
    assert find("objectives", "trained.py", study_folder=study) == near
    near = write(study, "trained.py")
    for name, file in (("trained.py", near), ("trained", near), (str(here), here)):
        assert find("objectives", name, study_folder=study) == file
    with pytest.raises(StudySpecError, match=r"traine: no such file in objectives \(did you mean 'trained'\?\)"):
        find("objectives", "traine")
    for name in ("~nobody-at-all/trained.py", "x" * 256):
        with pytest.raises(StudySpecError, match=r"; (write the whole|check the) path$"):
            find("objectives", name)
        with pytest.raises(StudySpecError, match=r"; (write the whole|check the) path$"):
            BuildContext(workplace).path(name)


@pytest.mark.parametrize("asked", ["digits", "digits.yml", "digits.yaml"])
def test_a_study_file_of_ones_own_comes_before_the_shipped_one(workplace: Path, asked: str) -> None:
    """Whichever suffix of YAML it has."""
    own = write(workplace, "digits.yml", "name: mine\n")
    assert find("studies", asked) == own
    nearer = write(workplace / "beside", "digits.yaml", "name: nearer\n")
    assert find("studies", asked, study_folder=workplace / "beside") == nearer


@pytest.mark.parametrize("folder", [".", "/", "", "..", "~"])
def test_a_folder_is_no_study_file(workplace: Path, folder: str) -> None:
    with pytest.raises(StudySpecError, match=r"no such file in studies.*; looked for \.yaml and \.yml in "):
        find("studies", folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def build(:\n", "SyntaxError while loading it"),
        ("import no_such_module\n", "ModuleNotFoundError while loading it"),
        ("raise SystemExit(2)\n", "SystemExit while loading it: 2"),
        ("x = 1\n", "defines no function build$"),
        ("def build(settings):\n    return 1\n", "returned int, expected an Objective"),
        ("def build(settings):\n    raise KeyError('weights')\n", "raised KeyError"),
    ],
)
def test_a_broken_objective_file_is_a_typed_error(text: str, message: str, workplace: Path) -> None:
    write(workplace, "broken.py", text)
    with pytest.raises(StudySpecError, match=message):
        load_objective(ObjectiveSpec(file="broken.py"), BuildContext())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def loss(model):\n    return 1.0\n", "defines no function build"),
        ("def build():\n    return 1\n", "build raised TypeError"),
        ("def build(config=None):\n    return 1\n", "returned int, expected an Objective"),
        ("import no_such_module\n", "ModuleNotFoundError while loading it"),
    ],
)
def test_a_file_of_the_users_in_the_way_of_one_of_ours_is_named(text: str, message: str, workplace: Path) -> None:
    own = write(workplace, "score.py", text)
    hides = r"; it hides the score\.py of lcsc_opt: if that is not meant, rename it$"
    with pytest.raises(StudySpecError, match=f"^{re.escape(str(own))}: .*{message}.*{hides}"):
        load_objective(ObjectiveSpec(file="score.py"), BuildContext())


@pytest.mark.parametrize("name", ["own.py", "own.v2 (best).py"])
def test_a_copy_of_a_file_on_another_machine_has_the_same_module_name_and_its_own_path(
    workplace: Path, name: str
) -> None:
    original = write(workplace / "here", name, GOOD + "class Samples:\n    pass\n")
    copy = write(workplace / "there", name, original.read_text())
    pickled = pickle.dumps(load_file(original).Samples())
    there = load_file(copy)
    assert type(pickle.loads(pickled)) is there.Samples
    assert [there.__file__, load_file(original).__file__] == [str(copy), str(original)]


STUDIES = sorted((SHIPPED / "studies").rglob("*.yaml"))
FEWER = {"images": 65, "batch_size": 65, "nfe": 2}
OF_FILES = [path for path in STUDIES if "checkpoints:" in path.read_text()]  # that a user has


def test_a_shipped_study_of_files_says_which_are_not_there(workplace: Path, typed: Typed) -> None:
    assert OF_FILES
    for path in OF_FILES:  # with the files: tests/test_enhance_page.py and tests/studies
        said = typed("run", str(path), "--dry-run", status=2).err
        assert re.search("does not exist|is no folder|downloading its weights", said)
    assert not any(workplace.iterdir())


@pytest.mark.parametrize("path", [path for path in STUDIES if path not in OF_FILES], ids=lambda path: path.stem)
def test_every_shipped_study_could_be_run(path: Path, workplace: Path, typed: Typed) -> None:
    settings = yaml.safe_load(path.read_text())["objective"]["settings"]
    fewer = [f"objective.settings.{key}={value}" for key, value in FEWER.items() if "batch_size" in settings]
    printed = typed("run", str(path), "--dry-run", *fewer).out
    name = path.stem if path.parent.name == "studies" else f"{path.parent.name}_{path.stem}"
    planned, _, _ = printed.partition("\n\n")  # what a time buys is below
    lines = planned.splitlines()[2:]
    assert {line.split("/")[0] for line in lines} == {name}
    assert len(lines) >= 2
    assert {path.name for path in workplace.iterdir()} <= {"studies.files"}, "digests, and a first picture"


def test_paths_in_settings_are_taken_from_beside_the_study_file_first(workplace: Path) -> None:
    (workplace / "study").mkdir(exist_ok=True)
    for folder in (workplace / "study", workplace):
        (folder / "both.pt").touch()
    (workplace / "study" / "step_1.pt").touch()
    context = BuildContext(workplace / "study")
    assert context.path("both.pt") == workplace / "study" / "both.pt"
    assert context.path("step_*.pt") == workplace / "study" / "step_*.pt"
    for nowhere in ("elsewhere.pt", "runs/**.pt", "a\0*"):
        assert context.path(nowhere) == Path(nowhere).absolute()
    assert context.path(str(workplace / "both.pt")) == workplace / "both.pt"
    assert BuildContext().path("both.pt") == Path("both.pt").absolute()


@pytest.mark.parametrize("has_study_file", [True, False])
def test_only_the_pattern_is_one_not_the_name_of_the_folder_around_it(
    has_study_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "lr[1e-4] *"
    folder.mkdir()
    (folder / "m-1.pt").touch()
    monkeypatch.chdir(tmp_path if has_study_file else folder)
    pattern = BuildContext(folder if has_study_file else None).path("m-*.pt")
    assert find_checkpoints([pattern]) == [folder / "m-1.pt"]
