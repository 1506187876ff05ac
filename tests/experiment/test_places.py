"""Where things are is decided once, and what a name means now decides whether a stored answer is returned."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from PIL import Image
from sqlalchemy import make_url

import lcsc_opt
from lcsc_opt.base.errors import StudyStoreError, TrajectoryError
from lcsc_opt.database.urls import masked, storage_url
from lcsc_opt.sampling.network import PreparedNetwork
from tests.commands import Typed

TASK = """
import os, torch
import numpy as np
FACTOR = 1.0

def build():
    return torch.nn.Linear(3, 1, bias=False)

def score(net):
    {change}
    return FACTOR * float((net.weight.detach() ** 2).mean())

def sample(net, noise):
    return net.weight.mean() * noise
"""


def write_project(folder: Path, offset: float = 0.0) -> Path:
    (folder / "ck").mkdir(parents=True)
    for step in (100, 200, 300):
        torch.manual_seed(step)
        torch.save({"weight": torch.randn(1, 3) + offset}, folder / f"ck/m-{step}.pt")
    return folder


@pytest.fixture
def task(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Writes a module with a network and a score, and imports it."""
    monkeypatch.syspath_prepend(str(workplace))

    def written(change: str = "pass") -> Any:
        (workplace / "placed_task.py").write_text(TASK.replace("{change}", change))
        import placed_task  # type: ignore[import-not-found]  # it was just written

        return placed_task

    return written


def search(task: Any, checkpoints: Any = "ck", **options: Any) -> Any:
    how = {"optimizers": ["LCSC"], "budget": 8, **options}
    return lcsc_opt.search(checkpoints, build=task.build, score=task.score, **how)


def mean(result: Any) -> float:
    return float(result.merge()["weight"].mean())


def test_results_of_two_folders_stay_what_they_are(task: Any, workplace: Path) -> None:
    results = []
    for name, offset in (("a", 0.0), ("b", 50.0)):
        os.chdir(write_project(workplace / name, offset))
        results.append(search(task()))
    assert mean(results[0]) < 25 < mean(results[1])
    os.chdir(workplace)
    assert mean(results[0]) < 25
    assert results[0].studies[0].state == "finished"


def test_one_database_does_not_answer_for_another_project(task: Any, workplace: Path) -> None:
    storage = workplace / "all.db"
    os.chdir(write_project(workplace / "a"))
    search(task(), storage=storage)
    os.chdir(write_project(workplace / "b", 50.0))
    with pytest.raises(TrajectoryError, match="does not hold the 3 checkpoints that the study was begun with"):
        search(task(), storage=storage)
    assert mean(search(task(), storage=storage, name="of_b")) > 25


def test_a_project_that_moved_goes_on(task: Any, workplace: Path) -> None:
    os.chdir(write_project(workplace / "a"))
    first = search(task(), storage=workplace / "all.db")
    os.chdir(workplace)
    (workplace / "a").rename(workplace / "moved")
    os.chdir(workplace / "moved")
    assert mean(search(task(), storage=workplace / "all.db")) == mean(first)


def test_real_images_whose_folder_is_renamed_are_the_same_and_others_are_not(task: Any, workplace: Path) -> None:
    module = task()
    write_project(workplace)
    for name in ("photos", "others"):
        (workplace / name).mkdir()
        for index in range(20):
            pixels = np.full((8, 8), 10 * index + (name == "others"), dtype=np.uint8)
            Image.fromarray(pixels).save(workplace / name / f"{index}.png")

    def of_reference(reference: Any) -> Any:
        return lcsc_opt.search(
            "ck",
            build=module.build,
            sample=module.sample,
            reference=reference,
            image_shape=(1, 8, 8),
            images=20,
            held_out=20,
            loss="fid@pixels",
            optimizers={"Grid": {"profile": "single"}},
            storage=workplace / "all.db",
            name=f"of_{type(reference).__name__}",
        )

    halves = {"held_out_fraction": 0.5}
    first = [of_reference("photos"), of_reference({"train": "photos", **halves})]
    (workplace / "photos").rename(workplace / "pictures")
    again = [of_reference("pictures"), of_reference({"train": "pictures", **halves})]
    assert [mean(result) for result in again] == [mean(result) for result in first]
    for other in ("others", {"train": "others", **halves}, {"train": "pictures", "held_out_fraction": 0.25}):
        with pytest.raises(StudyStoreError, match="reference"):
            of_reference(other)


