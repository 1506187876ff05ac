"""What is read of trainings that may be running, half-written or broken."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from lcsc_opt.views import trainings
from lcsc_opt.views.trainings import TrainingHistory
from tests.study_examples import PNG


def write_training(
    folder: Path, name: str = "run", *, lines: int = 4, sheets: tuple[int, ...] = (10, 20), seconds: float = 1.0
) -> Path:
    """As ``lcsc train`` leaves it so far, with a line of the curve every ten steps."""
    place = folder / name
    (folder / f"{name}.model").mkdir(parents=True)
    described = {"recipe": "ict", "data": "digits", "steps": 40, "seed": 0}
    (folder / f"{name}.model" / "training.json").write_text(json.dumps(described))
    curve = [{"step": 10 * (i + 1), "loss": 4.0 / (i + 1), "seconds": (i + 1) * seconds} for i in range(lines)]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in curve))
    (folder / f"{name}.samples").mkdir()
    for step in sheets:
        (folder / f"{name}.samples" / f"step{step:08d}.png").write_bytes(PNG)
    return place


def read(place: Path) -> TrainingHistory:
    return TrainingHistory.find(place.parent)[place.name]


def test_trainings_are_found_in_a_folder_and_in_those_in_it(tmp_path: Path) -> None:
    places = [write_training(tmp_path, "b"), write_training(tmp_path / "more", "a")]
    write_training(tmp_path / "more" / "deeper", "c")
    for age, place in enumerate(reversed(places)):
        os.utime(place.with_name(f"{place.name}.jsonl"), (1000 - age, 1000 - age))
    (tmp_path / "notes.jsonl").write_text("{}\n")  # of something else
    found = [(name, training.place) for name, training in TrainingHistory.find(tmp_path).items()]
    assert found == [("b", places[0]), ("more/a", places[1])]


def test_a_headline_says_where_a_training_is(tmp_path: Path) -> None:
    long_ago = time.time() - 2 * trainings.ALIVE_SECONDS
    write_training(tmp_path, "stopped", lines=2)
    os.utime(tmp_path / "stopped.jsonl", (long_ago, long_ago))
    for name, lines in (("running", 2), ("finished", 4), ("new", 0)):
        write_training(tmp_path, name, lines=lines)
    found = TrainingHistory.find(tmp_path)
    assert {name: (one.running, one.headline.partition("digits, ")[2]) for name, one in found.items()} == {
        "stopped": (False, "step 20 of 40, loss 2: stopped; --resume continues it"),
        "running": (True, "step 20 of 40, loss 2, 10 steps a second, 2 s left"),
        "finished": (False, "step 40 of 40, loss 1: finished, 10 steps a second"),
        "new": (True, "40 steps; no checkpoint yet"),
    }


@pytest.mark.parametrize(("age", "runs"), [(800, True), (1000, False)])
def test_a_training_whose_checkpoints_are_rare_runs_between_two(tmp_path: Path, age: int, *, runs: bool) -> None:
    place = write_training(tmp_path, lines=2, seconds=300.0)
    os.utime(tmp_path / "run.jsonl", (time.time() - age, time.time() - age))
    assert read(place).running == runs


def test_lines_that_are_not_whole_and_losses_that_are_none_are_left_out(tmp_path: Path) -> None:
    place = write_training(tmp_path, lines=1)
    more = ['{"step": 20, "loss": NaN, "seconds": 2}', "[1]", '{"step": 1e999, "loss": 1, "seconds": 2}', '{"step": 30']
    with (tmp_path / "run.jsonl").open("a") as file:
        file.write("\n".join(more))
    assert [line.step for line in read(place).lines] == [10]
    figure = read(place).figure("dark")
    assert (list(figure.data[0].x), list(figure.data[0].y), figure.layout.yaxis.type) == ([10], [4.0], "log")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"recipe": "ict"}', '{"recipe": 1, "data": 2, "steps": "many"}'])
def test_what_describes_no_training_is_none(tmp_path: Path, text: str) -> None:
    write_training(tmp_path)
    (tmp_path / "run.model" / "training.json").write_text(text)
    assert TrainingHistory.find(tmp_path) == {}


def test_only_samples_are_read(tmp_path: Path) -> None:
    place = write_training(tmp_path)
    sheets = tmp_path / "run.samples"
    (tmp_path / "secret.png").write_bytes(PNG)
    (sheets / "step00000030.png").symlink_to(tmp_path / "secret.png")
    (sheets / "step00000040.png").write_bytes(b"<script>")
    (sheets / "other.png").write_bytes(PNG)
    assert read(place).sheets == (10, 20, 30, 40)
    assert [read(place).sheet(step) for step in (10, 30, 40, 50)] == [PNG, None, None, None]
