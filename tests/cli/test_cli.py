"""The command line as a user types it: what is printed, where, and with which exit status."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import optuna
import pytest
import yaml

from lcsc_opt.cli import run as lcsc
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.experiment import StoredExperiment
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.experiment.api import load_study
from tests.commands import Typed
from tests.study_examples import stored_report

MODULE = """
import numpy as np

def loss(coefficients):
    return float(np.square(coefficients - np.linspace(-0.2, 0.4, len(coefficients))).sum())

def unseen(coefficients):
    return loss(coefficients) + 0.001
"""

DATABASE = "sqlite:///mine.db"  # every command finds the one of the study file in its folder

STUDY = {
    "name": "tiny",
    "storage": DATABASE,
    "objective": {
        "file": "function.py",
        "settings": {
            "callable": "my_losses:loss",
            "held_out": "my_losses:unseen",
            "steps": list(range(10, 210, 10)),
        },
    },
    "optimizers": ["EMAGrid", {"LCSC": {"mutation": 0.02}}, {"CMA": {"step_size": 0.05}}],
    "seeds": [0, 1],
    "budget": {"evaluations": 15},
    "held_out": {"images": 10, "top": 2},
}


@pytest.fixture
def tiny(workplace: Path) -> Path:
    (workplace / "my_losses.py").write_text(MODULE)
    return write_study(workplace)


@pytest.fixture(scope="module")
def ran_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which one seed of every optimizer has run."""
    folder = tmp_path_factory.mktemp("ran")
    (folder / "my_losses.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert lcsc(["run", str(write_study(folder)), "--seed", "0"]) == 0
    return folder


@pytest.fixture
def ran(ran_once: Path, workplace: Path) -> Path:
    """A copy of it, which is the working directory."""
    shutil.copytree(ran_once, workplace, dirs_exist_ok=True)
    return workplace


def write_study(folder: Path, **changes: object) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**STUDY, **changes}))
    return path


def stored(name: str, storage: str = DATABASE) -> optuna.Study:
    return optuna.load_study(study_name=name, storage=storage)


def test_run_compare_and_export_end_to_end(ran: Path, typed: Typed) -> None:
    assert lcsc(["run", "tiny.yaml", "--optimizer", "LCSC"]) == 0
    names = optuna.get_all_study_names(DATABASE)
    assert sorted(names) == ["tiny", "tiny/CMA/0", "tiny/EMAGrid/0", "tiny/LCSC/0", "tiny/LCSC/1"]

    *rows, answer = typed.json("compare", "tiny")
    keys = {"study", "optimizer", "seed", "state", "searched", "held_out", "evaluations", "images", "seconds"}
    keys |= {"maximized", "sampler", "held_out_rows", "held_out_images"}
    assert all(set(row) == keys for row in rows)
    assert set(answer) == {*keys, "model", "warnings"}
    assert (answer["study"], answer["optimizer"]) == ("tiny", "answer")
    assert answer["held_out"] == min(row["held_out"] for row in rows)
    assert {row["state"] for row in rows} == {"finished"}
    by_name = {row["study"]: row for row in rows}
    assert by_name["tiny/CMA/0"]["evaluations"] == 15
    assert by_name["tiny/EMAGrid/0"]["evaluations"] == 11
    assert by_name["tiny/LCSC/0"]["held_out"] < by_name["tiny/EMAGrid/0"]["held_out"]

    printed = typed("compare", "tiny").out
    assert "EMA* (EMA 0.9" in printed
    assert "±" in printed  # two seeds
    assert lcsc(["compare", "tiny", "--plot", "curves.json", "--axis", "seconds"]) == 0
    drawn = json.loads(Path("curves.json").read_text())
    assert "(s)" in drawn["layout"]["xaxis"]["title"]["text"]
    assert {"LCSC", "CMA"} <= {trace.get("name", "").split(" ")[0] for trace in drawn["data"]}
    assert "for '--axis': 'sheep' is not one of 'evaluations'" in typed.refused("compare", "tiny", "--axis", "sheep")
    assert "expected a file that ends in" in typed.refused("compare", "tiny", "--plot", "curves.jpg")
    assert lcsc(["report", "tiny", "--output", "page.html"]) == 0
    assert "tiny/LCSC/1" in Path("page.html").read_text()


