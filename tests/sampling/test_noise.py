"""Noise and class of an image are its own: properties, and numpy's Philox as the reference."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.records import HELD_OUT, SEARCH, SELECTION, Noise
from lcsc_opt.base.reproducibility import derive_seed
from lcsc_opt.sampling import ClassLabels, ImageNoise

SHAPE = (2, 3, 3)


def drawn(noise: Noise = SEARCH, start: int = 0, stop: int = 100, *, seed: int = 0, draw: int = 0) -> torch.Tensor:
    return ImageNoise(seed, SHAPE).batch(noise, start, stop, draw=draw)


@given(st.integers(0, 60), st.lists(st.integers(0, 20), min_size=1, max_size=6), st.randoms())
def test_noise_depends_neither_on_batches_nor_on_their_order(start: int, sizes: list[int], random: object) -> None:
    ends = np.cumsum([start, *sizes]).tolist()
    batches = list(itertools.pairwise(ends))
    random.shuffle(batches)  # type: ignore[attr-defined]
    noise = ImageNoise(0, SHAPE)
    parts = {first: noise.batch(SEARCH, first, last) for first, last in batches if first < last}
    whole = drawn(start=start, stop=ends[-1])
    assert torch.equal(torch.cat([torch.empty(0, *SHAPE), *(parts[first] for first in sorted(parts))]), whole)


def correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(np.corrcoef(one.flatten().numpy(), other.flatten().numpy())[0, 1])


@pytest.mark.parametrize(
    "other",
    [
        drawn(SELECTION, stop=500),
        drawn(HELD_OUT, stop=500),
        drawn(Noise("search", 1), stop=500),
        drawn(seed=1, stop=500),
        drawn(draw=1, stop=500),
        drawn(start=500, stop=1000),
        drawn(start=1, stop=501),
    ],
    ids=["selection", "held-out", "another seed of the group", "another study", "another draw", "later", "next"],
)
def test_other_noise_shares_no_number(other: torch.Tensor) -> None:
    noise = drawn(stop=500)
    assert abs(correlation(noise, other)) < 5 / noise.numel() ** 0.5
    assert not (noise == other).any()


def test_image_i_is_a_philox_stream_whose_counter_starts_at_i() -> None:
    """In every process, as the seed is that everywhere (``tests/base/test_seeds.py``)."""
    key = derive_seed(7, "noise", "held-out", 2, 1, bits=128)
    words = np.array([0, 0, 0, 12_345], dtype=np.uint64)  # the counter's highest word is the image
    reference = np.random.Generator(np.random.Philox(key=key, counter=words)).standard_normal(SHAPE, dtype=np.float32)
    noise = drawn(Noise("held-out", 2), 12_345, 12_346, seed=7, draw=1)
    assert noise[0].numpy().tobytes() == reference.tobytes()


IMAGE_BYTES = 4 * 2 * 3 * 3


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(0, 12))
def test_what_is_kept_never_exceeds_its_bound(sizes: list[int], bound: int) -> None:
    noise = ImageNoise(0, SHAPE)
    noise.cache_bytes = bound * IMAGE_BYTES
    for start, size in enumerate(sizes):
        assert torch.equal(noise.batch(SEARCH, start, start + size), drawn(start=start, stop=start + size))
        assert noise.cached_bytes <= bound * IMAGE_BYTES


def step_noise(noise: Noise = SEARCH, start: int = 0, stop: int = 20, *, seed: int = 0) -> torch.Tensor:
    return torch.stack([torch.randn(9, generator=g) for g in ImageNoise(seed, SHAPE).generators(noise, start, stop)])


def test_generators_for_steps_belong_to_an_image_a_group_and_a_seed() -> None:
    first = step_noise()
    assert torch.equal(torch.cat([step_noise(stop=7), step_noise(start=7)]), first)
    others = [step_noise(HELD_OUT), step_noise(Noise("search", 1)), step_noise(seed=1), step_noise(start=20, stop=40)]
    numbers = torch.cat([first, *others]).flatten()
    assert len(numbers.unique()) == len(numbers)


# classes


def classes(count: int, labels: Any, noise: Noise = SEARCH, start: int = 0, stop: int = 500, *, seed: int = 0) -> Any:
    return ImageNoise(seed, SHAPE, ClassLabels(count, labels)).classes(noise, start, stop)


@pytest.mark.parametrize("noise", [SEARCH, HELD_OUT, Noise("gradient", 2**31 + 7)])
def test_balanced_labels_take_turns_whatever_part_is_asked_for(noise: Noise) -> None:
    drawn = classes(7, "balanced", noise, stop=21)
    assert torch.bincount(drawn, minlength=7).tolist() == [3] * 7
    assert torch.equal(drawn[1:], (drawn[:-1] + 1) % 7)
    parts = [classes(7, "balanced", noise, start, start + 3) for start in range(0, 21, 3)]
    assert torch.equal(torch.cat(parts), drawn)


@pytest.mark.parametrize("first_seed", [0, 1_234_567_890])
@pytest.mark.parametrize("group", ["gradient", "selection"])
@pytest.mark.parametrize(("count", "images"), [(300, 100), (1000, 50), (7, 2)])
def test_each_class_has_its_share_of_few_images_on_fresh_noise(
    count: int, images: int, group: str, first_seed: int
) -> None:
    share = 6
    noises = [Noise(group, first_seed + step) for step in range(share * count // images)]
    drawn = torch.cat([classes(count, "balanced", noise, stop=images) for noise in noises])
    counts = torch.bincount(drawn, minlength=count)
    assert counts.min() >= share - 2
    assert counts.max() <= share + 2


def test_balanced_labels_of_groups_and_noise_seeds_begin_elsewhere() -> None:
    noises = [SEARCH, HELD_OUT, Noise("selection"), Noise("search", 1)]
    begins = [int(classes(10**6, "balanced", noise, stop=1)) for noise in noises]
    begins.append(int(classes(10**6, "balanced", stop=1, seed=1)))
    assert len(set(begins)) == len(begins)


def test_random_labels_belong_to_an_image_a_group_and_a_seed() -> None:
    noise = ImageNoise(0, SHAPE, ClassLabels(10, "random"))
    drawn = noise.classes(SEARCH, 0, 500)
    assert drawn is not None
    parts = [noise.classes(SEARCH, 0, 7), noise.classes(SEARCH, 7, 500)]
    assert torch.equal(torch.cat(parts), drawn)  # type: ignore[arg-type]
    assert torch.equal(classes(10, "random"), drawn)
    others = [noise.classes(HELD_OUT, 0, 500), noise.classes(Noise("search", 1), 0, 500)]
    others.append(classes(10, "random", seed=1))
    assert all(0.02 < float((other == drawn).float().mean()) < 0.2 for other in others)
    counts = torch.bincount(drawn, minlength=10)
    assert counts.min() > 25
    assert counts.max() < 80


def test_labels_are_drawn_as_often_as_numbers_say() -> None:
    drawn = classes(3, [1, 0, 3], stop=1000)
    parts = [classes(3, [1, 0, 3], stop=7), classes(3, [1, 0, 3], start=7, stop=1000)]
    assert torch.equal(torch.cat(parts), drawn)
    counts = torch.bincount(drawn, minlength=3).tolist()
    assert counts[1] == 0
    assert 200 < counts[0] < 300
    assert torch.equal(classes(3, [0.25, 0.0, 0.75], stop=1000), drawn), "shares say the same"
    assert ClassLabels(3, [1, 0, 3]).describe()["labels"] == [1, 0, 3]


@pytest.mark.parametrize("labels", ["balanced", "random", [1.0] * 10])
@pytest.mark.parametrize("null_label", [10, 0, 4])
def test_no_image_has_the_label_that_stands_for_no_class_wherever_it_stands(labels: Any, null_label: int) -> None:
    chosen = ClassLabels.choose(labels, classes=11, guidance=(2.0, null_label))
    drawn = ImageNoise(0, SHAPE, chosen).classes(SEARCH, 0, 550)
    assert drawn is not None
    counts = torch.bincount(drawn, minlength=11)
    assert counts[null_label] == 0
    assert counts.count_nonzero() == 10
    if labels == "balanced":
        assert counts.tolist() == [0 if label == null_label else 55 for label in range(11)]


def test_a_null_label_beside_the_classes_takes_none_from_them() -> None:
    labels = ClassLabels.choose("balanced", classes=11, null_label=11, guidance=(2.0, 11))
    assert labels is not None
    assert labels.classes == list(range(11))


@pytest.mark.parametrize(
    ("labels", "guidance", "classes", "null_label", "message"),
    [
        ("balanced", None, None, None, "labels: the model has no classes"),
        (
            None,
            None,
            10,
            None,
            "labels: the model has 10 classes; give balanced, .* of how many images each has: so it is",
        ),
        ([1.0, 2.0], None, 3, None, "give 3 numbers, how many images each of the classes 0 to 2 has"),
        ([1.0, -1.0, 3.0], None, 3, None, "give 3 numbers"),
        ([0.0, 0.0, 0.0], None, 3, None, "give 3 numbers"),
        (10, (2.0, 10), 11, None, "labels: 10 stands for no class"),
        (0, (2.0, 0), 11, None, "labels: 0 stands for no class"),
        (12, (2.0, 0), 11, None, "the model has the classes 1 to 10, got 12"),
        ([1.0] * 11, (2.0, 4), 11, None, "give 10 numbers, how many images each of the classes 0 to 10 has"),
        ("balanced", (2.0, 0), 1, None, "guidance.null_label: 0 is the only label of the model"),
        ("balanced", (2.0, 11), 10, 10, "guidance.null_label: the model has the labels 0 to 10, got 11"),
        ("balanced", (2.0, 11), 11, None, "guidance.null_label: the model has the labels 0 to 10, got 11"),
    ],
)
def test_labels_that_do_not_suit_the_model_are_refused(
    labels: Any, guidance: Any, classes: Any, null_label: Any, message: str
) -> None:
    with pytest.raises(ObjectiveError, match=message):
        ClassLabels.choose(labels, classes=classes, null_label=null_label, guidance=guidance, advice=": so it is")
