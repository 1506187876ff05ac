from __future__ import annotations

import threading
import time

import pytest

from lcsc_opt.trajectory import in_order
from lcsc_opt.trajectory.in_order import InOrder


def test_calls_are_made_in_order_in_one_other_thread():
    seen = []
    with InOrder("test") as calls:
        for number in range(50):
            calls.submit(lambda n: seen.append((n, threading.current_thread())), number)
        calls.finish()
    assert [number for number, _ in seen] == list(range(50))
    assert len({thread for _, thread in seen}) == 1
    assert threading.current_thread() not in {thread for _, thread in seen}


def test_the_caller_waits_where_too_much_would_wait():
    gate, begun = threading.Semaphore(0), []
    with InOrder("test", most_bytes=10) as calls:
        for number in range(2):
            calls.submit(gate.acquire, nbytes=5)
            begun.append(number)
        threading.Timer(0.1, gate.release, [9]).start()
        calls.submit(begun.append, 2, nbytes=5)
        assert gate._value >= 7  # so it waited for the first
        calls.finish()
    assert begun == [0, 1, 2]


def test_first_failure_is_raised_once_and_what_had_not_begun_never_does():
    gate, seen = threading.Event(), []

    def fail():
        gate.wait(10)
        raise KeyError("first")

    with InOrder("test") as calls:
        calls.submit(fail)
        calls.submit(seen.append, 1)
        calls.submit(fail)
        gate.set()
        with pytest.raises(KeyError, match="first"):
            calls.finish()
        calls.finish()
        calls.submit(seen.append, 2)
        calls.finish()
    assert seen[-1] == 2
    assert len(seen) <= 2  # the second call may have begun while the failure was looked at


def test_a_failure_is_raised_by_the_next_submission_that_sees_it():
    def fail():
        time.sleep(0.1)
        raise KeyError("first")

    def submit_often():
        for _ in range(1000):
            calls.submit(time.sleep, 0.0)
            time.sleep(0.01)

    with InOrder("test") as calls:
        calls.submit(fail)
        with pytest.raises(KeyError, match="first"):
            submit_often()


def test_interrupted_waiting_leaves_the_calls_in_the_line(monkeypatch):
    """As Ctrl-C: it stops who waits, and nothing else."""
    gate, seen, plain = threading.Event(), [], in_order.wait

    def interrupted(_):
        raise KeyboardInterrupt

    with InOrder("test") as calls:
        calls.submit(gate.wait, 10)
        calls.submit(seen.append, 1)
        monkeypatch.setattr(in_order, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            calls.finish()
        monkeypatch.setattr(in_order, "wait", plain)
        gate.set()
        calls.finish()
    assert seen == [1]


def test_check_raises_what_has_failed_and_waits_for_nothing():
    gate = threading.Event()

    def fail():
        gate.wait(10)
        raise KeyError("late")

    def check_often():
        while True:
            calls.check()
            time.sleep(0.01)

    with InOrder("test") as calls:
        calls.submit(fail)
        calls.check()
        gate.set()
        with pytest.raises(KeyError, match="late"):
            check_often()
        calls.check()  # told once
