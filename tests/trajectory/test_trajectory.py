from __future__ import annotations

import math
import os
import pickle
import shutil
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import save_file

from lcsc_opt.base.errors import StudySpecError, TrajectoryError
from lcsc_opt.checkpoints.watched import FileState
from lcsc_opt.trajectory import Trajectory, TrajectoryWriter, filling, pack, tiles
from tests.processes import peak_growth
from tests.trajectory.trajectory_examples import STEPS, append, bits, interrupt, make_trajectory, same_bits, state_dict

K = len(STEPS)
shared_fixture = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=20, deadline=None
)
free = hnp.arrays(np.float64, K - 1, elements=st.floats(-3, 3, width=32))


def summing_to_one(values):
    return np.append(values, 1.0 - values.sum())


def exact(coefficients, name):
    """The combination in float64, by a plain loop over state dicts."""
    return sum(a * state_dict(step)[name].double() for a, step in zip(coefficients, STEPS, strict=True))


@pytest.mark.parametrize("index", range(K))
def test_one_hot_gives_back_the_checkpoint_bit_for_bit(trajectory, index):
    assert same_bits(trajectory.merge(np.eye(K)[index]), state_dict(STEPS[index]))
    assert same_bits(trajectory.checkpoint(index), state_dict(STEPS[index]))


@pytest.mark.parametrize("tiles_of", [None, "small_tiles"], ids=["one tile", "several tiles"])
@shared_fixture
@given(free)
def test_merge_is_the_linear_combination(trajectory, request, tiles_of, values):
    if tiles_of is not None:
        request.getfixturevalue(tiles_of)
    coefficients = summing_to_one(values)
    merged = trajectory.merge(coefficients)
    scale = np.abs(coefficients).sum() * 4
    for name, unit in {"weight": 2e-7, "scale": 2e-7, "double": 1e-15, "bfloat": 4e-3, "half": 5e-4}.items():
        torch.testing.assert_close(merged[name].double(), exact(coefficients, name), rtol=unit, atol=unit * scale)


def test_constant_tensors_are_copied_exactly(trajectory):
    merged = trajectory.merge(summing_to_one(np.array([3.3, -7.1, 0.2, 0.9])))
    assert bits(merged["constant"]) == bits(state_dict(0)["constant"])
    assert trajectory.varying.isdisjoint({"constant", "flags", "nothing"})
    assert {"weight", "batches"} <= trajectory.varying


def test_an_extrapolated_variance_is_not_negative(tmp_path):
    """Of batch normalization, which takes its root; other tensors are what the coefficients make of them."""
    with TrajectoryWriter(tmp_path / "norms.trajectory") as writer:
        for step in range(3):
            varying = torch.tensor([3.0 - step])
            writer.append(step, {"norm.running_var": torch.tensor([3.0 - step, 1.0]), "mean": varying})
    norms = Trajectory.open(tmp_path / "norms.trajectory")
    merged = norms.merge([-2.0, 1.0, 2.0])
    assert merged["norm.running_var"].tolist() == [0.0, 1.0]
    assert merged["mean"].item() == -2.0
    assert norms.merge([-1.0, 1.5, 0.5])["norm.running_var"].tolist() == [0.5, 1.0], "below all three, and positive"


def test_integers_come_from_the_largest_coefficient_and_the_first_of_ties(trajectory):
    assert trajectory.merge([-3.0, 0.5, 2.5, 0.5, 0.5])["batches"].item() == STEPS[2]
    assert trajectory.merge([0.1, 0.4, 0.1, 0.4, 0.0])["index"].tolist() == [200, 201, 202]


def test_checkpoints_without_weight_are_not_read(trajectory):
    size = trajectory.nbytes // K
    with (trajectory.path / "weights.bin").open("r+b") as file:
        file.seek(2 * size)
        file.write(b"\xff" * size)  # NaN in every dtype
    merged = trajectory.merge([0.5, 0.5, 0.0, 0.0, 0.0])
    torch.testing.assert_close(merged["double"], exact([0.5, 0.5, 0, 0, 0], "double"))


