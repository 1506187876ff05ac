"""What ``append(..., wait=False)`` promises a training loop."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from functools import partial

import pytest
import torch

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.trajectory import Trajectory, TrajectoryWriter
from tests.processes import SECONDS, forked, wait_until
from tests.trajectory.ended_writers import append_until_signal, ends_of_interpreters
from tests.trajectory.trajectory_examples import assert_whole, state_dict


@pytest.mark.parametrize(("keep_last", "dtype"), [(None, "exact"), (3, "bfloat16")])
def test_weights_may_change_right_after_append(tmp_path, monkeypatch, dtype, keep_last):
    """The loop writes over everything at once, while the disk is slow."""
    plain = os.write
    monkeypatch.setattr(os, "write", lambda *arguments: (time.sleep(0.002), plain(*arguments))[1])
    weight = torch.empty(3, 50).t()
    weights = {"strided": weight, "tied": weight, "half": torch.empty(9).half(), "count": torch.tensor(0)}
    options = {"dtype": dtype, "keep_last": keep_last}
    waited = TrajectoryWriter(tmp_path / "waited", **options)
    later = TrajectoryWriter(tmp_path / "later", **options)
    with waited, later:
        for step in range(6):
            for number, tensor in enumerate(weights.values()):
                tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(step + number)))
            weights["count"].fill_(step)
            assert waited.append(step, {name: tensor.clone() for name, tensor in weights.items()})
            assert later.append(step, weights, wait=False)
            for tensor in weights.values():
                tensor.fill_(99)
    trajectory = Trajectory.open(tmp_path / "later")
    trajectory.verify()
    assert trajectory.sha256 == Trajectory.open(tmp_path / "waited").sha256
    assert len(trajectory) == (keep_last or 6)


@pytest.mark.parametrize("told_by", ["append that skips", "flush"])
def test_what_is_wrong_with_a_checkpoint_is_told_later(tmp_path, told_by):
    with TrajectoryWriter(tmp_path / "t", every=2) as writer:
        writer.append(2, state_dict(2), wait=False)
        assert writer.append(4, state_dict(4) | {"scale": torch.tensor(float("nan"))}, wait=False)
        skips = partial(wait_until, lambda: writer.append(5, state_dict(5), wait=False))  # none of them waits
        tells = {"append that skips": skips, "flush": writer.flush}
        with pytest.raises(TrajectoryError, match=r"^Tensor 'scale' at step 4 holds NaN or infinity"):
            tells[told_by]()
        assert writer.steps == (2,)
        assert writer.append(6, state_dict(6), wait=False)  # goes on
    assert_whole(tmp_path / "t", [2, 6])


@pytest.mark.skipif(sys.platform == "win32", reason="no POSIX signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_ctrl_c_saves_what_was_taken_and_a_kill_leaves_whole_checkpoints(tmp_path, name):
    path = tmp_path / "t"
    number = signal.Signals[name]
    at = 7
    process = forked(append_until_signal, path, tmp_path / "begun", number, at)
    process.start()
    process.join(SECONDS)
    interrupted = name == "SIGINT"  # others kill it
    assert process.exitcode == (0 if interrupted else -number)
    begun = int((tmp_path / "begun").read_text().split()[-1])  # the last append that was called
    trajectory = Trajectory.open(path)
    trajectory.verify()
    last = trajectory.steps[-1]
    assert trajectory.steps == tuple(range(last - 3, last + 1))
    if interrupted:  # all that was appended is saved
        assert last in (begun - 1, begun)
        assert last >= at
    else:  # in the write of the ``at``-th row, which is one write here
        assert last == at - 1
    for index, step in enumerate(trajectory.steps):
        assert all((tensor == step).all() for tensor in trajectory.checkpoint(index).values())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_writer_that_nobody_closed_saves_when_the_interpreter_ends(tmp_path):
    """Also what a function that runs at the end appends."""
    steps = {
        "exception": (0, 1, 2),
        "fork": (0, 1, 2),
        "wait before": (0, 1, 2, 3),
        "later after": (0, 1, 2, 3),
        "start": (0,),
    }
    assert ends_of_interpreters(tmp_path, list(steps)) == ([1, 0, 0, 0, 2], "stop\n")
    for case, expected in steps.items():
        trajectory = Trajectory.open(tmp_path / case)
        trajectory.verify()
        assert trajectory.steps == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # of processes with several threads
def test_forked_process_neither_writes_nor_keeps_the_lock(tmp_path):
    """As the persistent workers of a data loader, which inherit what is open."""
    reader, ending = os.pipe()
    with TrajectoryWriter(tmp_path / "t") as writer:
        writer.append(1, state_dict(1))
        worker = os.fork()
        if worker == 0:
            with contextlib.suppress(BaseException):
                with pytest.raises(TrajectoryError, match="Another process opened"):
                    writer.append(2, state_dict(2))
                writer.close()
                os.read(reader, 1)
                os._exit(0)
            os._exit(1)
        with pytest.raises(TrajectoryError, match="Another writer"):  # also when the worker has closed its own
            TrajectoryWriter(tmp_path / "t")
    with TrajectoryWriter(tmp_path / "t") as another:
        another.append(2, state_dict(2))
    os.write(ending, b"x")
    assert os.waitpid(worker, 0)[1] == 0
    os.close(reader)
    os.close(ending)
    assert_whole(tmp_path / "t", [1, 2])