@pytest.mark.parametrize(
    "change",
    ["os.makedirs('out', exist_ok=True); os.chdir('out')", "os.makedirs('x'); os.chdir('x'); os.rmdir('../x')"],
)
def test_a_score_that_goes_to_another_folder_leaves_everything_where_it_was(
    task: Any, workplace: Path, change: str
) -> None:
    write_project(workplace)
    result = search(task(change))
    assert Path.cwd() == workplace
    assert result.studies[0].state == "finished"
    assert [path.name for path in workplace.rglob("*.db")] == ["studies.db"]


def test_a_database_is_named_by_its_whole_path_and_shown_from_here(workplace: Path) -> None:
    url = storage_url("sqlite:///studies.db")
    assert url == f"sqlite:///{workplace / 'studies.db'}"
    assert masked(url) == "sqlite:///studies.db"
    assert storage_url("sqlite:///d.db?timeout=5").startswith(f"sqlite:///{workplace}/d.db?")
    assert storage_url("postgresql://server/d") == "postgresql://server/d"
    with_driver = make_url(storage_url("sqlite+pysqlcipher://:word@/d.db"))
    assert (with_driver.drivername, with_driver.password) == ("sqlite+pysqlcipher", "word")
    assert with_driver.database == f"{workplace}/d.db"


def test_what_a_score_leaves_behind_in_the_network_is_put_back(task: Any, workplace: Path) -> None:
    write_project(workplace)
    seen = []

    def build() -> torch.nn.Module:
        network = torch.nn.Sequential(torch.nn.Linear(3, 1, bias=False), torch.nn.BatchNorm1d(1, affine=False))
        network[0].weight.requires_grad_(False)
        return network

    def score(network: Any) -> float:
        seen.append(
            (network.training, network[0].weight.dtype, network[0].weight.requires_grad, network[1].running_var.dtype)
        )
        network.train().half()
        network[0].weight.requires_grad_(True)
        return float(network[0].weight.detach().float().norm())

    states = {
        step: {
            "0.weight": torch.randn(1, 3),
            "1.running_mean": torch.zeros(1),
            "1.running_var": torch.ones(1),
            "1.num_batches_tracked": torch.tensor(step),
        }
        for step in (1, 2, 3)
    }
    lcsc_opt.search(states, build=build, score=score, optimizers=["LCSC"], budget=4, storage=None)
    assert set(seen) == {(False, torch.float32, False, torch.float32)}


def test_digits_that_cannot_come_back_are_refused() -> None:
    inner = torch.nn.ModuleDict({"frozen": torch.nn.ModuleDict({"searched": torch.nn.Linear(3, 1)})})
    module = torch.nn.ModuleDict({"searched": torch.nn.Linear(3, 1), "inner": inner})
    network = PreparedNetwork(module, trained=None)
    network.module.half()  # as a score may do
    with pytest.raises(lcsc_opt.LcscError, match=r"in torch\.float16, and its inner\.frozen\.searched\.weight is"):
        network.load({"searched.weight": torch.zeros(1, 3), "searched.bias": torch.zeros(1)})


@pytest.fixture
def small(task: Any, workplace: Path) -> Any:
    write_project(workplace)
    return search(task(), name="n", storage=workplace / "studies.db")


def test_a_study_that_was_renamed_is_foreign(small: Any, typed: Typed) -> None:
    url = small.storage
    optuna.copy_study(from_study_name="n/LCSC/0", from_storage=url, to_storage=url, to_study_name="best one so far")
    assert [row["study"] for row in typed.json("list")] == ["n/LCSC/0"]
    assert "is a study of another program" in typed("show", "best one so far", status=2).err


def test_a_trial_that_plain_optuna_added_is_foreign(small: Any, typed: Typed, task: Any) -> None:
    best = small.studies[0].searched
    study = optuna.load_study(study_name="n/LCSC/0", storage=small.storage)
    study.optimize(lambda trial: -1.0 + 0 * trial.suggest_float("sum_abs", 1, 1e6, log=True), n_trials=1)
    assert lcsc_opt.load_study("n/LCSC/0", small.storage).searched == best
    assert typed.json("show", "n/LCSC/0")["evaluations"] == 8
    typed("export", "n/LCSC/0", "-o", "x.safetensors")
    again = search(task(), name="n", storage="studies.db", budget=12)
    assert [trial["number"] for trial in again.studies[0].trials] == [*range(8), *range(9, 13)]


