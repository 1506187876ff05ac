"""Averages of several widths in one trajectory: found, packed, appended to, exported and averaged again."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.cli import run as lcsc
from lcsc_opt.coefficients import power_ema_coefficients
from lcsc_opt.coefficients.rows import AverageSteps, Row
from lcsc_opt.exports.exact_merge import CheckpointFiles, merge_exactly
from lcsc_opt.exports.recipe import Recipe
from lcsc_opt.optimizers import EMAGrid, PowerEMAGrid
from lcsc_opt.trajectory import Trajectory, TrajectoryWriter
from lcsc_opt.trajectory.inspection import inspect
from lcsc_opt.trajectory.packing import open_or_pack, pack
from lcsc_opt.trajectory.sources import find_sources
from tests.checkpoints import checkpoint_examples, nvlabs_examples
from tests.trajectory.trajectory_examples import make_trajectory, same_bits

ROWS = tuple(Row(step, width) for step in checkpoint_examples.STEPS for width in (0.05, 0.1))


@pytest.fixture
def edm2(tmp_path: Path) -> Path:
    folder = tmp_path / "edm2"
    checkpoint_examples.write("NVlabs EDM2", folder)
    return folder


@pytest.fixture
def post_hoc(tmp_path: Path) -> Path:
    folder = tmp_path / "posthoc"
    checkpoint_examples.write("PostHocEMA of ema-pytorch", folder)
    return folder


def packed(out: Path, *arguments: object) -> str:
    """Pack on the command line; gives what it said where it failed."""
    return lcsc(["trajectory", "pack", *map(str, arguments), "-o", str(out)])  # type: ignore[return-value]


def test_a_folder_of_edm2_is_one_trajectory(edm2: Path, tmp_path: Path) -> None:
    trajectory = pack(edm2, tmp_path / "t")
    assert trajectory.rows == ROWS
    assert trajectory.steps == (100, 100, 200, 200, 300, 300)
    assert isinstance(trajectory.steps, AverageSteps)
    for row, checkpoint in zip(ROWS, map(trajectory.checkpoint, range(6)), strict=True):
        network = nvlabs_examples.network(row.step + (row.width == 0.05))
        expected = {name: tensor.half() for name, tensor in network.state_dict().items()}
        for name, tensor in expected.items():
            assert torch.equal(checkpoint[name], tensor)
    described = inspect([trajectory.path])
    assert described["widths"] == [0.05, 0.1]
    assert described["intervals"] == [100]
    assert described["warnings"] == inspect([edm2])["warnings"] == []
    assert described["rows"] == inspect([edm2])["rows"] == "averages of width 0.05, 0.1"
    assert pickle.loads(pickle.dumps(trajectory)).rows == ROWS


def test_power_averages_are_reconstructed(edm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lcsc"])
    monkeypatch.setenv("LCSC_CACHE", str(tmp_path / "cache"))
    assert lcsc(["apply", "power:0.1", str(edm2), "-o", str(tmp_path / "same.safetensors")]) == 0
    trajectory = pack(edm2, tmp_path / "t")
    last_wide = trajectory.checkpoint(-1)
    for name, tensor in load_file(tmp_path / "same.safetensors").items():
        torch.testing.assert_close(tensor, last_wide[name])
    for grid in (EMAGrid(), PowerEMAGrid()):
        assert any(np.allclose(profile, np.eye(6)[-1], atol=1e-9) for profile in grid.profiles(trajectory.steps))


def test_a_recipe_finds_each_width_again(edm2: Path, tmp_path: Path) -> None:
    trajectory = pack(edm2, tmp_path / "t")
    coefficients = power_ema_coefficients(trajectory.steps, 0.07)
    recipe = Recipe.model_validate_json(Recipe.of(trajectory, coefficients, study="tests").as_text())
    assert recipe.widths == (0.05, 0.1) * 3
    files = CheckpointFiles(find_sources(sorted(edm2.glob("*.pkl"))), key="ema")
    assert same_bits(merge_exactly(files, recipe), merge_exactly(trajectory, recipe))
    fewer = CheckpointFiles(find_sources(sorted(edm2.glob("*-0.100.pkl"))), key="ema")
    with pytest.raises(TrajectoryError, match=r"3 of the 6 checkpoints .* are missing: 100, width 0\.05, "):
        merge_exactly(fewer, recipe)


def test_a_selection_keeps_all_widths_of_a_step(edm2: Path, tmp_path: Path) -> None:
    out = tmp_path / "t"
    assert packed(out, edm2, "--select", "last=2") == 0
    assert Trajectory.open(out).rows == ROWS[2:]
    assert Trajectory.open(out, steps=[300]).rows == ROWS[4:]


def test_averages_before_the_first_step_are_left_out(edm2: Path, tmp_path: Path) -> None:
    for width in ("0.050", "0.100"):
        nvlabs_examples.write_snapshot(edm2 / f"network-snapshot-0000000-{width}.pkl", nvlabs_examples.network(0))
    assert pack(edm2, tmp_path / "t").rows == ROWS


def test_widths_without_a_step_are_refused_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["lcsc"])
    for name in "ab":
        torch.save({"w": torch.ones(2)}, tmp_path / f"{name}.pt")
    assert packed(tmp_path / "t", f"{tmp_path}/?.pt", "--widths", "0.05,0.1") == 2
    assert "has no step in its name or contents" in capsys.readouterr().err
    assert packed(tmp_path / "t", f"{tmp_path}/?.pt", "--widths", "0.05,0.1", "--steps", "0,0") == 2
    assert "All averages are of step 0" in capsys.readouterr().err
    assert not (tmp_path / "t").exists()


def test_one_width_alone_has_its_width(edm2: Path, tmp_path: Path) -> None:
    trajectory = open_or_pack(str(edm2 / "*-0.100.pkl"), cache=tmp_path)
    assert trajectory.rows == ROWS[1::2]


def test_widths_are_given_for_files_that_do_not_tell(post_hoc: Path, tmp_path: Path) -> None:
    assert packed(tmp_path / "t", post_hoc, "--widths", "0.05,0.1") == 0
    trajectory = Trajectory.open(tmp_path / "t")
    assert trajectory.rows == ROWS
    narrow = {name: tensor.half() for name, tensor in checkpoint_examples.weights(101).items()}
    assert torch.equal(trajectory.checkpoint(0)["0.weight"], narrow["0.weight"])
    globs = [post_hoc / "1.*.pt", post_hoc / "0.*.pt"]  # in any order, the series are in theirs
    assert pack(globs, tmp_path / "u", widths=[0.05, 0.1]).sha256 == trajectory.sha256


BAD = {
    "too few": ("posthoc", ["--widths", "0.05"], "--widths: expected 2, one for each series (0, 1), got 1"),
    "too wide": ("posthoc", ["--widths", "0.05,0.5"], "--width: expected a sigma_rel above 0 and at most 0.2887"),
    "none": ("posthoc", [], "several series"),
    "twice the same": ("posthoc", ["--widths", "0.1,0.1"], "Step 100, width 0.1 appears twice"),
    "told otherwise": ("edm2", ["--widths", "0.05,0.2"], "gives it width 0.2, but its name says 0.1"),
    "means of averages": ("edm2", ["--means", "2"], "averages already"),
    "no step": ("nameless", ["--widths", "0.1"], "has no step in its name or contents"),
}


@pytest.mark.parametrize(("folder", "arguments", "message"), BAD.values(), ids=BAD.keys())
def test_bad_widths_are_refused_in_one_line(
    folder: str,
    arguments: list[str],
    message: str,
    edm2: Path,
    post_hoc: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "nameless").mkdir()
    for name in ("first", "second"):
        torch.save(checkpoint_examples.weights(0), tmp_path / "nameless" / f"{name}.pt")
    before = set(tmp_path.iterdir())
    assert packed(tmp_path / "t", tmp_path / folder, *arguments) == 2
    assert message in capsys.readouterr().err
    assert {path for path in tmp_path.iterdir() if not path.name.startswith(".")} == before


def average(seed: float) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((3,), float(seed))}


def test_a_training_appends_each_width(tmp_path: Path) -> None:
    with TrajectoryWriter(tmp_path / "t") as writer:
        for step in (10, 20):
            for width in (0.0, 0.05, 0.1):
                assert writer.append(step, average(step + width), width=width, wait=False)
        assert not writer.append(20, average(20.1), width=0.1)  # again
        with pytest.raises(TrajectoryError, match=r"Step 20, width 0\.05 is saved already, with other weights"):
            writer.append(20, average(7), width=0.05)
        with pytest.raises(TrajectoryError, match=r"Step 20, width 0\.07 comes after step 20, width 0\.1; widths of"):
            writer.append(20, average(7), width=0.07)
        with pytest.raises(TrajectoryError, match=r"width 0\.1 at step 0: an average needs a step above 0"):
            writer.append(0, average(7), width=0.1)
        with pytest.raises(TrajectoryError, match="sigma_rel"):
            writer.append(30, average(7), width=0.6)
    trajectory = Trajectory.open(tmp_path / "t")
    assert trajectory.rows == tuple(Row(step, width) for step in (10, 20) for width in (0.0, 0.05, 0.1))
    with TrajectoryWriter(tmp_path / "t", resume=10) as writer:
        assert writer.steps == (10, 10, 10)
    assert json.loads((tmp_path / "t" / "manifest.json").read_bytes())["format"] == 2


def test_a_row_is_named_with_its_width(tmp_path: Path) -> None:
    with TrajectoryWriter(tmp_path / "t") as writer:
        for width in (0.05, 0.1):
            writer.append(10, average(1), width=width)
        with pytest.raises(TrajectoryError, match=r"at step 20, width 0\.05 holds NaN"):
            writer.append(20, average(float("nan")), width=0.05)
    trajectory = Trajectory.open(tmp_path / "t")
    assert trajectory.identical() == ["identical weights: step 10, width 0.05, step 10, width 0.1"]
    weights = bytearray((tmp_path / "t" / "weights.bin").read_bytes())
    weights[0] ^= 64
    (tmp_path / "t" / "weights.bin").write_bytes(weights)
    with pytest.raises(TrajectoryError, match=r"the weights of step 10, width 0\.05 are damaged"):
        Trajectory.open(tmp_path / "t").verify()


@pytest.mark.parametrize(
    ("entry", "value"),
    [("width", 0.5), ("width", -0.1), ("width", float("nan")), ("step", 0), ("interval", [1, 10, 5])],
)
def test_a_manifest_that_cannot_be_is_refused(tmp_path: Path, entry: str, value: object) -> None:
    with TrajectoryWriter(tmp_path / "t") as writer:
        writer.append(10, average(1), width=0.1)
        writer.append(20, average(2), width=0.1)
    path = tmp_path / "t" / "manifest.json"
    manifest = json.loads(path.read_bytes())
    manifest["checkpoints"][0][entry] = value
    path.write_text(json.dumps(manifest))
    with pytest.raises(TrajectoryError, match="is broken"):
        Trajectory.open(tmp_path / "t")


def test_packing_again_keeps_the_widths(edm2: Path, tmp_path: Path) -> None:
    trajectory = pack(edm2, tmp_path / "t")
    again = pack(trajectory.path, tmp_path / "u", dtype="int8")
    assert again.rows == ROWS
    plain = make_trajectory(tmp_path / "plain")
    assert pack(plain.path, tmp_path / "v").rows == tuple(map(Row, plain.steps))


@pytest.mark.parametrize("name", ["NVlabs EDM2", "JiT, RiT, JLT", "icefall", "torchtitan with its EMA", "OLMo-core"])
def test_init_drafts_a_study_in_one_command(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lcsc"])
    checkpoint_examples.write(name, tmp_path / "run")
    assert lcsc(["init", "run"]) == 0, capsys.readouterr().err
    assert "steps 100 to 300" in next(tmp_path.glob("*.yaml")).read_text()


def test_running_means_of_icefall_become_means_of_intervals(tmp_path: Path) -> None:
    written = checkpoint_examples.write("icefall", tmp_path / "run")
    trajectory = pack(tmp_path / "run", tmp_path / "t")
    assert trajectory.intervals == ((1, 100, 100), (101, 200, 100), (201, 300, 100))
    for index, step in enumerate(checkpoint_examples.STEPS):
        assert same_bits(trajectory.checkpoint(index), written[step])
    raw = pack(tmp_path / "run", tmp_path / "raw", key="model")
    assert raw.intervals is None
    with pytest.raises(TrajectoryError, match="is a mean already"):
        pack(tmp_path / "run", tmp_path / "no", means=1)
