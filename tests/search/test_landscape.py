"""``lcsc landscape``: an ordinary study that is continued, compared with nothing, and left alone by everything else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import yaml

from lcsc_opt.base.errors import LcscError, StudySpecError, StudyStoreError
from lcsc_opt.cli import run as lcsc
from lcsc_opt.coefficients.plane import Plane, grid_positions
from lcsc_opt.coefficients.profiles import ema_coefficients, window_ema_rates
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import StoredStudy, study_names
from lcsc_opt.search.landscape import LandscapeOptions, default_corners_of, landscape_plan, run_landscape
from lcsc_opt.search.plan import stored_plan
from tests.processes import lcsc_process

STEPS = [10, 20, 30, 40, 50]
CORNERS = (10, 30, 50)

OBJECTIVE = '''
import os
import signal

import numpy as np

from lcsc_opt.objective.contract import Objective
from lcsc_opt.base.records import Cost, Evaluation

THETA = np.cumsum(np.random.default_rng(0).normal(size=(5, 7)), axis=0)


class Weights(Objective):
    """How far merged weights are from a target; models far from the checkpoints cannot be evaluated."""

    def __init__(self, images, reach):
        self._images, self._reach = images, reach
        self._left = int(os.environ.get("INTERRUPTED_AT", "-1"))

    @property
    def steps(self):
        return (10, 20, 30, 40, 50)

    @property
    def images_per_evaluation(self):
        return self._images

    def gram(self):
        centered = THETA - THETA.mean(axis=0)
        return centered @ centered.T

    def evaluate(self, candidate):
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGINT)
        if np.abs(candidate.coefficients).sum() > self._reach:
            raise RuntimeError("does not sample")
        loss = float(np.square(candidate.coefficients @ THETA - 0.5).sum())
        return Evaluation(loss, {"fid": loss}, Cost(images=self._images))

    def describe(self):
        return {"kind": "weights", "images": self._images, "version": os.environ.get("WEIGHTS_VERSION", "1")}


def build(settings):
    return Weights(settings.get("images", 10), settings.get("reach", 1e9))
'''

STUDY: dict[str, Any] = {
    "name": "small",
    "objective": {"file": "weights.py", "settings": {"images": 10}},
    "optimizers": ["EMAGrid", {"LCSC": {"mutation": 0.1}}],
    "budget": {"evaluations": 7},
    "held_out": {"images": 10, "top": 1},
}


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished search."""
    folder = tmp_path_factory.mktemp("searched")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write(folder)
    return folder


@pytest.fixture
def database(workplace: Path, searched: Path) -> str:
    shutil.copytree(searched, workplace, dirs_exist_ok=True)
    return "sqlite:///studies.db"


def write(folder: Path, *, search: bool = True, **changes: Any) -> str:
    (folder / "weights.py").write_text(OBJECTIVE)
    (folder / "small.yaml").write_text(yaml.safe_dump({**STUDY, **changes}))
    if search:
        assert lcsc(["run", "small.yaml"]) == 0
    return "sqlite:///studies.db"


def compute(database: str, source: str = "small/LCSC/0", seed: int = 0, **options: Any) -> StoredStudy:
    storage = open_storage(database, write=True)
    chosen = LandscapeOptions(**{"corners": CORNERS, "size": 3, **options})
    name, _ = run_landscape(storage, StoredStudy.open(storage, source), chosen, seed=seed)
    return StoredStudy.open(storage, name)


def losses(study: StoredStudy) -> list[float | None]:
    return [trial.value for trial in study.trials()]


def test_a_landscape_is_a_study_whose_trials_are_the_points_of_the_plane(database: str) -> None:
    study = compute(database)
    plane = Plane.through(CORNERS, STEPS)
    expected = [plane.at(x, y) for x, y in grid_positions(3, 0.75)]
    assert study.name == "small/Landscape/0"
    np.testing.assert_allclose([t.user_attrs["coefficients"] for t in study.trials()], expected, rtol=0, atol=1e-14)
    plain = optuna.load_study(study_name=study.name, storage=database)
    assert [trial.value for trial in plain.trials] == losses(study)
    assert study.attributes["landscape_of"] == "small/LCSC/0"
    assert study.attributes["search_ended"] == {"evaluations": 12, "exhausted": True}
    assert study.attributes.get("held_out") is None  # it is no search, and has no answer


