"""A landscape: a grid over a plane, as any other grid of its experiment."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import lcsc_opt
from lcsc_opt.base.errors import LcscError
from lcsc_opt.cli import run as lcsc
from lcsc_opt.coefficients.plane import Plane, plane_grid
from lcsc_opt.database.arrays import coefficients_of
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import StoredStudy, read_contents
from tests.commands import Typed
from tests.dashboard_site import Site

STEPS = [10, 20, 30, 40, 50]
CORNERS = (10, 30, 50)

OBJECTIVE = '''
import os

import numpy as np

from lcsc_opt.objective.contract import Objective, Samples
from lcsc_opt.base.records import Cost, Evaluation

THETA = np.cumsum(np.random.default_rng(0).normal(size=(5, 7)), axis=0)


class Weights(Objective):
    """How far merged weights are from a target; models far from the checkpoints cannot be evaluated."""

    steps = (10, 20, 30, 40, 50)

    def __init__(self, images, reach):
        self._images, self._reach = images, reach
        self.samples = Samples(per_evaluation=images)

    def evaluate(self, candidate):
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
    "budget": {"evaluations": 3},
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


def write(folder: Path, **changes: Any) -> str:
    (folder / "weights.py").write_text(OBJECTIVE)
    (folder / "small.yaml").write_text(yaml.safe_dump({**STUDY, **changes}))
    assert lcsc(["run", "small.yaml"]) == 0
    return "sqlite:///studies.db"


def compute(database: str, **options: Any) -> StoredStudy:
    study: dict[str, Any] = yaml.safe_load(Path("small.yaml").read_text())
    study |= {"optimizers": [{"Landscape": {"corners": list(CORNERS), "size": 3, **options}}]}
    study |= {"budget": {"evaluations": 121}, "failures": {"retries": 0, "in_a_row": None}}
    [landscape] = lcsc_opt.run(study)
    return StoredStudy.open(open_storage(database, write=True), landscape.name)


def test_a_landscape_is_a_study_whose_trials_are_the_points_of_the_plane(database: str) -> None:
    study = compute(database)
    plane = Plane.through(CORNERS, STEPS)
    expected = [plane.at(x, y) for x, y in plane_grid(3)[1]]
    assert study.name == "small/Landscape/0"
    np.testing.assert_allclose([coefficients_of(t) for t in study.trials()], expected, rtol=0, atol=1e-14)
    ended = study.attributes["search_ended"]
    assert (ended["evaluations"], ended["exhausted"]) == (9, True)


def test_models_that_do_not_sample_are_holes_and_end_nothing(workplace: Path) -> None:
    limited = {"file": "weights.py", "settings": {"images": 10, "reach": 1.6}}
    study = compute(write(workplace, objective=limited, failures={"retries": 0}), size=5)
    states = [trial.state.name for trial in study.trials()]
    assert 3 < states.count("COMPLETE") < len(states) / 2  # more failures than an ordinary search allows
    assert study.attributes["search_ended"]["evaluations"] == len(states)


@pytest.mark.parametrize("options", [{"corners": [10, 35, 50]}, {"size": 1}])
def test_wrong_options_leave_no_study_behind(database: str, options: Any) -> None:
    with pytest.raises(LcscError):
        compute(database, **options)
    assert list(read_contents(open_storage(database, write=False)).studies) == ["small/EMAGrid/0", "small/LCSC/0"]


def test_its_best_point_is_reported_and_drawn_as_any_search_is(database: str, typed: Typed) -> None:
    compute(database)
    assert "Landscape" in {row["optimizer"] for row in typed.json("compare", "small")}
    site = Site(database)
    for page in ("compare", "study", "images", "landscape"):
        assert "problem" not in site.get(f"/lcsc/{page}/")
    drawn = site.call("landscape", "plane-new.data", landscape="small/Landscape/0", theme="light")
    assert "9 points" in drawn["headline"]["children"]
