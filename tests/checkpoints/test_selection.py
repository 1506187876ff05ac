from __future__ import annotations

import hypothesis
from hypothesis import strategies as st

from lcsc_opt.checkpoints.finding import Selection

STEPS = tuple(range(100, 2100, 100))


def chosen(steps, **options):
    return Selection(**options).chosen(steps)


def test_last_and_first_step():
    assert chosen(STEPS, last=3) == chosen(STEPS, first_step=1750) == [1800, 1900, 2000]
    assert chosen(STEPS, last=500, first_step=0) == list(STEPS)


def test_a_count_is_spaced_evenly_and_keeps_both_ends():
    assert chosen(STEPS, count=3) == [100, 1100, 2000]
    assert chosen(STEPS, count=4, last=8) == [1300, 1500, 1800, 2000]
    assert chosen(STEPS, count=20) == chosen(STEPS, count=21) == list(STEPS)


def test_a_last_step_is_as_if_training_had_ended_there():
    assert chosen(STEPS, last_step=350) == [100, 200, 300]
    assert chosen(STEPS, first_step=900, window=1500, interval=200, last=4) == [1400, 1600, 1800, 2000]
    for options in ({"window": 300}, {"interval": 250}, {"last": 4}, {"window": 900, "interval": 200}):
        assert chosen(STEPS, last_step=1299, **options) == chosen(STEPS[:12], **options)


def test_the_papers_window_and_interval():
    """App. B: consistency models on CIFAR-10 at 800K iterations, window size 40K, interval 100."""
    steps = range(0, 800_001, 50)
    taken = chosen(steps, window=40_000, interval=100)
    assert taken == list(range(760_000, 800_001, 100))
    assert taken[-1] - taken[0] == 40_000


@hypothesis.given(st.sets(st.integers(0, 5000), min_size=2, max_size=60), st.integers(1, 700))
def test_one_checkpoint_for_each_point_and_it_is_the_nearest(steps, interval):
    steps = sorted(steps)
    hypothesis.assume(steps[-1] - steps[0] > interval)
    taken = chosen(steps, interval=interval)
    assert taken[-1] == steps[-1]
    for step in steps:
        points = range(0, steps[-1] - steps[0] + 1, interval)
        point = min(points, key=lambda age: (abs(steps[-1] - step - age), age))
        rivals = [other for other in taken if abs(steps[-1] - other - point) <= abs(steps[-1] - step - point)]
        assert rivals, f"nothing stands for {steps[-1] - point}, where {step} is near"
    assert taken == sorted(set(taken))
    assert len(taken) <= (steps[-1] - steps[0]) // interval + 1
