from __future__ import annotations

from typing import Any

import pytest
import torch

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.records import HELD_OUT, SEARCH, Noise
from lcsc_opt.sampling import ClassLabels, ImageNoise

NOISE = ImageNoise(0)


def test_balanced_labels_take_turns() -> None:
    labels = ClassLabels(3, "balanced", noise=NOISE)
    assert labels.batch(SEARCH, 2, 9).tolist() == [2, 0, 1, 2, 0, 1, 2]


def test_random_labels_belong_to_an_image_a_group_and_a_seed() -> None:
    labels = ClassLabels(10, "random", noise=NOISE)
    drawn = labels.batch(SEARCH, 0, 500)
    assert torch.equal(torch.cat([labels.batch(SEARCH, 0, 7), labels.batch(SEARCH, 7, 500)]), drawn)
    assert torch.equal(ClassLabels(10, "random", noise=ImageNoise(0)).batch(SEARCH, 0, 500), drawn)
    others = [labels.batch(HELD_OUT, 0, 500), labels.batch(Noise("search", 1), 0, 500)]
    others.append(ClassLabels(10, "random", noise=ImageNoise(1)).batch(SEARCH, 0, 500))
    assert all(0.02 < float((other == drawn).float().mean()) < 0.2 for other in others)
    counts = torch.bincount(drawn, minlength=10)
    assert counts.min() > 25
    assert counts.max() < 80


@pytest.mark.parametrize("label", [-1, 10])
def test_a_label_that_is_no_class_is_refused(label: int) -> None:
    with pytest.raises(ObjectiveError, match=f"classes 0 to 9, got {label}"):
        ClassLabels(10, label, noise=NOISE)


def test_the_null_class_at_the_end_is_not_sampled() -> None:
    for null_label, classes in ((10, 10), (0, 11), (1000, 11)):
        labels = ClassLabels.choose("balanced", classes=11, noise=NOISE, guidance=(2.0, null_label))
        assert labels is not None
        assert labels.classes == classes


@pytest.mark.parametrize(
    ("labels", "guidance", "classes", "message"),
    [
        ("balanced", None, None, "labels: the model has no classes"),
        (None, (2.0, 0), None, "guidance: the model has no classes"),
        (None, None, 10, "labels: the model has 10 classes; give balanced, random, or one of them"),
        (10, (2.0, 10), 11, "classes 0 to 9, got 10"),
    ],
)
def test_labels_that_do_not_suit_the_model_are_refused(labels: Any, guidance: Any, classes: Any, message: str) -> None:
    with pytest.raises(ObjectiveError, match=message):
        ClassLabels.choose(labels, classes=classes, noise=NOISE, guidance=guidance)
