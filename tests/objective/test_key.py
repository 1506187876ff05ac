"""What evaluations are of: everything that was read, by its content, and how two keys differ."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from lcsc_opt.base.digests import Digests
from lcsc_opt.base.paths import BuildContext
from lcsc_opt.base.study_spec import ObjectiveSpec
from lcsc_opt.objective.key import Input, Key, agree, differences
from lcsc_opt.objective.loading import load_objective

OWN = """
import lcsc_opt

class Own(lcsc_opt.Objective):
    steps = (1, 2, 3)
    def __init__(self, target, words):
        self.target, self.words = target, words
    def evaluate(self, candidate):
        return lcsc_opt.Evaluation(loss=abs(float(candidate.coefficients[0]) - self.target))
    def describe(self):
        return self.words

def build(settings, context):
    return Own(float(context.path(settings["reference"]).read_text()), settings.get("words", {}))
"""
WORDS = ({}, {"scores": ["l1"]}, {"maximize": True}, {"also": {"steps": 3}}, {"trajectory": "x", "sampler": {"a": 1}})


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_objective.py").write_text(OWN)
    (tmp_path / "near.txt").write_text("0.5")
    (tmp_path / "far.txt").write_text("900")
    return tmp_path


def key(folder: Path, **settings: Any) -> Key:
    spec = ObjectiveSpec(file="own_objective.py", settings={"reference": "near.txt", **settings})
    return load_objective(spec, BuildContext(folder, files=folder / "files")).key


@pytest.mark.parametrize("words", WORDS)
def test_no_word_of_a_free_description_switches_a_comparison_off(own: Path, words: dict[str, Any]) -> None:
    begun = key(own, words=words)
    assert begun.decides["maximizes"] is False
    now = key(own, words=words, reference="far.txt")
    [line] = differences(begun.decides, now.decides, begun.inputs, now.inputs)
    assert line == "settings.reference: near.txt (3 B), now far.txt (3 B)"


def test_numbers_compare_where_all_but_the_checkpoints_was_measured_with_the_same() -> None:
    def key_of(**digests: str) -> Key:
        inputs = {name.replace("_", " "): Input(digest, "a text") for name, digest in digests.items()}
        decides = {name: one.digest for name, one in inputs.items()} | {"settings.loss": digests["the_checkpoints"]}
        return Key(decides, {"code mine": "c"}, inputs=inputs)

    one = key_of(the_checkpoints="a", the_real_images="r")
    assert key_of(the_checkpoints="b", the_real_images="r").measures_as(one), "another loss, other checkpoints"
    assert not key_of(the_checkpoints="a", the_real_images="others").measures_as(one)
    assert not Key(one.decides, {"code mine": "changed"}, inputs=one.inputs).measures_as(one)


@pytest.mark.parametrize("name", ["also", "metrics", "held_out", "batch_size"])
def test_a_setting_of_a_users_own_objective_decides_whatever_its_name_is(own: Path, name: str) -> None:
    changed = differences(key(own, **{name: 1}).decides, key(own, **{name: 2}).decides)
    assert changed == [f"settings.{name} was 1, is now 2"]


def test_the_same_bytes_are_the_same_input_and_other_bytes_under_a_name_are_not(own: Path) -> None:
    begun = key(own)
    os.utime(own / "near.txt", (1, 1))
    (own / "copied.txt").write_text("0.5")
    assert key(own).decides == key(own, reference="copied.txt").decides == begun.decides
    (own / "near.txt").write_text("0.7")
    [line] = differences(begun.decides, key(own).decides, begun.inputs, key(own).inputs)
    assert line == "settings.reference: near.txt (3 B), now with other content"


def test_a_file_is_read_once_for_its_path_size_and_time(own: Path) -> None:
    reads: list[Path] = []

    def read(path: Path) -> str:
        reads.append(path)
        return path.read_text()

    for _ in range(2):
        assert Digests(own / "files").of(own / "near.txt", read) == "0.5"
    os.utime(own / "near.txt", (1, 1))
    assert Digests(own / "files").of(own / "near.txt", read) == "0.5"
    (own / "files" / "digests.json").write_text("damaged")
    assert Digests(own / "files").of(own / "near.txt", read) == "0.5"
    assert len(reads) == 3


def test_keys_differ_in_words() -> None:
    before = {"code my.py": "a", "code gone.py": "b", "settings.images": 200, "the held-out images": "1"}
    now = {"code my.py": "c", "code new.py": "d", "settings.images": 300, "the held-out images": "2"}
    was, is_now = ({"the held-out images": Input("", f"{count} images of test")} for count in (150, 670))
    assert differences(before, now, was, is_now) == [
        "the held-out images: 150 images of test, now 670 images of test",
        "settings.images was 200, is now 300",
        "my.py changed",
        "new.py new",
        "gone.py gone",
    ]
    assert differences(before, before) == []


def test_a_value_that_becomes_a_mapping_is_one_difference() -> None:
    one, other = {"keep": "reward", "keeper": 1}, {"keep.reward": 0.82, "keeper": 2}
    said = ['keep was "reward", is now {"reward": 0.82}', "keeper was 1, is now 2"]
    assert differences(one, other) == said
    assert differences(other, one)[0] == 'keep was {"reward": 0.82}, is now "reward"'
    assert differences({"code a": 1, "code a.b": 1}, {"code a": 2, "code a.b": 2}) == ["a, a.b changed"]


def test_a_further_metric_makes_nothing_else_another_measurement() -> None:
    alone = {"search": "a", "reports.extractors.inception": "b"}
    assert agree(alone, {**alone, "reports.extractors.clip": "c"})
    assert not agree(alone, {**alone, "reports.extractors.inception": "c"})
    assert not agree(alone, {**alone, "search": "b"})