def test_points_beyond_the_space_of_the_search_are_visited_too(workplace: Path) -> None:
    study = compute(write(workplace, space="convex"))
    assert min(min(trial.user_attrs["coefficients"]) for trial in study.trials()) == -2.5


def test_it_has_the_objective_of_the_search(database: str) -> None:
    study = compute(database)
    storage = study.storage
    search = StoredStudy.open(storage, "small/LCSC/0").attributes
    assert study.attributes["fingerprint"]["objective"] == search["fingerprint"]["objective"]
    assert study.attributes["specification"]["objective"] == search["specification"]["objective"]
    ema = StoredStudy.open(storage, "small/EMAGrid/0").trials()[0]
    rate = window_ema_rates(STEPS)[0]
    again = compute(database, seed=1, corners=(f"ema:{rate!r}", 10, 30)).trials()[0]
    assert again.value == pytest.approx(ema.value, rel=1e-12)


def test_what_a_projection_in_weights_needs_is_stored(database: str) -> None:
    stored = compute(database).attributes["plane"]
    theta = np.cumsum(np.random.default_rng(0).normal(size=(5, 7)), axis=0)
    plane = Plane.through(CORNERS, STEPS)
    expected = (plane.directions @ theta) @ (theta - theta.mean(axis=0)).T
    assert stored["space"] == "weights"
    np.testing.assert_allclose(stored["products"], expected, rtol=1e-9, atol=1e-9)


def test_an_objective_without_weights_is_projected_in_coefficients(workplace: Path) -> None:
    (workplace / "losses.py").write_text("def loss(coefficients):\n    return float((coefficients**2).sum())\n")
    function = {"file": "function.py", "settings": {"callable": "losses:loss", "steps": STEPS}}
    study = compute(write(workplace, objective=function))
    assert study.attributes["plane"] == {"space": "coefficients", "products": None}
    assert len(study.trials()) == 12


def test_run_again_it_evaluates_nothing_and_keeps_its_options(database: str) -> None:
    study = compute(database, size=4, margin=0.5)
    before = losses(study)
    storage = study.storage
    plan = landscape_plan(storage, StoredStudy.open(storage, "small/EMAGrid/0"), LandscapeOptions())
    assert plan == stored_plan(study)
    name, outcome = run_landscape(storage, StoredStudy.open(storage, "small/LCSC/0"))
    assert outcome.startswith("finished already")
    assert losses(StoredStudy.open(storage, name)) == before


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"size": 5}, "size is 3, not 5"),
        ({"margin": 0.5}, "margin is 0.75, not 0.5"),
        ({"corners": (10, 20, 50)}, r"corners is \[10, 30, 50\], not \[10, 20, 50\]"),
        ({"images": 20}, "images is 10, not 20"),
    ],
)
def test_other_options_than_the_stored_ones_are_refused(database: str, options: Any, complaint: str) -> None:
    compute(database)
    with pytest.raises(StudyStoreError, match=f"small/Landscape/0: exists with other options: {complaint}. .*--seed"):
        compute(database, **options)
    assert compute(database, seed=1, **options).name == "small/Landscape/1"


def test_default_corners_are_the_rates_around_the_best_ema(database: str) -> None:
    storage = open_storage(database, write=False)
    rates = window_ema_rates(STEPS)
    values = losses(StoredStudy.open(storage, "small/EMAGrid/0"))
    best = int(np.argmin(np.array(values, dtype=float)))
    found = default_corners_of(storage, "small", tuple(STEPS))
    assert f"ema:{rates[best]!r}" in found
    assert len(set(found)) == 3
    assert set(found) <= {f"ema:{rate!r}" for rate in rates}


