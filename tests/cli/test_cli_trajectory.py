"""``lcsc trajectory`` as a user types it."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lcsc_opt.cli import run as lcsc
from lcsc_opt.trajectory import Trajectory
from tests.processes import lcsc_process

STEPS = tuple(range(100, 1100, 100))


@pytest.fixture
def runs(workplace: Path) -> Path:
    folder = workplace / "runs"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for step in STEPS:
        save_file({"w": torch.randn(4, 3, generator=generator)}, folder / f"model{step:06d}.safetensors")
    (folder / "opt000100.pt").write_bytes(b"x")
    return folder


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ([], STEPS),
        (["--select", "last=3"], STEPS[-3:]),
        (["--select", "window=400", "--select", "interval=200"], (600, 800, 1000)),
        (["--steps", ",".join(map(str, range(10)))], tuple(range(10))),
    ],
)
def test_pack_selects(runs, options, steps):
    assert lcsc(["trajectory", "pack", "runs/*.safetensors", "-o", "t.trajectory", *options]) == 0
    assert Trajectory.open("t.trajectory").steps == steps


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pack", "runs", "-o", "t", "--select", "first_step=1000"], "first_step 1000 leaves 1 of 10"),
        (["pack", "runs", "-o", "t", "--steps", "a,b"], "Invalid value for '--steps'"),
        (["pack", "nothing/*.pt", "-o", "t"], "No checkpoint in nothing/*.pt"),
        (["show", "nothing"], "nothing does not exist"),
        (["show", "runs", "--verify"], "not a trajectory"),
    ],
)
def test_wrong_input_is_one_line(runs, typed, arguments, message):
    assert message in typed.refused("trajectory", *arguments)
    assert not Path("t").exists()


def test_show_of_packed_and_unpacked_has_the_same_keys(runs, typed):
    assert lcsc(["trajectory", "pack", "runs", "-o", "t.trajectory"]) == 0
    unpacked, packed = (typed.json("trajectory", "show", *given) for given in (["runs"], ["t.trajectory", "--verify"]))
    assert list(unpacked) == list(packed)
    of_packed = {"path", "packed", "verified", "sha256", "difference_norms"}
    assert {name for name in packed if packed[name] != unpacked[name]} == of_packed
    assert (packed["steps"], packed["parameters"], packed["warnings"]) == (list(STEPS), 12, [])


def interrupt_the_fourth_row():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background processes do not have
    plain, calls = os.write, itertools.count(1)

    def write(descriptor, piece):
        if descriptor > 2 and next(calls) == 2 * 4:  # the weights and the padding of a row
            os.kill(os.getpid(), signal.SIGINT)
        return plain(descriptor, piece)

    os.write = write


@pytest.mark.skipif(sys.platform == "win32", reason="no POSIX signals")
def test_ctrl_c_while_packing_keeps_whole_checkpoints_and_the_same_command_goes_on(runs, typed):
    ended = lcsc_process("trajectory", "pack", "runs", "-o", "t.trajectory", first=interrupt_the_fourth_row)
    printed = ended.err
    assert ended.status == 130
    assert "run the same command to continue" in printed
    assert "Traceback" not in printed
    assert not Path("t.trajectory").exists()
    partial = Trajectory.open("t.trajectory.partial")
    partial.verify()
    assert partial.steps in (STEPS[:3], STEPS[:4])
    assert f"pack: {len(STEPS)}/{len(STEPS)}" in typed("trajectory", "pack", "runs", "-o", "t.trajectory").err
    assert lcsc(["trajectory", "pack", "runs", "-o", "undisturbed.trajectory"]) == 0
    assert Trajectory.open("t.trajectory").sha256 == Trajectory.open("undisturbed.trajectory").sha256