def test_merge_does_not_depend_on_what_training_set_globally(trajectory):
    row = np.random.default_rng(1).dirichlet(np.ones(K))
    expected = trajectory.merge(row)
    precision = torch.get_float32_matmul_precision()
    torch.set_default_device("meta")
    try:
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            merged = Trajectory.open(trajectory.path).merge(row)
        assert same_bits(merged, expected)
        assert not any(tensor.is_inference() for tensor in merged.values())
        torch.set_float32_matmul_precision("medium")  # then products are summed in float64
        assert trajectory.merge(row)["weight"].sub(expected["weight"]).abs().max() < 1e-6
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_default_device(None)
        torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize(
    ("change", "message"), [(lambda file: file.write(b"!"), "step 400"), (lambda file: file.truncate(), "truncated")]
)
def test_weights_that_changed_on_the_disk_are_refused(trajectory, change, message):
    trajectory.verify()
    with (trajectory.path / "weights.bin").open("r+b") as file:
        file.seek(3 * trajectory.nbytes // K + 5)
        change(file)
    with pytest.raises(TrajectoryError, match=message):
        Trajectory.open(trajectory.path).verify()


def test_slots_are_not_the_order_of_steps(tmp_path):
    trajectory = make_trajectory(tmp_path / "ring", range(1, 10), keep_last=3)
    assert trajectory.steps == (7, 8, 9)
    doubles = torch.stack([state_dict(step)["double"] for step in (7, 8, 9)])
    merged = trajectory.merge([2.0, -0.5, -0.5])
    torch.testing.assert_close(merged["double"], torch.tensor([2.0, -0.5, -0.5]).double() @ doubles)


def test_no_checkpoints_are_no_trajectory(trajectory):
    with pytest.raises(TrajectoryError, match="steps: expected at least one"):
        Trajectory.open(trajectory.path, steps=[])


def merge_one(path):
    """One alone; where all are merged, it has been read before."""
    return Trajectory.open(path).merge(np.eye(24)[0])


def merge_all(path):
    return Trajectory.open(path).merge(np.full(24, 1 / 24))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_merging_needs_its_output_and_one_block(tmp_path):
    checkpoint = {"w": torch.zeros(2_000_000), "h": torch.zeros(4_000_000, dtype=torch.float16)}
    with TrajectoryWriter(tmp_path / "large") as writer:
        for step in range(24):
            for tensor in checkpoint.values():
                tensor[step] = 1.0
            writer.append(step, checkpoint)
    grown = peak_growth(merge_all, tmp_path / "large", first=merge_one)
    assert grown < 16_000_000 + 2 * tiles.TILE_BYTES < 24 * 16_000_000 / 4


def test_weights_written_to_after_their_manifest_are_noticed(trajectory):
    assert not trajectory.touched
    (trajectory.path / "weights.bin").touch()
    assert trajectory.touched
    trajectory.verify()  # the same bytes again are no damage


# the trainer's own average


def two_in_a_file(folder, key):
    for step in (1, 2):
        content = {"model": state_dict(step), "ema": {"weight": state_dict(step + 10)["weight"]}}
        path = folder / f"m{step}.pt"
        if not path.exists():
            torch.save(content, path)
    return pack(sorted(folder.glob("m*.pt")), folder / "t", key=key, overwrite=True)


def test_a_trainers_average_beside_the_weights_merges_as_one_more_checkpoint(tmp_path):
    trajectory = two_in_a_file(tmp_path, "model")
    expected = {**state_dict(2), "weight": state_dict(12)["weight"]}
    for opened in (trajectory, pickle.loads(pickle.dumps(trajectory)), trajectory.on("cpu")):
        assert same_bits(opened.trainer_ema(), expected)
        assert same_bits(opened.merge([0, 0, 1]), expected)
    assert not trajectory.merges_averages
    with pytest.raises(StudySpecError, match=r"shape \[3\]; expected \[2\]"):
        trajectory.merge([0, 1, 0])
    earlier = Trajectory.open(trajectory.path, steps=[1])
    assert earlier.trainer_ema() is None, "it is of the last step"
    with pytest.raises(TrajectoryError, match="no average of the trainer's"):
        earlier.merge([0, 1])


def test_a_trainers_average_is_packed_with_the_checkpoints(tmp_path):
    packed = two_in_a_file(tmp_path, "model")
    sha256 = packed.averages_sha256
    for path in tmp_path.glob("m*.pt"):
        path.unlink()
    packed.path.rename(tmp_path / "moved")
    moved = Trajectory.open(tmp_path / "moved")
    assert moved.averages_sha256 == sha256
    checkpoints_alone = make_trajectory(tmp_path / "alone", (1, 2))
    assert moved.sha256 == checkpoints_alone.sha256, "it is no checkpoint"
    assert moved.nbytes == checkpoints_alone.nbytes
    append(moved.path, 3)
    longer = Trajectory.open(moved.path)
    assert longer.trainer_ema() is None
    assert same_bits(longer.checkpoint(-1), state_dict(3))
    assert Trajectory.open(moved.path, steps=[1, 2]).averages_sha256 == sha256
    with (moved.path / "weights.bin").open("r+b") as file:
        file.seek(2 * packed.nbytes // 2 + 5)
        file.write(b"?")
    with pytest.raises(TrajectoryError, match="the weights of step 2 are damaged"):
        longer.verify()


@pytest.mark.parametrize("stored", ["exact", "bfloat16"])
@pytest.mark.parametrize(
    ("of_weights", "of_average", "expected"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
    ],
)
def test_a_trainers_average_keeps_its_digits_where_they_are_more_than_those_of_the_weights(
    tmp_path, of_weights, of_average, expected, stored
):
    generator = torch.Generator().manual_seed(0)
    for step in (1, 2):
        weights = torch.randn(70, 3, generator=generator).to(of_weights)
        average = torch.randn(70, 3, generator=generator, dtype=torch.float64).to(of_average)
        content = {"net.w": weights, "net.rank": torch.tensor(step), "vae.b": torch.ones(9)}
        torch.save({"model": content, "ema": {**content, "net.w": average}}, tmp_path / f"m{step}.pt")
    trajectory = pack(sorted(tmp_path.glob("m*.pt")), tmp_path / "t", dtype=stored)
    for path in tmp_path.glob("m*.pt"):
        path.unlink()
    trajectory.verify()
    rows = torch.float32 if stored == "bfloat16" else of_weights
    merged = trajectory.merge([0.5, 0.5])
    assert (merged["net.w"].dtype, trajectory.checkpoint(0)["net.w"].dtype) == (rows, rows)
    expected_state = {"net.w": average.to(expected), "net.rank": torch.tensor(2), "vae.b": torch.ones(9)}
    append(trajectory.path, 3, weights=lambda step: {**content, "net.w": content["net.w"] * 2})
    assert same_bits(Trajectory.open(trajectory.path).checkpoint(1), trajectory.checkpoint(1))
    reopened = Trajectory.open(trajectory.path, steps=[1, 2])
    for opened in (trajectory, reopened, pickle.loads(pickle.dumps(reopened)), trajectory.on("cpu")):
        assert same_bits(opened.trainer_ema() or {}, expected_state)
        assert same_bits(opened.merge([0, 0, 1]), expected_state)
    fitting = reopened.fitting({"w": torch.zeros(70, 3), "rank": torch.tensor(0)})
    assert same_bits(fitting.trainer_ema() or {}, {"w": average.to(expected), "rank": torch.tensor(2)})


def test_averages_of_several_dtypes_lie_beside_the_checkpoints_and_each_other(tmp_path):
    average = {0.9: torch.float32, 0.99: torch.float64, 0.999: torch.bfloat16}
    for step in (1, 2):
        weights = {name: torch.full((70,), step + number, dtype=torch.bfloat16) for number, name in enumerate("abc")}
        torch.save(weights, tmp_path / f"model_{step}.pt")
        for rate, dtype in average.items():
            torch.save(
                {name: tensor.to(dtype) + rate / step for name, tensor in weights.items()},
                tmp_path / f"ema_{rate}_{step}.pt",
            )
    trajectory = pack(tmp_path / "model_*.pt", tmp_path / "t")
    expected = {rate: torch.load(tmp_path / f"ema_{rate}_2.pt") for rate in average}
    trajectory.verify()
    for path in tmp_path.glob("*.pt"):
        path.unlink()
    packed = Trajectory.open(trajectory.path)
    assert packed.averages == ("trainer's EMA 0.9", "trainer's EMA 0.99", "trainer's EMA 0.999")
    for index, rate in enumerate(average):
        assert same_bits(packed.trainer_ema(index) or {}, expected[rate])


@pytest.mark.parametrize("number", [math.inf, math.nan])
def test_an_average_that_is_not_finite_is_left_out(tmp_path, caplog, number):
    for step in (1, 2):
        weights = {"w": torch.full((4,), float(step), dtype=torch.bfloat16)}
        torch.save({"model": weights, "ema": {"w": torch.full((4,), number)}}, tmp_path / f"m{step}.pt")
    assert pack(tmp_path / "m*.pt", tmp_path / "t").trainer_ema() is None


def test_an_average_may_have_the_infinity_of_a_mask(tmp_path):
    mask = torch.tensor([0.0, -math.inf])
    for step in (1, 2):
        weights = {"w": torch.full((4,), float(step), dtype=torch.bfloat16), "mask": mask.bfloat16()}
        average = {"w": torch.full((4,), step - 0.1), "mask": mask}
        torch.save({"model": weights, "ema": average}, tmp_path / f"m{step}.pt")
    assert same_bits(pack(tmp_path / "m*.pt", tmp_path / "t").trainer_ema() or {}, average)


@pytest.mark.parametrize("write", [1, 3], ids=["first row", "average"])
def test_an_interrupted_pack_writes_the_average_when_it_goes_on(tmp_path, monkeypatch, write):
    two_in_a_file(tmp_path, "model")  # the files
    shutil.rmtree(tmp_path / "t")
    with monkeypatch.context() as patch:
        interrupt(patch, os, "write", write, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            two_in_a_file(tmp_path, "model")
    assert same_bits(
        two_in_a_file(tmp_path, "model").trainer_ema(), {**state_dict(2), "weight": state_dict(12)["weight"]}
    )


def test_checkpoints_that_are_averages_have_no_other_and_what_they_lack_is_the_models(tmp_path):
    trajectory = two_in_a_file(tmp_path, "ema")
    assert same_bits(trajectory.checkpoint(1), {**state_dict(2), "weight": state_dict(12)["weight"]})
    assert trajectory.merges_averages
    assert trajectory.trainer_ema() is None
    assert make_trajectory(tmp_path / "written").trainer_ema() is None


def test_an_average_that_lightning_saves_as_the_model_is_the_trainers(tmp_path):
    for step in (1, 2):
        content = {"state_dict": state_dict(step + 10), "current_model_state": state_dict(step), "averaging_state": {}}
        torch.save(content, tmp_path / f"m{step}.pt")
    trajectory = pack(sorted(tmp_path.glob("m*.pt")), tmp_path / "t", key="current_model_state")
    assert same_bits(trajectory.checkpoint(-1), state_dict(2))
    assert same_bits(trajectory.merge([0, 0, 1]), state_dict(12))


def test_training_that_goes_back_drops_an_average_of_a_later_step(tmp_path):
    packed = two_in_a_file(tmp_path, "model")
    append(packed.path, 3, resume=2)
    assert Trajectory.open(packed.path, steps=[1, 2]).trainer_ema() is not None
    append(packed.path, 2, resume=1, weights=lambda step: state_dict(step + 5))
    assert Trajectory.open(packed.path).trainer_ema() is None, "it is of other weights at this step"


def parts(step: int) -> dict[str, torch.Tensor]:
    """The weights of a model of two parts, the first of which is the network's."""
    of_network = {f"net.{name}": tensor for name, tensor in state_dict(step).items()}
    return {**of_network, "decoder.bias": torch.full((2,), float(step))}


def test_a_trainers_average_may_be_a_file_of_its_own_or_another_key(tmp_path):
    trajectory = two_in_a_file(tmp_path, "model")
    trajectory.trainer_ema_at = tmp_path / "ema.pt"
    torch.save(state_dict(5), tmp_path / "ema.pt")
    assert same_bits(pickle.loads(pickle.dumps(trajectory)).trainer_ema(), state_dict(5))
    trajectory.trainer_ema_at = "other"
    torch.save({"model": state_dict(2), "ema": state_dict(3), "other": state_dict(4)}, tmp_path / "m2.pt")
    assert same_bits(trajectory.trainer_ema(), state_dict(4))
    torch.save({"model": state_dict(2), "ema": {"extra": torch.zeros(2)}}, tmp_path / "m2.pt")
    trajectory.trainer_ema_at = "ema"
    with pytest.raises(TrajectoryError, match=r"trainer_ema: the trainer's average does not fit .* has also 'extra'"):
        trajectory.trainer_ema()
    # the average of one part of a model is without the other parts, whatever its names begin with
    for step in (1, 2):
        save_file(parts(step), tmp_path / f"p{step}.safetensors")
    part = pack(sorted(tmp_path.glob("p*.safetensors")), tmp_path / "parts").fitting(state_dict(1))
    part.trainer_ema_at = tmp_path / "average.safetensors"
    for averages in (parts(5), state_dict(5)):
        save_file(averages, tmp_path / "average.safetensors")
        average = part.trainer_ema()
        assert average is not None
        assert same_bits(average, state_dict(5))
    save_file({"ema.bias": torch.zeros(2)}, tmp_path / "average.safetensors")
    with pytest.raises(TrajectoryError, match=r"does not fit the checkpoints: its model has also 'ema.bias'"):
        part.trainer_ema()
    unasked = pack(sorted(tmp_path.glob("m*.pt")), tmp_path / "unasked", key="model")
    assert unasked.trainer_ema() is None


def test_a_trainers_average_that_is_written_over_while_it_is_packed_is_left_out(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", logger="lcsc_opt")
    opened = []

    class WrittenOver(FileState):
        def __init__(self, path):
            super().__init__(path)
            opened.append(path.name)
            self.path = path

        def copy(self, place, mapped):
            super().copy(place, mapped)
            if opened == ["m1.pt", "m2.pt", "m2.pt"]:  # two rows, and the average
                with self.path.open("ab") as file:
                    file.write(b"x")

    monkeypatch.setattr(filling, "FileState", WrittenOver)
    assert two_in_a_file(tmp_path, "model").trainer_ema() is None
    assert "m2.pt: the trainer's EMA is left out: was written over while it was read" in caplog.text


def test_a_trainers_average_that_is_not_finite_is_left_out(tmp_path, caplog):
    caplog.set_level("INFO", logger="lcsc_opt")
    for step in (1, 2):
        torch.save(
            {"model": {"w": torch.ones(2) * step}, "ema": {"w": torch.tensor([1, torch.nan])}}, tmp_path / f"{step}.pt"
        )
    trajectory = pack(tmp_path, tmp_path / "t", key="model")
    assert trajectory.trainer_ema() is None
    assert "the trainer's EMA is left out: Tensor 'w' at step 2 holds NaN" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_merge_that_leaves_the_range_of_its_dtype_is_refused_wherever_it_is_made(tmp_path, dtype):
    most = torch.finfo(dtype).max
    with TrajectoryWriter(tmp_path / "t") as writer:
        for step, sign in ((1, 1), (2, -1)):
            mask = torch.tensor([1.0, -torch.inf])  # infinite constants are no overflow
            writer.append(step, {"w": torch.tensor([1.0, sign * 0.9 * most], dtype=dtype), "mask": mask})
    opened = Trajectory.open(tmp_path / "t")
    for trajectory in (opened, opened.on("cpu", how="streamed"), opened.in_rows("layers")):
        assert torch.isfinite(trajectory.merge([0.5, 0.5])["w"]).all()
        with pytest.raises(TrajectoryError, match=f"'w' of the merged model is too large for {dtype}"):
            trajectory.merge([3.0, -2.0])
