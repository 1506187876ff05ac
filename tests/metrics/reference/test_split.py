"""Real images that the loss does not see: named, or a part of a folder by the hash of each file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lcsc_opt.base.errors import MetricError, StudySpecError
from lcsc_opt.metrics import Reference
from lcsc_opt.metrics.reference import building
from lcsc_opt.metrics.reference.building import ImageSets, ReferenceSettings
from lcsc_opt.metrics.reference.images import ImageSet
from lcsc_opt.metrics.reference.reference import FEWEST_UNSEEN
from tests.metrics.examples import Pixels, pixels, write_folder

pytestmark = pytest.mark.usefixtures("few_unseen")


class SplitPixels(Pixels):
    dimension = 12


def write(path: Path, count: int = 60, seed: int = 0) -> Path:
    folder: Path = write_folder(path, pixels(count, seed=seed))
    return folder


def build(setting: Any, place: Path, cache: str = "cache", **changes: Any) -> Reference:
    sets = ImageSets(place / cache)
    wanted: dict[str, Any] = {"features": True, "held_out": True, "batch_size": 7, "sets": sets, **changes}
    return ReferenceSettings.parse(setting).build("inception", SplitPixels(), **wanted)


def rows(reference: Reference | None) -> set[bytes]:
    assert reference is not None
    return {row.tobytes() for row in reference.known_features}


def unseen_rows(reference: Reference) -> set[bytes]:
    """Of the images that no loss sees, each of which is in one of two parts."""
    chosen_by, reported = rows(reference.selection), rows(reference.held_out)
    assert not chosen_by & reported
    return chosen_by | reported


def test_two_folders(tmp_path: Path) -> None:
    train, other = write(tmp_path / "a"), write(tmp_path / "b", 20, seed=1)
    found = build({"train": str(train), "held_out": str(other)}, tmp_path)
    alone = build(str(train), tmp_path)
    assert found.identity == alone.identity, "what the loss sees is the same"
    assert alone.held_out is None
    assert (len(found.known_features), len(unseen_rows(found))) == (60, 20)
    assert not rows(found) & unseen_rows(found)
    assert build({"train": str(train), "held_out": str(other)}, tmp_path, held_out=False).held_out is None


def test_held_out_images_that_the_loss_sees_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A copy of the folder, one with further images, and one with a few of them."""
    train = write(tmp_path / "a")
    shutil.copytree(train, tmp_path / "copy")
    with pytest.raises(MetricError, match="train has all images of held_out"):
        build({"train": str(train), "held_out": str(tmp_path / "copy")}, tmp_path)
    write(tmp_path / "more", 20, seed=1)
    for number, path in enumerate(sorted(train.iterdir())[:15]):
        shutil.copy(path, tmp_path / "more" / f"of_a_{number}.png")
    found = build({"train": str(train), "held_out": str(tmp_path / "more")}, tmp_path)
    assert (len(unseen_rows(found)), unseen_rows(found) & rows(found)) == (20, set())
    assert "15 of the 35 images of" in capsys.readouterr().err


def test_a_fraction_is_chosen_by_content_wherever_the_files_lie(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    setting = {"train": str(folder), "held_out_fraction": 0.3}
    found = build(setting, tmp_path)
    assert rows(found) | unseen_rows(found) == rows(build(str(folder), tmp_path))
    assert not rows(found) & unseen_rows(found)
    assert 6 <= len(unseen_rows(found)) <= 30
    for i, path in enumerate(sorted(folder.iterdir(), reverse=True)):  # another order, other names
        path.rename(folder / f"renamed{i:03}.png")
    again = build(setting, tmp_path, cache="another")
    assert (rows(again.held_out), rows(again.selection)) == (rows(found.held_out), rows(found.selection))
    assert build({**setting, "held_out_fraction": 0.5}, tmp_path).identity != found.identity


def test_many_images_are_divided_and_that_is_said_as_is_that_few_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "LARGE_ENOUGH", 60)
    large, small = write(tmp_path / "a", 60), write(tmp_path / "b", 59)
    assert build(str(small), tmp_path).held_out is None
    assert f"none of the images of {small} is held out" in capsys.readouterr().err
    array = tmp_path / "array.npz"
    np.savez(array, arr_0=pixels(70, seed=0))
    assert build(str(array), tmp_path).held_out is None
    assert f"none of the images of {array} is held out" in capsys.readouterr().err
    for quiet in ({"held_out_fraction": 0}, {"held_out": str(small)}):
        build({"train": str(array), **quiet}, tmp_path)
        assert "is held out" not in capsys.readouterr().err
    found = build(str(large), tmp_path)
    assert "held_out_fraction: 0} uses all of them" in capsys.readouterr().err
    asked = build({"train": str(large), "held_out_fraction": 0.2}, tmp_path)
    assert (rows(found), unseen_rows(found)) == (rows(asked), unseen_rows(asked))
    whole = build({"train": str(large), "held_out_fraction": 0}, tmp_path)
    assert (len(whole.known_features), whole.held_out) == (60, None)


def test_what_cannot_be_held_out(tmp_path: Path) -> None:
    with pytest.raises(StudySpecError, match="exclude each other"):
        ReferenceSettings.parse({"train": str(tmp_path), "held_out": "a", "held_out_fraction": 0.2})
    with pytest.raises(MetricError, match="missing"):
        ReferenceSettings.parse({"train": str(tmp_path), "held_out": str(tmp_path / "missing")}).check()
    images = write(tmp_path / "images", 20)
    for fraction in (1e-6, 0.999):
        with pytest.raises(MetricError, match="needs at least 2 images, and there are 0 for the loss, or held out"):
            build({"train": str(images), "held_out_fraction": fraction}, tmp_path)
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(12), sigma=np.eye(12))
    with pytest.raises(MetricError, match=r"not a folder, \.zip or data set"):
        build({"train": str(tmp_path / "statistics.npz"), "held_out_fraction": 0.2}, tmp_path)


def test_a_part_of_a_part_holds_images_of_that_part() -> None:
    images = ImageSet.of_array(np.random.default_rng(0).integers(0, 256, (400, 2, 2, 1), dtype=np.uint8), source="a")
    train = images.part(0.2, held_out=False)
    half = train.part(0.5, held_out=True)
    whole = {image.numpy().tobytes() for image in torch.cat(list(train.batches(50)))}
    part = {image.numpy().tobytes() for image in torch.cat(list(half.batches(50)))}
    assert part < whole
    assert 100 < len(part) < 220


def test_a_few_unseen_images_are_all_for_reports(tmp_path: Path) -> None:
    train, other = write(tmp_path / "a"), write(tmp_path / "b", 6, seed=1)
    found = build({"train": str(train), "held_out": str(other)}, tmp_path)
    assert (found.selection, len(found.unseen.known_features)) == (None, 6)


@pytest.mark.parametrize(("count", "is_divided"), [(2 * FEWEST_UNSEEN - 1, False), (2 * FEWEST_UNSEEN, True)])
def test_too_few_held_out_images_choose_nothing(
    count: int, is_divided: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 27 of 150 held out, thirteen images decided, and a distance to fourteen called a better answer worse."""
    monkeypatch.setattr("lcsc_opt.metrics.reference.reference.FEWEST_UNSEEN", FEWEST_UNSEEN)
    seen = build(str(write(tmp_path / "a")), tmp_path)
    divided = seen.with_unseen(Reference.of_features(SplitPixels(), np.zeros((count, 12), np.float32)))
    assert (divided.selection is not None) == is_divided
    assert divided.held_out is not None
    assert len(divided.held_out.known_features) == (count // 2 if is_divided else count)