def test_a_search_cannot_start_where_its_space_does_not_reach(task: Any, workplace: Path, typed: Typed) -> None:
    states = {step: {"weight": torch.full((1, 3), float(step))} for step in (1, 2, 3)}  # the best is 0: beyond them
    result = search(task(), states, name="first", optimizers=["LCSCQuadratic"], budget=12, storage="studies.db")
    assert (result.studies[0].coefficients < 0).any()
    first = "first/LCSCQuadratic/0"
    refused = typed("run", first, "name=second", f"start={first}", "space=convex", status=2)
    assert f"start: the answer of {first} has negative coefficients" in refused.err


def test_a_score_of_another_model_is_told(task: Any, workplace: Path, capfd: Any) -> None:
    write_project(workplace)
    other = task().build()

    def score(net: Any) -> float:
        return float(other.weight.detach().norm())

    lcsc_opt.search("ck", build=task().build, score=score, optimizers=["LCSC"], budget=4, storage=None)
    assert "the start of the search have the same loss" in capfd.readouterr().err
    search(task(), storage=None)
    assert "have the same loss" not in capfd.readouterr().err


FILE_OF_CALLER = """
from pathlib import Path
from lcsc_opt.base.records import Evaluation
from lcsc_opt.objective.contract import Objective

class Distance(Objective):
    steps = (1, 2, 3)

    def __init__(self, target: Path) -> None:
        self.target = float(target.read_text())

    def evaluate(self, candidate):
        return Evaluation(float(((candidate.coefficients - self.target) ** 2).sum()))

    def describe(self):
        return {"target": self.target}

def build(settings, context):
    return Distance(context.path(settings["target"]))
"""


def test_a_file_of_the_callers_folder_is_found_again_from_another_one(workplace: Path, typed: Typed) -> None:
    for name, target in (("project", None), ("here", "0.25"), ("there", "7")):
        (workplace / name).mkdir()
        if target is not None:
            (workplace / name / "target.txt").write_text(target)
    (workplace / "project" / "distance.py").write_text(FILE_OF_CALLER)
    objective = "objective: {file: distance.py, settings: {target: target.txt}}"
    (workplace / "project" / "d.yaml").write_text(
        f"name: d\n{objective}\noptimizers: [CMA]\nbudget: {{evaluations: 4}}\n"
    )
    os.chdir(workplace / "here")
    typed("run", "../project/d.yaml", "--storage", "d.db")

    def target_in(database: Path) -> float:
        found: Any = lcsc_opt.load_study("d/CMA/0", database).objective
        return float(found.target)

    os.chdir(workplace / "there")
    assert target_in(workplace / "here/d.db") == 0.25, "not the file of the same name that lies here"
    typed("evaluate", "d", "--images", "20", "--storage", str(workplace / "here/d.db"))
    typed("run", "d/CMA/0", "--budget", "6", "--storage", str(workplace / "here/d.db"))
    (workplace / "here").rename(workplace / "moved")
    (workplace / "moved/d.db").rename(workplace / "d.db")
    os.chdir(workplace / "moved")
    assert target_in(workplace / "d.db") == 0.25, "in the folder that was moved"


@pytest.mark.parametrize("optimizers", [["LCSC"], ["LCSC", "CMA"]])
def test_a_search_goes_on_only_with_the_data_that_its_score_has_read(
    task: Any, workplace: Path, optimizers: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody can tell what a function reads. A search, and another one of the experiment, begin with a stored trial."""
    module = task("global FACTOR; FACTOR = float(np.loadtxt('data.txt'))")
    write_project(workplace)
    data = workplace / "data.txt"
    data.write_text("1.0")
    first = search(module, name="e", storage="e.db")
    data.write_text("2.0")
    said = r"e/LCSC/0: trial 7 had the loss .*: what the score reads has changed, such as its data, or this machine"
    longer = {"name": "e", "storage": "e.db", "budget": 12, "optimizers": optimizers}
    with pytest.raises(StudyStoreError, match=said):
        search(module, **longer)
    assert len(first.studies[0].trials) == 8
    search(module, name="e", storage="e.db")
    assert "finished already" in (finished := capsys.readouterr().err)
    assert "with the data of then" in finished
    data.write_text("1.0")
    goes_on = search(module, **longer)
    assert [len(study.trials) for study in goes_on.studies] == [12] * len(optimizers)
    data.write_text("2.0")
    search(module, **{**longer, "budget": 14}, accept_changes=True)