def test_the_answers_of_several_experiments_stand_in_one_table(ran: Path, typed: Typed) -> None:
    """Whoever searches a second time, as with another loss or limit, has two answers."""
    smaller = ["--optimizer", "LCSC", "--seed", "0", "--budget", "4"]
    grid_too = ["--optimizer", "EMAGrid", *smaller[:-1], "11"]
    typed("run", "tiny.yaml", "name=shorter", *grid_too)
    both = typed("compare", "tiny", "shorter")
    answers = [stored_report(name, DATABASE) for name in ("tiny", "shorter")]
    lines = [re.split("  +", line.strip()) for line in both.out.splitlines()]
    of_both = [line for line in lines if line[0] == "tiny, shorter"]
    assert [line[1] for line in of_both] == ["EMA*"], "it was measured alike"
    for name, report in zip(("tiny", "shorter"), answers, strict=True):
        [line] = [line for line in lines if line[0] == name and len(line) > 1 and line[1].startswith("answer · ")]
        assert line[2] == f"{report.of_answer.loss:.4g}"
        assert f"{name}: The answer is" in both.err
    [gain] = [line[2] for line in lines if line[:2] == ["shorter", "gain over tiny's answer"]]
    first, second = (report.of_answer.loss for report in answers)
    assert gain.startswith(f"{first - second:+.3g}")
    assert "from tiny to shorter: the same settings and files, but for the searches" in both.err
    assert [row["study"] for row in typed.json("compare", "tiny", "shorter")][-1] == "shorter"

    (ran / "others.py").write_text(MODULE.replace("0.4", "0.3"))
    others = ["objective.settings.callable=others:loss", "objective.settings.held_out=others:unseen"]
    typed("run", "tiny.yaml", "name=other", *others, *smaller)
    err = typed("compare", "tiny", "other").err
    assert 'from tiny to other: settings.callable was "my_losses:loss", is now "others:loss"' in err
    assert "Distances to other images, and what other code measures, do not compare" in err
    assert "draws the curves of one experiment" in typed.refused("compare", "tiny", "other", "--plot", "curves.png")
    typed("run", "tiny.yaml", "name=without", "held_out=null", *smaller)
    assert "without: has no report to compare. Best searched" in typed.refused("compare", "tiny", "without")


def test_a_finished_experiment_run_again_does_nothing(ran: Path, typed: Typed) -> None:
    before = Path("mine.db").read_bytes()
    Path("my_losses.py").unlink()  # it is not even loaded
    command = ["run", "tiny.yaml", "--seed", "0"]
    assert "finished already" in typed(*command).err
    assert Path("mine.db").read_bytes() == before
    write_study(ran, optimizers=[{"LCSC": {"mutation": 0.5}}])
    assert "optimizer.options.mutation was 0.02, is now 0.5" in typed.refused(*command)
    assert Path("mine.db").read_bytes() == before