@pytest.mark.parametrize(
    ("best", "places"), [(0, (0, 1, 2)), (1, (0, 1, 3)), (3, (1, 3, 5)), (6, (4, 5, 6)), ("last", (0, 1, 2))]
)
def test_default_corners_enclose_the_best_rate_where_they_can(workplace: Path, best: Any, places: Any) -> None:
    rates = [0.9, 0.95, 0.96, 0.97, 0.98, 0.99, 0.995]
    target = [0.0, 0.0, 0.0, 0.0, 1.0] if best == "last" else ema_coefficients(STEPS, rates[best]).tolist()
    (workplace / f"losses_{best}.py").write_text(f"def loss(a):\n    return float(((a - {target}) ** 2).sum())\n")
    function = {"file": "function.py", "settings": {"callable": f"losses_{best}:loss", "steps": STEPS}}
    grid: dict[str, Any] = {"optimizers": [{"EMAGrid": {"rates": rates}}], "budget": {"evaluations": 10}}
    storage = open_storage(write(workplace, objective=function, **grid), write=False)
    expected = tuple(f"ema:{rates[place]!r}" for place in places)
    assert default_corners_of(storage, "small", tuple(STEPS)) == expected


def test_without_an_ema_grid_they_are_the_first_the_middle_and_the_last_checkpoint(workplace: Path) -> None:
    storage = open_storage(write(workplace, optimizers=["LCSC"]), write=False)
    assert default_corners_of(storage, "small", tuple(STEPS)) == (10, 30, 50)
    with pytest.raises(StudySpecError, match="a plane needs three checkpoints, and there are 2; give EMAs"):
        default_corners_of(storage, "small", (10, 20))


def test_images_change_the_objective_of_the_landscape_alone(database: str) -> None:
    study = compute(database, images=40)
    assert {trial.user_attrs["cost"]["images"] for trial in study.trials()} == {40}
    assert study.attributes["fingerprint"]["objective"]["images"] == 40


def test_an_objective_that_does_not_take_images_is_told_so(workplace: Path) -> None:
    (workplace / "losses.py").write_text("def loss(coefficients):\n    return 1.0\n")
    function = {"file": "function.py", "settings": {"callable": "losses:loss", "steps": STEPS}}
    database = write(workplace, objective=function)
    with pytest.raises(StudySpecError, match="images: unknown key"):
        compute(database, images=40)


