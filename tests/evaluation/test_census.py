from __future__ import annotations

import itertools

import pytest

from lcsc_opt.base.records import NodeWork
from lcsc_opt.evaluation import census
from lcsc_opt.evaluation.census import Census


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(census, "time", made)
    return made


def test_workers_are_counted_by_machine_with_the_share_of_their_time_that_they_work(clock: Clock) -> None:
    workers = Census()
    assert workers.nodes() == []
    workers.count("b", alive=1)
    workers.count("a", alive=1)
    workers.count("a", alive=1, busy=1)
    clock.now += 4.0
    workers.count("a", busy=1)
    clock.now += 4.0
    assert workers.nodes() == [NodeWork("a", 2, 12 / 16, 0), NodeWork("b", 1, 0.0, 0)]


def test_only_the_last_minute_counts(clock: Clock) -> None:
    workers = Census()
    workers.count("a", alive=1, busy=1)
    for _ in range(6):
        clock.now += 10.0
        assert workers.nodes()[0].busy == 1.0
    workers.count("a", busy=-1)
    for idle in range(1, 7):
        clock.now += 10.0
        assert workers.nodes()[0].busy == pytest.approx(1 - idle / 6)
    clock.now += 10.0
    assert workers.nodes()[0].busy == 0.0


def test_a_machine_that_went_away_keeps_its_deaths(clock: Clock) -> None:
    workers = Census()
    workers.count("a", alive=1, busy=1)
    clock.now += 1.0
    workers.count("a", alive=-1, busy=-1, deaths=1)
    workers.count("", deaths=1)
    clock.now += 1.0
    assert workers.nodes() == [NodeWork("", 0, None, 1), NodeWork("a", 0, 1.0, 1)]
    clock.now += 100.0
    workers.nodes()
    clock.now += 100.0
    assert [node.busy for node in itertools.chain(workers.nodes())] == [None, None]