def test_options_choose_optimizers_seeds_budget_and_storage(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTUNA_STORAGE", "sqlite:///third.db")
    monkeypatch.setenv("LCSC_STORAGE", "second.db")
    command = ["run", "tiny.yaml", "storage=fourth.db", "--optimizer", "DE", "--seed", "3", "--budget", "2"]
    assert lcsc([*command, "--storage", "sqlite:///first.db"]) == 0
    assert len(stored("tiny/DE/3", "sqlite:///first.db").trials) == 2
    assert lcsc(command) == 0
    assert [path.name for path in sorted(Path().glob("*.db"))] == ["first.db", "second.db"]


@pytest.mark.parametrize("command", ["run a/LCSC/0", "evaluate a", "delete a"])
def test_a_command_about_what_is_stored_makes_no_database(workplace: Path, typed: Typed, command: str) -> None:
    assert "studies.db: no such database; start a study with `lcsc run`" in typed.refused(*command.split())
    assert not list(workplace.iterdir())


def test_resume_finishes_and_raises_the_budget(ran: Path, typed: Typed) -> None:
    first = stored("tiny/LCSC/0").trials
    assert "continuing" not in typed("run", "tiny/LCSC/0").err
    assert "lcsc: tiny/LCSC/0: continuing after trial 14\n" in typed("run", "tiny/LCSC/0", "--budget", "20").err
    raised = stored("tiny/LCSC/0").trials
    assert len(raised) == 20
    assert [t.user_attrs["coefficients"] for t in raised[:15]] == [t.user_attrs["coefficients"] for t in first]
    for lower in (["tiny/LCSC/0", "--budget", "5"], ["tiny.yaml", "--optimizer", "LCSC", "--seed", "0"]):
        assert "finished already" in typed("run", *lower).err
    # a result of a larger machine is shown on this one
    assert "finished already" in typed("run", "tiny/LCSC/0", "--budget", "20", "workers=1000").err


def test_a_search_starts_at_the_best_coefficients_of_a_stored_study(ran: Path, typed: Typed) -> None:
    best = stored("tiny/LCSC/0").trials[typed.json("show", "tiny/LCSC/0")["chosen_trial"]]
    for source in ("tiny.yaml", "tiny/LCSC/0"):
        name = f"from-{source.partition('/')[0]}"
        command = ["run", source, f"name={name}", "start=tiny/LCSC/0", "--seed", "0", "--budget", "3"]
        typed(*command, "--optimizer", "EMAGrid", "--optimizer", "LCSC")
        shown = typed.json("show", f"{name}/LCSC/0")
        assert (shown["start"], shown["evaluations"]) == ("tiny/LCSC/0", 3)
        first = stored(f"{name}/LCSC/0").trials[0]
        assert first.user_attrs["coefficients"] == best.user_attrs["coefficients"]
        assert typed.json("show", f"{name}/EMAGrid/0")["start"] is None
        said = typed("run", source, f"name={name}", "start=tiny/CMA/0", "--optimizer", "LCSC", "--seed", "1", status=2)
        assert f'differs from the stored {name}/LCSC/0: start was "tiny/LCSC/0", is now "tiny/CMA/0"' in said.err
    command = ["run", "tiny.yaml", "name=other", "start=tiny/LCSC/9", "--optimizer", "LCSC", "--seed", "0"]
    assert "tiny/LCSC/9: no such study" in typed(*command, "--dry-run", status=2).err
    assert "tiny/LCSC/9: no such study" in typed(*command, status=2).err


def test_studies_are_listed_and_shown(ran: Path, typed: Typed) -> None:
    assert "tiny/CMA/0" in typed("list").out
    assert "tiny/CMA/0" in [row["study"] for row in typed.json("list")]
    shown = typed.json("show", "tiny/CMA/0")
    assert shown["optimizer_options"] == {"step_size": 0.05}
    assert shown["checkpoints"] == len(shown["coefficients"]) == 20
    assert typed.refused("show", "tiny/CMA").endswith("; its studies are: tiny/CMA/0")
    assert typed.refused("show", "tiny.yaml").endswith("a study file; see what it runs: lcsc run tiny.yaml --dry-run")
    printed = typed("show", "tiny/CMA/0").out
    assert not re.search(r"^(maximized|failed|images)\b", printed, re.M), "nothing failed, and no images were sampled"
    assert "step_size: 0.05" in printed
    assert "start" not in printed, "an empty row"


def test_evaluate_chooses_again_and_a_function_is_held_out_where_it_has_another_one(ran: Path, typed: Typed) -> None:
    before = stored("tiny").user_attrs["chosen"]
    said = typed("evaluate", "tiny", "--top", "9")
    assert [text in said.out for text in ("held out", "images", "noise")] == [True, False, False]
    assert "tiny: a preview, which is not stored; --keep makes it the report" in said.err
    assert stored("tiny").user_attrs["chosen"] == before
    report = typed.json("evaluate", "tiny", "--images", "20", "--top", "9", "--keep")
    chosen = stored("tiny").user_attrs["chosen"]
    assert chosen["answer"] == report["answer"]
    assert stored_report("tiny", DATABASE).to_json() == report
    assert [part["models"][0]["images"] for part in report["parts"]] == [0], "a function samples no images"
    assert len([name for name in report["selection"] if name.startswith("LCSC, trial")]) == 3
    study = load_study("tiny/CMA/0", DATABASE)
    assert study.held_out == pytest.approx((study.searched or 0.0) + 0.001)
    assert study.trials[[row["loss"] for row in study.trials].index(study.searched)]["coefficients"] == pytest.approx(
        study.coefficients.tolist()
    )
    assert "a held-out function has one" in typed("evaluate", "tiny", "--groups", "2", status=1).err
    said = typed.refused("export", "tiny/EMAGrid/0", "-o", "x.safetensors")  # it has no model
    assert 'lcsc_opt.Trajectory.open(PATH).merge(lcsc_opt.load_study("tiny/EMAGrid/0").coefficients)' in said
    assert not Path("x.safetensors").exists()


@pytest.mark.usefixtures("impatient")
def test_a_report_goes_with_a_study_that_is_in_it_and_with_the_last_one_the_experiment(ran: Path, typed: Typed) -> None:
    typed("run", "tiny.yaml", "name=other", "--optimizer", "CMA", "--seed", "0")
    with StoredStudy.open(open_storage(DATABASE, write=True), "tiny/CMA/0").hold():
        assert "still running: tiny/CMA/0" in typed.refused("delete", "tiny", "--yes")
    said = typed("delete", "tiny/LCSC/0", "--yes").err
    assert "tiny: its report was deleted, too; lcsc run makes a new one" in said
    only = ["run", "tiny.yaml", "--optimizer", "EMAGrid", "--optimizer", "CMA", "--seed", "0"]
    assert "tiny: The answer is " in typed(*only).err
    assert set(stored("tiny").user_attrs["chosen"]["found"]) == {"tiny/EMAGrid/0", "tiny/CMA/0"}
    said = typed("delete", "tiny", "--yes").err
    assert "deleted: tiny/CMA/0" in said
    assert "deleted: tiny, with what was measured" in said
    assert optuna.get_all_study_names(DATABASE) == ["other", "other/CMA/0"]
    assert "tiny: no such study" in typed.refused("delete", "tiny", "--yes")
    stored_experiment = StoredExperiment.open(open_storage(DATABASE, write=True), "other")
    stored_experiment.storage.delete_study(stored_experiment.storage.get_study_id_from_name("other/CMA/0"))
    typed("delete", "other", "--yes")  # as where somebody was interrupted
    assert optuna.get_all_study_names(DATABASE) == []


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("optimizers.LCSC.mutaton=1", "mutaton: unknown key (did you mean 'mutation'?)"),
        ("objective.file=functoin.py", "no such file in objectives (did you mean 'function'?)"),
        ("--sed 1", "No such option: --sed"),
        ("--dry-run workers=1000", "workers: 1000 processes on"),  # a dry run would start them
        ("space.rows=layers", "space.rows: this objective merges no weights; leave the key out"),
    ],
)
def test_a_wrong_command_is_one_line(command: str, message: str, tiny: Path, typed: Typed) -> None:
    said = typed.refused("run", "tiny.yaml", *command.split())
    assert message in said
    assert not Path("mine.db").exists() or optuna.get_all_study_names(DATABASE) == []


def test_h_is_help_for_every_command(typed: Typed) -> None:
    assert "Exit status" in typed("-h").out
    assert "--dry-run" in typed("run", "-h").out


def test_a_removed_working_folder_is_one_line(tmp_path: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    try:
        said = typed("list", status=2).err
    finally:
        monkeypatch.chdir(tmp_path)  # pytest cannot return to a folder that it has no path of
    assert said == "lcsc: the working folder was removed: go to another one (cd)\n"
