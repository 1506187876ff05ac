"""The layout of the network is chosen once, before the first trial, and stored with the experiment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from lcsc_opt.base.records import CHANNELS_LAST, CONTIGUOUS
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import our_studies
from lcsc_opt.experiment import rehearsal
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
    layouts = (CONTIGUOUS, CHANNELS_LAST)
    samples = Samples(per_evaluation=100)

    def evaluate(self, candidate):
        with open("layouts.txt", "a") as file:
            file.write(f"{candidate.rehearsal} {candidate.noise.group} {candidate.layout}\\n")
        seconds = float(Path(candidate.layout.replace(" ", "_")).read_text())
        loss = float(np.square(candidate.coefficients - 1 / 3).sum()) + 1
        return Evaluation(loss, cost=Cost(images=100, seconds=seconds))

    def describe(self):
        return {"laid": 1}

def build(settings):
    return Laid()
"""


@pytest.fixture(autouse=True)
def folder(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(rehearsal, "SECONDS_TO_SHORTEN", 0.0)
    (workplace / "laid.py").write_text(OBJECTIVE)
    study: Mapping[str, Any] = {
        "name": "laid",
        "objective": {"file": "laid.py"},
        "optimizers": ["EMAGrid", "CMA"],
        "budget": {"evaluations": 3},
        "held_out": {"images": 100, "top": 1},
    }
    (workplace / "laid.yaml").write_text(yaml.safe_dump(dict(study)))
    write_seconds(workplace, contiguous=1.0, channels_last=0.5)
    return workplace


def write_seconds(folder: Path, *, contiguous: float, channels_last: float) -> None:
    (folder / "contiguous").write_text(str(contiguous))
    (folder / "channels_last").write_text(str(channels_last))


def layouts_of_trials(folder: Path) -> set[str]:
    """The layouts of all evaluations since the last call, but for rehearsals."""
    lines = (folder / "layouts.txt").read_text().splitlines()
    (folder / "layouts.txt").unlink()
    return {line.split(maxsplit=2)[2] for line in lines if line.startswith("False")}


def stored_layouts(folder: Path) -> dict[str, Any]:
    studies = our_studies(open_storage(f"sqlite:///{folder}/studies.db", write=False))
    return {name: attributes["layout"] for name, attributes in studies.items()}


def test_a_dry_run_says_which_layout_is_the_faster_one_and_trials_and_reports_have_it(
    folder: Path, typed: Typed
) -> None:
    said = typed("run", "laid.yaml", "--dry-run").err
    line = "laid: the network's weights are stored channels last: sampling takes 0.50 times as long"
    assert said.count(line) == 1
    assert not (folder / "studies.db").exists()
    (folder / "layouts.txt").unlink()
    typed("run", "laid.yaml")
    assert stored_layouts(folder) == {"laid/EMAGrid/0": CHANNELS_LAST, "laid/CMA/0": CHANNELS_LAST}
    assert layouts_of_trials(folder) == {CHANNELS_LAST}


@pytest.mark.parametrize("workers", [1, 2])
def test_continued_studies_and_later_ones_of_the_experiment_keep_it_wherever_they_run(
    folder: Path, typed: Typed, workers: int
) -> None:
    typed("run", "laid.yaml", "--optimizer", "CMA")
    layouts_of_trials(folder)
    write_seconds(folder, contiguous=0.1, channels_last=1.0)  # as on another machine
    said = typed("run", "laid.yaml", f"workers={workers}", "--budget", "6").err
    assert "stored channels last" not in said
    assert stored_layouts(folder) == {"laid/CMA/0": CHANNELS_LAST, "laid/EMAGrid/0": CHANNELS_LAST}
    assert layouts_of_trials(folder) == {CHANNELS_LAST}


def test_short_trials_are_not_timed_and_their_study_stays_contiguous(
    folder: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "SECONDS_TO_SHORTEN", np.inf)
    typed("run", "laid.yaml", "--optimizer", "CMA")
    assert stored_layouts(folder) == {"laid/CMA/0": CONTIGUOUS}
    assert layouts_of_trials(folder) == {CONTIGUOUS}
    monkeypatch.setattr(rehearsal, "SECONDS_TO_SHORTEN", 0.0)
    typed("run", "laid.yaml", "--optimizer", "CMA", "--budget", "6")
    assert layouts_of_trials(folder) == {CONTIGUOUS}