def test_a_changed_objective_or_environment_is_refused(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTS_VERSION", "2")
    with pytest.raises(StudyStoreError, match=r"small/LCSC/0: .*version"):
        compute(database)
    monkeypatch.delenv("WEIGHTS_VERSION")
    monkeypatch.setattr("lcsc_opt.search.landscape.decisive", lambda known: {"nevergrad": str(id(known))})
    monkeypatch.setattr("lcsc_opt.search.landscape.describe_difference", lambda *_: "nevergrad 1 and not 2")
    with pytest.raises(StudyStoreError, match=r"was begun in another environment.*nevergrad 1 and not 2"):
        compute(database)
    storage = open_storage(database, write=True)
    assert "small/Landscape/0" not in study_names(storage)
    run_landscape(storage, StoredStudy.open(storage, "small/LCSC/0"), LandscapeOptions(size=2), accept_environment=True)
    assert "small/Landscape/0" in study_names(storage)


def test_a_landscape_of_a_landscape_is_refused(database: str) -> None:
    compute(database)
    with pytest.raises(StudyStoreError, match="small/Landscape/0: is a landscape; give a search of small"):
        compute(database, source="small/Landscape/0")


def test_models_that_do_not_sample_are_holes_and_end_nothing(workplace: Path) -> None:
    limited = {"file": "weights.py", "settings": {"reach": 2.9}}
    study = compute(write(workplace, objective=limited, failures={"retries": 0}), size=5, margin=1.5)
    states = [trial.state.name for trial in study.trials()]
    assert states.count("FAIL") > len(states) / 2  # more than an ordinary search allows
    assert states.count("COMPLETE") > 3
    assert study.attributes["search_ended"]["evaluations"] == len(states)


@pytest.mark.parametrize("options", [{"corners": (10, 35, 50)}, {"size": 1}, {"margin": -1.0}])
def test_wrong_options_leave_no_study_behind(database: str, options: Any) -> None:
    storage = open_storage(database, write=True)
    with pytest.raises(LcscError):  # before the objective is loaded, which may take long
        landscape_plan(storage, StoredStudy.open(storage, "small/LCSC/0"), LandscapeOptions(**options))
    with pytest.raises(LcscError):
        compute(database, **options)
    assert study_names(open_storage(database, write=False)) == ["small/EMAGrid/0", "small/LCSC/0"]


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capsys.readouterr()
    assert lcsc([*arguments, "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_command_prints_the_plane(database: str, capsys: pytest.CaptureFixture[str]) -> None:
    made = output(capsys, "landscape", "small/LCSC/0", "--grid", "3", "--corners", "10,30,50", "--margin", "0")
    assert made["study"] == "small/Landscape/0"
    assert (made["evaluated"], made["total"], made["space"], made["metric"]) == (9, 9, "weights", "FID")
    assert made["axis"] == [0.0, 0.5, 1.0]
    by_name = {point["name"]: point for point in made["points"]}
    assert made["values"][0][2] == by_name["step 30"]["loss"]
    assert made["values"][2][0] == by_name["step 50"]["loss"]
    assert min(map(min, made["values"])) == by_name["lowest on the plane"]["loss"]


def test_the_command_draws(database: str, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["landscape", "small/LCSC/0", "--grid", "2", "--plot", "plane.json", "--plot", "plane.html"]
    assert lcsc(command) == 0
    captured = capsys.readouterr()
    assert "lowest on the plane" in captured.out
    assert "drawn: plane.json" in captured.err
    assert json.loads((workplace / "plane.json").read_text())["data"]
    assert (workplace / "plane.html").stat().st_size > 1000


def test_other_commands_are_not_disturbed(database: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = output(capsys, "compare", "small")
    compute(database)
    assert output(capsys, "compare", "small") == before
    assert [row["study"] for row in output(capsys, "list")] == ["small/EMAGrid/0", "small/LCSC/0", "small/Landscape/0"]
    assert output(capsys, "show", "small/Landscape/0")["state"] == "finished"
    assert lcsc(["doctor"]) == 0
    assert lcsc(["resume", "small/Landscape/0"]) == 0
    assert lcsc(["evaluate", "small/Landscape/0", "--images", "10", "--top", "1"]) == 0
    assert output(capsys, "compare", "small") == before


def test_wrong_corners_are_one_line(database: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert lcsc(["landscape", "small/LCSC/0", "--corners", "10,20,last"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert line.startswith("lcsc: corners: expected three training steps or EMAs")


def test_a_figure_that_cannot_be_written_is_said_before_the_plane_is_evaluated(
    database: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lcsc(["landscape", "small/LCSC/0", "--seed", "7", "--plot", "plane.gif"]) == 2
    assert "plane.gif: expected a file that ends in .png" in capsys.readouterr().err
    assert "small/Landscape/7" not in [row["study"] for row in output(capsys, "list")]


def test_an_interrupted_landscape_continues_to_the_same_values(workplace: Path) -> None:
    database = write(workplace, objective={"file": "weights.py", "settings": {"images": 10}}, optimizers=["EMAGrid"])
    arguments = ["landscape", "small/EMAGrid/0", "--grid", "6", "--corners", "10,30,50"]
    ended = lcsc_process(*arguments, environment={"INTERRUPTED_AT": "7"})
    assert ended.status == 130, ended.err
    done = finished(database)
    assert done in (6, 7)  # the seventh may have been told before the signal was looked at
    kept = losses(StoredStudy.open(open_storage(database, write=False), "small/Landscape/0"))[:done]
    assert lcsc(arguments) == 0
    study = StoredStudy.open(open_storage(database, write=False), "small/Landscape/0")
    whole = losses(study)
    assert whole[:done] == kept
    fresh = compute(database, "small/EMAGrid/0", seed=1, size=6)
    assert whole == losses(fresh)
    assert [t.user_attrs["coefficients"] for t in study.trials()] == [
        t.user_attrs["coefficients"] for t in fresh.trials()
    ]


def finished(database: str) -> int:
    try:
        study = StoredStudy.open(open_storage(database, write=False), "small/Landscape/0")
    except StudyStoreError:
        return 0
    return sum(trial.state.is_finished() for trial in study.trials())
