from __future__ import annotations

import dataclasses
import time
from itertools import combinations

import pytest

from lcsc_opt.evaluation.pipeline import Pipeline
from tests.evaluation.staged_examples import (
    SLOW_SECONDS,
    Overlapping,
    Slow,
    Stages,
    assert_gradient,
    candidate,
    evaluated,
    failed,
)


def test_a_pipeline_gives_the_losses_and_the_gradient_of_the_objective() -> None:
    objective = Stages()
    pipeline = Pipeline(objective)
    asked = [candidate(1 - a, a, 0.0, images=images) for a, images in ((0.2, None), (0.7, 5), (-3.0, 8))]
    assert [evaluated(pipeline.submit(one)).loss for one in asked] == [objective.evaluate(one).loss for one in asked]
    with_gradient = dataclasses.replace(asked[0], gradient=True)
    assert_gradient(evaluated(pipeline.submit(with_gradient)), with_gradient)
    pipeline.close()


def test_stages_of_different_candidates_overlap_and_those_of_one_do_not() -> None:
    objective = Overlapping()
    pipeline = Pipeline(objective)
    waiting = [pipeline.submit(candidate(1.0, 0.0, 0.0)) for _ in range(2)]
    for _ in range(10):  # two candidates under way, as the runner keeps them
        waiting.pop(0).result()
        waiting.append(pipeline.submit(candidate(1.0, 0.0, 0.0)))
    for future in waiting:
        future.result()
    pipeline.close()
    assert objective.met == {"merge", "score"}
    for stage in ("merge", "sample", "score"):
        times = [(begun, ended) for name, _, begun, ended in objective.log if name == stage]
        assert all(a[1] <= b[0] or b[1] <= a[0] for a, b in combinations(times, 2)), f"two at once: {stage}"
        assert len({thread for name, thread, _, _ in objective.log if name == stage}) == 1


@pytest.mark.parametrize(("first", "reason"), [(7.0, "merge"), (8.0, "sample"), (9.0, "score")])
def test_a_stage_that_fails_fails_its_candidate_only(first: float, reason: str) -> None:
    pipeline = Pipeline(Stages())
    broken, good = pipeline.submit(candidate(first, 1 - first, 0.0)), pipeline.submit(candidate(1.0, 0.0, 0.0))
    assert failed(broken).reason == f"RuntimeError: cannot {reason}"
    assert failed(broken).retry
    evaluated(good)
    pipeline.close()


def test_closing_stops_a_stage_in_the_middle() -> None:
    objective = Slow()
    pipeline = Pipeline(objective)
    running, waiting = pipeline.submit(candidate(1.0, 0.0, 0.0)), pipeline.submit(candidate(1.0, 0.0, 0.0))
    assert objective.has_sampled.wait(120)
    start = time.monotonic()
    pipeline.close()
    assert time.monotonic() - start < SLOW_SECONDS / 2
    assert not running.done() or running.cancelled() or running.exception() is not None
    assert waiting.cancelled() or waiting.done()
