"""The layout of the network is chosen once, before the first trial, and stored with the experiment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from lcsc_opt.base.records import CHANNELS_LAST, CONTIGUOUS
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import read_contents
from tests.commands import Typed

OBJECTIVE = """
import dataclasses
from pathlib import Path
import numpy as np
from lcsc_opt import Evaluation, Objective
from lcsc_opt.base.records import CHANNELS_LAST, CONTIGUOUS, Cost
from lcsc_opt.objective.contract import Samples

class Laid(Objective):
    steps = (1, 2, 3)
    samples = Samples(per_evaluation=100)

    def evaluate(self, candidate):
        with open("layouts.txt", "a") as file:
            file.write(f"{candidate.rehearsal} {candidate.noise.group} {self.layout}\\n")
        loss = float(np.square(candidate.coefficients - 1 / 3).sum()) + 1
        return Evaluation(loss, cost=Cost(images=100))

    def fastest_layout(self, *, gradient):
        assert not gradient
        return Path("fastest").read_text()

    def describe(self):
        return {"laid": 1}

def build(settings):
    return Laid()
"""


@pytest.fixture(autouse=True)
def folder(workplace: Path) -> Path:
    (workplace / "laid.py").write_text(OBJECTIVE)
    study: Mapping[str, Any] = {
        "name": "laid",
        "objective": {"file": "laid.py"},
        "optimizers": ["EMAGrid", "CMA"],
        "budget": {"evaluations": 3},
        "held_out": {"images": 100, "top": 1},
    }
    (workplace / "laid.yaml").write_text(yaml.safe_dump(dict(study)))
    (workplace / "fastest").write_text(CHANNELS_LAST)
    return workplace


def layouts_of_trials(folder: Path) -> set[str]:
    """The layouts of all evaluations since the last call, but for rehearsals."""
    lines = (folder / "layouts.txt").read_text().splitlines()
    (folder / "layouts.txt").unlink()
    return {line.split(maxsplit=2)[2] for line in lines if line.startswith("False")}


def stored_layouts(folder: Path) -> dict[str, Any]:
    contents = read_contents(open_storage(f"sqlite:///{folder}/studies.db", write=False))
    return {name: contents.experiment("laid")["machine"]["layout"] for name in contents.studies}


def test_continued_studies_and_later_ones_of_the_experiment_keep_it_wherever_they_run(
    folder: Path, typed: Typed
) -> None:
    typed("run", "laid.yaml", "--optimizer", "CMA")
    assert layouts_of_trials(folder) == {CHANNELS_LAST}
    (folder / "fastest").write_text(CONTIGUOUS)  # as on another machine
    typed("run", "laid.yaml", "--budget", "5")
    assert stored_layouts(folder) == {"laid/CMA/0": CHANNELS_LAST, "laid/EMAGrid/0": CHANNELS_LAST}
    assert layouts_of_trials(folder) == {CHANNELS_LAST}
    typed("run", "laid.yaml", "--optimizer", "CMA", "workers=2", "--budget", "6")
    assert layouts_of_trials(folder) == {CHANNELS_LAST}


def test_a_sampler_that_fails_while_it_is_timed_is_left_to_the_rehearsal(folder: Path, typed: Typed) -> None:
    (folder / "fastest").unlink()
    typed("run", "laid.yaml", "--optimizer", "CMA")
    assert layouts_of_trials(folder) == {CONTIGUOUS}
