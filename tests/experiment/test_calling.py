"""``lcsc_opt.search``: what it stores, how it continues, and what it refuses before."""

from __future__ import annotations

import datetime
import functools
import gc
import importlib
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy
import torch
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

import lcsc_opt
from lcsc_opt.cli import run as lcsc
from tests.commands import Typed
from tests.metrics.examples import pixels, write_folder
from tests.objectives.image_objectives import PIXELS
from tests.processes import run_script

TARGET = torch.linspace(-1, 1, 4)
MODULE = """
import torch

def build():
    return torch.nn.Linear(4, 1, bias=False)

def score(net):
    return ((net.weight - torch.linspace(-1, 1, 4)) ** 2).sum()

def held_out(net):
    return 2 * score(net)
"""


class Net(nn.Linear):
    def __init__(self, width: int = 4) -> None:
        super().__init__(width, 1, bias=False)


def states(many: int = 4, width: int = 4) -> dict[int, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    target = torch.linspace(-1, 1, width)
    return {step: {"weight": (target + torch.randn(width, generator=generator))[None]} for step in range(1, many + 1)}


def save_states() -> None:
    for step, state in states().items():
        torch.save(state, f"{step}.pt")


def pack_states() -> None:
    save_states()
    assert lcsc(["trajectory", "pack", "*.pt", "-o", "run.trajectory"]) == 0


def distance(net: nn.Module) -> torch.Tensor:
    return ((net.weight - TARGET) ** 2).sum()


def without_graph(net: nn.Module) -> float:
    return float(distance(net).detach())


KEYS = {"model": 0.1, "ema": 0.09}  # and how large their weights are


@pytest.fixture
def search(workplace: Path) -> Any:
    return functools.partial(lcsc_opt.search, build=lambda: Net(), name="tried", budget=4)


@pytest.fixture
def module(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Functions that every process can import."""
    (workplace / "called_from_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(workplace))
    return importlib.import_module("called_from_module")


def test_the_answer_is_better_than_ema_and_can_be_shown(search: Any, workplace: Path) -> None:
    called: list[str] = []
    functions = {"score": lambda net: distance(net), "held_out": lambda net: 2 * distance(net)}
    result = search(states(), **functions, callbacks=[lambda study, trial: called.append(study.study_name)])
    assert called == [study.name for study in result.studies for _ in study.trials]
    assert [study.name for study in result.studies] == ["tried/EMAGrid/0", "tried/LCSCGradient/0"]
    found = result.merge()
    net = Net()
    net.load_state_dict(found)
    ema, gradient = result.studies
    assert distance(net) < ema.searched
    rows = {row["optimizer"]: row for row in result.compare()}
    assert rows["LCSCGradient"]["held_out"] == pytest.approx(2 * gradient.searched)
    assert "LCSCGradient" in repr(result.compare())
    assert "EMA*" in result._repr_html_()
    assert len(result.plot().data) >= 2
    assert (workplace / "studies.db").exists()
    assert result.coefficients.sum() == pytest.approx(1)


def test_a_call_says_why_each_search_ended_as_the_command_line_does(
    search: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    functions = {"score": lambda net: distance(net), "held_out": lambda net: 2 * distance(net), "resume": True}
    result = search(states(), **functions)
    said = capsys.readouterr().err
    assert (
        f"lcsc: tried/LCSCGradient/0: best {result.studies[1].searched:.4g} after 4 evaluations; cut by its budget "
        "after 1 step, where a first round has 60" in said
    )
    assert "lcsc: tried: The answer is" in said
    search(states(), **functions)
    assert "lcsc: tried/LCSCGradient/0: finished already, 20" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("storage", "by_name", "budget", "again"),
    [
        ("studies.db", True, 4, "the same call with budget=8 goes on"),
        ("studies.db", True, "0.001 s", "the same call with budget='2 s' goes on"),
        ("studies.db", False, 4, "the same call with resume=True, budget=8 goes on"),
        (None, True, 4, "the same call with budget=8, from its beginning since storage=None keeps nothing, goes on"),
    ],
)
def test_a_call_says_what_a_budget_has_cut_and_which_call_goes_on(
    search: Any,
    module: Any,
    capsys: pytest.CaptureFixture[str],
    storage: str | None,
    by_name: bool,
    budget: int | str,
    again: str,
) -> None:
    functions = {"build": module.build, "score": module.score if by_name else lambda net: distance(net)}
    search(states(), **functions, optimizers="LCSC", storage=storage, budget=budget)
    said = capsys.readouterr().err
    assert "lcsc: tried: LCSC was cut after " in said
    assert f": {again} (as much again, about " in said


@pytest.mark.parametrize(
    ("storage", "by_name", "said"),
    [
        ("studies.db", True, ["lcsc: interrupted; what finished is kept; run the same call to continue"]),
        (
            "studies.db",
            False,
            ["lcsc: interrupted; what finished is kept; call search again with resume=True to continue"],
        ),
        (None, True, []),
    ],
)
def test_a_call_that_is_interrupted_says_how_to_continue_if_anything_is_kept(
    search: Any, module: Any, capsys: pytest.CaptureFixture[str], storage: str | None, by_name: bool, said: list[str]
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    functions = {"build": module.build, "score": module.score if by_name else lambda net: distance(net)}
    with pytest.raises(KeyboardInterrupt):
        search(states(), **functions, storage=storage, callbacks=[interrupt])
    assert [line for line in capsys.readouterr().err.splitlines() if "interrupted" in line] == said


def test_the_answer_may_be_of_an_earlier_call(search: Any) -> None:
    functions = {"score": lambda net: distance(net), "held_out": lambda net: 2 * distance(net)}
    first = search(states(), **functions, optimizers="LCSCGradient", rows="layers", budget=12)
    later = search(states(), **functions, optimizers="CMA", resume=True)
    assert [study.name for study in later.studies] == ["tried/CMA/0"]
    assert later.study == first.study
    assert later.study.name == "tried/LCSCGradient/0"
    assert torch.equal(later.merge()["weight"], first.merge()["weight"])


def test_a_score_with_a_draw_chooses_and_reports_on_its_other_items(search: Any) -> None:
    by_group = {"search": 0.0, "selection": 10.0, "held-out": 20.0}
    result = search(states(), score=lambda net, draw: distance(net) + by_group[draw.group])
    assert "The answer is" in repr(result)
    assert all(20 <= study.held_out < 30 for study in result.studies)


def test_a_score_may_have_a_bar_which_nobody_sees(search: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def score(net: Net) -> torch.Tensor:
        return torch.stack([distance(net) for _ in tqdm(range(3), desc="batches")]).sum()

    search(states(), score=score, budget=5)
    assert "batches" not in capsys.readouterr().err


def test_a_number_held_out_is_that_of_the_items_of_a_report(search: Any) -> None:
    sizes: dict[str, set[int]] = {}

    def score(net: Net, draw: Any) -> torch.Tensor:
        sizes.setdefault(draw.group, set()).add(draw.size)
        return distance(net)

    search(states(), score=score, size=20, held_out=50)
    assert sizes["search"] <= set(range(21))
    assert max(sizes["held-out"]) == 50
    with pytest.raises(lcsc_opt.LcscError, match="held_out: 50 is a number of items"):
        search(states(), score=score, held_out=50)


def test_a_result_whose_studies_were_deleted_says_so(search: Any) -> None:
    result = search(states(), score=without_graph, optimizers="CMA")
    assert lcsc(["delete", "tried/CMA/0", "--yes"]) == 0
    for read in (result.compare, result.plot, result.merge):
        with pytest.raises(lcsc_opt.LcscError, match="tried: no such experiment"):
            read()


def test_a_database_may_have_any_file_name(search: Any, workplace: Path) -> None:
    name = "a?seed=1%41{x}#1 é.db"
    if sqlalchemy.__version__ < "2.1":  # it would make a file of another name
        with pytest.raises(lcsc_opt.LcscError, match="opens no database of this name; give it another one"):
            search(states(), score=without_graph, optimizers="CMA", storage=name)
        name = name.replace("?", "")
    search = functools.partial(search, states(), score=without_graph, optimizers="CMA", storage=name)
    first = search()
    again = search(resume=True)
    assert np.array_equal(again.coefficients, first.coefficients)
    assert [path.name for path in workplace.glob("*.db")] == [name]


class Loader:
    """Data that nobody can compare with what they were."""

    def __init__(self, target: float) -> None:
        self.target = target
        self.calls = 0

    def distance(self, net: nn.Module) -> torch.Tensor:
        self.calls += 1
        return ((net.weight[0, 1] - self.target) ** 2).sum()


def on_a_line() -> dict[int, dict[str, torch.Tensor]]:
    return {step: {"weight": torch.tensor([[0.0, step]])} for step in (1, 2, 3)}


def test_other_data_inside_an_object_are_another_search(workplace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    search = functools.partial(
        lcsc_opt.search, on_a_line(), build=nn.Linear(2, 1, bias=False), optimizers="LCSCGradient", budget=30
    )
    near, far = Loader(1.5), Loader(50.0)
    first = search(score=lambda net: near.distance(net))
    second = search(score=lambda net: far.distance(net))
    assert far.calls > 8
    assert first.merge()["weight"][0, 1] < 2.5
    assert second.merge()["weight"][0, 1] > 3
    assert [first.name, second.name] == ["search", "search-2"]
    assert "search-2: starts a new search" in capfd.readouterr().err
    calls = far.calls
    resumed = search(score=far.distance, name="search", resume=True)
    assert resumed.studies == second.studies
    assert far.calls - calls <= 2, "the search has ended, and one stored candidate was tried again"


def test_a_number_in_a_name_that_the_user_gave_is_no_number_of_a_search(search: Any) -> None:
    given = "digits-2024"
    assert search(states(), score=lambda net: distance(net), optimizers="CMA", name=given).name == given
    digits = functools.partial(search, states(), optimizers="CMA", name="digits")
    for expected in ("digits", "digits-2"):
        assert digits(score=lambda net: distance(net)).name == expected
    assert digits(score=lambda net: distance(net), resume=True).name == "digits-2"


def test_functions_of_a_script_are_compared_like_those_of_a_module(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = workplace / "01_search.py"
    text = """
import sys, torch, lcsc_opt

def build():
    return torch.nn.Linear(2, 1, bias=False)

def score(net):
    return (net.weight[0, 1] - 5) ** 2

states = {step: {"weight": torch.tensor([[0.0, step]])} for step in (1, 2, 3)}
for jobs in (1, 2):
    result = lcsc_opt.search(states, build=build, score=score, budget=int(sys.argv[1]), jobs=jobs)
    print(result.name, len(result.studies[1].trials))
"""

    def printed(text: str, budget: str, refused: str) -> str:
        script.write_text(text)
        monkeypatch.setattr("sys.argv", [str(script), budget])
        with pytest.raises(lcsc_opt.LcscError, match=refused):
            run_script(script)
        return capsys.readouterr().out

    in_processes = r"other processes cannot import build \(build\) and score \(score\)"
    assert printed(text, "4", in_processes) == "score 4\n"
    assert printed(text, "6", in_processes) == "score 6\n"
    text = text.replace("- 5", "- 50")
    changed = "score: changed since it began: 01_search changed. Undo the change, or give another name"
    assert printed(text, "6", changed) == "", "no answer of the old function"
    assert printed(text.replace("budget=", "accept_changes=True, budget="), "6", in_processes) == "score 6\n"


def test_functions_of_a_module_make_a_study_file_that_continues(search: Any, module: Any, typed: Typed) -> None:
    save_states()
    search = functools.partial(search, "*.pt", build=module.build, score=module.score, optimizers="CMA")
    result = search(held_out=module.held_out)
    text = result.to_study_file("study.yaml")
    assert "score: called_from_module:score" in text
    assert "finished already" in typed("run", "study.yaml").err
    assert lcsc(["run", "study.yaml", "--budget", "6"]) == 0
    assert len(result.studies[0].trials) == 6
    assert len(search(jobs=2, name="jobs").studies[0].trials) == 4
    made_anew = typed("evaluate", result.name, "--images", "100", "--keep").out
    assert "preview" not in made_anew
    assert "100 items" not in made_anew, "a score samples none, however many are asked for"


def test_a_study_file_of_a_temporary_database_needs_checkpoints_that_stay(search: Any, module: Any) -> None:
    save_states()
    functions = {"build": module.build, "score": module.score, "optimizers": {"CMA": {"step_size": np.float64(0.2)}}}
    assert "step_size: 0.2" in search("*.pt", **functions, storage=None).to_study_file()
    with pytest.raises(lcsc_opt.LcscError, match="were in memory, and their packed copy is deleted with this result"):
        search(states(), **functions, storage=None).to_study_file()


def test_a_study_file_is_refused_for_what_no_process_can_import(search: Any, typed: Typed) -> None:
    result = search(states(), build=Net(), score=distance, held_out=lambda net: distance(net))
    with pytest.raises(lcsc_opt.LcscError, match=r"cannot import build \(a Net\) and held_out \(.*lambda"):
        result.to_study_file()
    assert "handed to lcsc_opt.search" in typed("run", "tried/LCSCGradient/0", "--budget", "9", status=2).err


def test_what_no_process_can_import_is_exported_by_the_checkpoints_alone(search: Any, typed: Typed) -> None:
    result = search(states(), score=lambda net: distance(net), rows="layers")
    typed("export", "tried/LCSCGradient/0", "-o", "best.safetensors")
    [study] = [study for study in result.studies if study.name == "tried/LCSCGradient/0"]
    exported = load_file("best.safetensors")
    assert exported["weight"] == pytest.approx(study.merge()["weight"], abs=1e-6)
    assert typed.json("show", "best.safetensors")["study"] == study.name


def test_statistics_of_batch_normalization_need_the_functions(search: Any, typed: Typed) -> None:
    trained = {step: {"1.weight": torch.ones(4) * step, "1.bias": torch.zeros(4)} for step in range(1, 4)}
    for step, state in trained.items():
        state.update({"1.running_mean": torch.zeros(4), "1.running_var": torch.ones(4) * step})
        state["1.num_batches_tracked"] = torch.tensor(step)

    def net() -> nn.Module:
        return nn.Sequential(nn.Identity(), nn.BatchNorm1d(4))

    def score(net: nn.Module) -> torch.Tensor:
        return net(torch.ones(2, 4)).sum()

    search(
        trained,
        build=net,
        score=score,
        settings={"batch_norm": "tests.experiment.test_calling:passes"},
        optimizers="CMA",
    )
    assert "handed to lcsc_opt.search" in typed.refused("export", "tried/CMA/0", "-o", "best.safetensors")


def passes(net: nn.Module) -> None:
    net(torch.arange(8.0).reshape(2, 4))


def test_an_error_of_the_users_is_theirs(search: Any) -> None:
    def score(net: nn.Module) -> float:
        return {}["missing"]

    with pytest.raises(lcsc_opt.LcscError, match=r"score: .*raised KeyError: 'missing'") as raised:
        search(states(), score=score)
    assert isinstance(raised.value.__cause__, KeyError)
    assert not Path("studies.db").exists()


@pytest.mark.parametrize(
    ("checkpoints", "changed", "said"),
    [
        ([states(1)[1]] * 3, {}, "all checkpoints hold the same weights"),
        ({**states(), 4: states()[3]}, {}, "steps 3 and 4 hold the same weights: keep copies"),
        ("runs/*.pt", {}, "No checkpoint"),
        ([], {}, "got none"),
        (None, {}, "expected paths, or state dicts"),
        ({1: {"weight": 3}, 2: {"weight": 4}}, {}, "step 1: weight is a int, not a tensor"),
        ({"last": states(1)[1]}, {}, "got the step 'last'"),
        (states(), {"jobs": 2}, r"jobs=2: other processes cannot import build"),
        ({True: states(1)[1], False: states(1)[1]}, {}, "got the step True"),
        ([Net(), Net()], {}, r"got a Net; of a network, give its state_dict\(\)"),
        ({step: {"model": state, "step": step} for step, state in states().items()}, {}, r"give state\['model'\]"),
        ({**states(), 2: {"weight": torch.tensor([[0, 0, torch.nan, 0]])}}, {}, "'weight' at step 2 holds NaN"),
        (states(), {"optimizers": []}, r"optimizers: expected names, or mappings.*, got \[\]"),
        (states(), {"score": None, "held_out": without_graph}, "give either score, or sample"),
        (states(), {"rows": "layer"}, "rows: expected layers, channels, auto or "),
        (states(3, 5), {}, "do not fit"),
        (states(), {"build": lambda: 3}, "returned a int"),
        (states(), {"score": lambda net: torch.tensor(1j)}, "must return a number.*got tensor"),
        (states(), {"score": lambda net: {"accuracy": "high"}}, "must return a number.*got 'high'"),
        (states(), {"score": 3}, "score: expected a function"),
        (states(), {"sample": distance}, "either score, or sample"),
        (
            states(),
            {"score": None, "sample": distance, "held_out": distance},
            "^held_out: .*the report's number of images",
        ),
        (states(), {"score": None, "sample": distance, "held_out": True}, "^held_out: .*the report's number of images"),
        (states(), {"settings": {"precision": 16}}, "precision: unknown key"),
        (states(), {"images": 16}, "images: unknown key"),
        (states(), {"optimizers": ["CMAA"]}, "no such optimizer"),
        (states(), {"space": "afine"}, "space.kind: Input should be 'affine'"),
        (states(), {"space": ["affine"]}, "space: expected a name or a mapping"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(search: Any, checkpoints: Any, changed: Any, said: str) -> None:
    with pytest.raises(lcsc_opt.LcscError, match=said) as refused:
        search(checkpoints, **{"score": lambda net: distance(net), **changed})
    assert "\n" not in str(refused.value)
    assert not Path("studies.db").exists()


def test_state_dicts_of_two_models_leave_nothing_packed(search: Any) -> None:
    with pytest.raises(lcsc_opt.LcscError, match=r"the state dict of step 2.* does not fit the first one"):
        search({**states(3), 2: states(1, 5)[1]}, score=distance)
    assert list(Path("studies.files").iterdir()) == []


def test_checkpoints_may_come_from_a_generator(search: Any, workplace: Path) -> None:
    save_states()
    search = functools.partial(search, score=without_graph, optimizers="CMA", storage=None)
    files = search(f"{step}.pt" for step in (1, 2, 3))
    assert files.studies[0].steps == (1, 2, 3)
    in_memory = search(state for state in states().values())
    assert in_memory.studies[0].steps == (1, 2, 3, 4)
    numpy_steps = {np.int64(step): state for step, state in states().items()}
    result = search(numpy_steps, budget=np.int64(4))
    assert result.studies[0].steps == (1, 2, 3, 4)


def test_without_a_storage_everything_lives_as_long_as_one_of_the_studies(
    search: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("HOME", str(tmp_path))
    before = set(tmp_path.rglob("*"))
    result = search(states(), score=without_graph, optimizers="CMA", storage=None)
    assert list(Path(result.studies[0].folder.path).glob("studies.files/*.trajectory"))
    assert set(result.merge()) == {"weight"}
    [study] = result.studies
    del result
    gc.collect()
    assert study.state == "finished"
    del study
    gc.collect()
    assert set(tmp_path.rglob("*")) == before


def test_packed_checkpoints_lie_beside_their_database(search: Any, workplace: Path) -> None:
    save_states()
    search = functools.partial(search, score=without_graph, optimizers="CMA")
    search("*.pt", storage="mine.db")
    search(states(), storage="sqlite:///other.db")
    assert len(list(Path("mine.files").glob("*.trajectory"))) == 1
    assert len(list(Path("other.files").glob("*.trajectory"))) == 1


def test_a_search_in_memory_that_fails_leaves_no_folder(search: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(Path.cwd()))
    with pytest.raises(lcsc_opt.LcscError):
        search(states(), score=lambda net: None, storage=None)
    assert list(Path.cwd().glob("lcsc-*")) == []


def test_checkpoints_may_be_a_trajectory_and_options_a_mapping(search: Any, workplace: Path) -> None:
    pack_states()
    opened = lcsc_opt.Trajectory.open("run.trajectory")
    for checkpoints in ("run.trajectory", opened):
        result = search(checkpoints, score=without_graph, optimizers={"CMA": {"step_size": 0.1}, "EMAGrid": {}})
        assert [study.steps for study in result.studies] == [(1, 2, 3, 4)] * 2
    with pytest.raises(lcsc_opt.LcscError, match=r"step_size was 0\.1, is now 0\.2"):
        search(opened, score=without_graph, optimizers={"CMA": {"step_size": 0.2}}, budget=6, resume=True)


def test_a_trajectory_that_was_opened_in_part_is_refused(search: Any, workplace: Path) -> None:
    pack_states()
    part = lcsc_opt.Trajectory.open("run.trajectory", steps=(2, 3))
    with pytest.raises(lcsc_opt.LcscError, match="opened with 2 of its 4 checkpoints"):
        search(part, score=without_graph)
    result = search(part.path, score=without_graph, settings={"select": {"first_step": 2, "last_step": 3}})
    assert result.studies[0].steps == (2, 3)


def test_a_file_of_the_users_does_not_hide_ours(search: Any, workplace: Path) -> None:
    (workplace / "score.py").write_text("raise SystemExit")
    with pytest.raises(lcsc_opt.LcscError, match=r"hides the score\.py"):
        search(states(), score=distance)


def asked(study: lcsc_opt.Study) -> list[Any]:
    return [np.array(trial["coefficients"]).tolist() for trial in study.trials]


def test_a_time_ends_a_search_and_a_grid_and_more_time_continues_both(search: Any) -> None:
    options = {"score": without_graph, "optimizers": ["EMAGrid", "LCSC"], "resume": True}
    short = search(states(), **options, budget=datetime.timedelta(seconds=0.01))
    assert [study.state for study in short.studies] == ["finished"] * 2
    averages = asked(short.studies[0])
    assert 1 <= len(averages) < 11, "a grid obeys the time, too, with what it has tried by then"
    first = asked(short.studies[1])
    assert first, "a result, although no time was left"
    same = search(states(), **options, budget=datetime.timedelta(seconds=0.01))
    assert asked(same.studies[1]) == first

    begun = time.monotonic()
    longer = search(states(), **options, budget="0.3 s")
    assert 0.2 < time.monotonic() - begun < 20, "a machine may be slow"
    assert asked(longer.studies[0])[: len(averages)] == averages
    assert len(longer.studies[0].trials) > len(averages)
    continued = asked(longer.studies[1])
    assert len(continued) > len(first)
    assert continued[: len(first)] == first


def test_only_failures_that_ended_a_search_are_evaluated_again(search: Any) -> None:
    """Later candidates depend on the others."""
    working = [math.inf]  # so many evaluations

    def score(net: nn.Module) -> float:
        working[0] -= 1
        if working[0] < 0:
            raise OSError("the disk is away")
        return without_graph(net)

    def ends_with_failures(_: Any, trial: Any) -> None:
        working[0] = 0 if 2 <= trial.number < 4 else math.inf

    search = functools.partial(search, states(), score=score, optimizers="CMA", resume=True)
    search(budget=5, callbacks=[ends_with_failures])
    again = search(budget=7)
    before = ["COMPLETE"] * 3 + ["FAIL"] * 2 + ["COMPLETE"] * 2
    assert [trial["state"] for trial in again.studies[0].trials] == before
    working[0] = 0
    with pytest.raises(
        lcsc_opt.LcscError, match=r"trial 6 could not be evaluated again, .*: OSError: the disk is away"
    ):
        search(budget=12)
    working[0] = 1  # the stored candidate, which is tried first
    with pytest.raises(lcsc_opt.LcscError, match=r"5 trials in a row failed .* what failed last is repeated"):
        search(budget=12)
    working[0] = math.inf
    assert [trial["state"] for trial in search(budget=12).studies[0].trials] == [*before, *["COMPLETE"] * 5]


@pytest.fixture
def real_images(workplace: Path) -> Path:
    """A folder of 40 images of noise, whose pixels vary in almost as many directions as there are images."""
    return write_folder(workplace / "real", 90 + pixels(40, 8, 8) % 70)


def convolution() -> nn.Module:
    return nn.Conv2d(3, 3, 1, bias=False)


def convolutions(scale: float = 0.1) -> dict[int, dict[str, torch.Tensor]]:
    return {step: {"weight": torch.full((3, 3, 1, 1), scale * step)} for step in range(1, 4)}


def search_images(checkpoints: Any = None, **changed: Any) -> Any:
    arguments: dict[str, Any] = {
        "build": convolution,
        "sample": lambda net, noise: torch.tanh(net(noise)),
        "reference": "real",
        "image_shape": (3, 8, 8),
        "images": 20,
        "held_out": 20,
        "settings": {"held_out_metrics": [], "device": "cpu"},
        "loss": PIXELS,
        "budget": 2,
    }
    return lcsc_opt.search(checkpoints or convolutions(), **{**arguments, **changed})


@pytest.mark.usefixtures("real_images")
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"sample": lambda net, noise: None}, "sample returned a NoneType; expected a tensor"),
        ({"sample": lambda net, noise: net(noise)[:1]}, r"expected floating point images \[2, C, H, W\]"),
        ({"reference": "nowhere"}, "nowhere does not exist"),
        (
            {"reference": torch.zeros(4, 3, 8, 8)},
            r"reference: Input should be a valid string or a valid dictionary, got tensor\(\[\[\[\[0",
        ),
        ({"image_shape": 8}, "image_shape: Input should be a valid list, got 8"),
        ({"held_out": 0}, "images: Input should be greater than or equal to 2, got 0"),
    ],
)
def test_images_that_cannot_be_searched_are_refused_in_one_line(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(lcsc_opt.LcscError, match=said) as refused:
        search_images(**changed)
    assert "\n" not in str(refused.value)
    assert not Path("studies.db").exists()


@pytest.mark.usefixtures("real_images")
@pytest.mark.parametrize(("arguments", "shape"), [({}, (3, 3)), ({"space": {"kind": "convex", "rows": None}}, (3,))])
def test_images_are_sampled_and_have_coefficients_for_each_channel_unless_that_is_not_wanted(
    arguments: dict[str, Any], shape: tuple[int, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    result = search_images(name="rows", loss="fid@pixels", **arguments)
    assert result.studies[1].name == "rows/LCSCGradient/0"
    assert result.studies[1].coefficients.shape == shape
    assert result.studies[1].held_out is not None
    warned = capsys.readouterr().err.count("real images for each effective dimension of its features")
    assert warned == 1, "of the search that follows the gradient"


@pytest.mark.usefixtures("real_images")
def test_of_very_many_checkpoints_evenly_spaced_ones_are_searched_also_when_the_folder_grows(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row for each channel of hundreds of checkpoints is slow, fills the database, and gains no more."""

    def save(steps: range) -> None:
        for step in steps:
            torch.save({"weight": torch.full((3, 3, 1, 1), 0.01 * step)}, workplace / f"step_{step:03d}.pt")

    save(range(1, 41))
    sampled = functools.partial(search_images, "step_*.pt", name="many", resume=True)
    found = sampled()
    assert found.studies[-1].coefficients.shape == (3, 16)
    assert "of these, 16 evenly spaced ones are used" in capsys.readouterr().err
    steps = found.studies[-1].objective.steps
    assert (steps[0], steps[-1]) == (1, 40)
    save(range(41, 61))
    again = sampled()
    assert again.studies[-1].objective.steps == steps, "a search keeps its checkpoints"
    assert "finished already" in capsys.readouterr().err
    few = search_images("step_00*.pt", name="few")
    assert few.studies[-1].coefficients.shape == (3, 9)
    of_all = sampled(name="all", settings={"select": {"count": 60}, "held_out_metrics": [], "device": "cpu"})
    assert of_all.studies[-1].coefficients.shape == (3, 60)
    for_another = sampled(name="another", optimizers="LCSC")
    assert for_another.studies[-1].coefficients.shape == (60,), "a search without a gradient gains by many"


@pytest.mark.usefixtures("real_images")
def test_of_two_state_dicts_in_a_file_the_key_chooses_and_the_average_is_compared(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in range(1, 4):
        weights = {name: convolutions(scale)[step] for name, scale in KEYS.items()}
        torch.save(weights, workplace / f"model{step}.pt")
    settings = {"key": "model", "held_out_metrics": [], "device": "cpu"}
    sampled = functools.partial(search_images, "model*.pt", name="keyed", settings=settings, resume=True)
    result = sampled()
    trajectory: Any = result.study.objective.trajectory
    assert float(trajectory.checkpoint(-1)["weight"][0, 0]) == pytest.approx(0.3)
    assert "trainer's EMA" in repr(result)
    capsys.readouterr()
    larger = sampled(held_out=30)
    assert "trainer's EMA" in repr(larger)
    assert "keyed/LCSCGradient/0: finished already, 20" in capsys.readouterr().err
    assert {row["held_out_images"] for row in larger.compare()} == {30}, "the report is made again"
