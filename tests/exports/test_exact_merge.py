"""An exported combination has the same bits everywhere: packed or files, any block size, any number of threads."""

from __future__ import annotations

import fractions
import hashlib
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import save_file

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.exports import Recipe, exact_merge
from lcsc_opt.exports.exact_merge import CheckpointFiles, cast, merge_exactly
from lcsc_opt.trajectory import Trajectory
from tests.trajectory.trajectory_examples import STEPS, bits, make_trajectory, same_bits, state_dict

COEFFICIENTS = np.array([-0.7, 0.3, 1.9, -0.9, 0.4])


@pytest.fixture
def trajectory(tmp_path: Path) -> Trajectory:
    return make_trajectory(tmp_path / "run.trajectory")


def written(path: Path, *states: dict[str, torch.Tensor]) -> Trajectory:
    return make_trajectory(path, range(1, len(states) + 1), weights=lambda step: states[step - 1])


@pytest.fixture
def files(tmp_path: Path) -> dict[int, Path]:
    paths = {step: tmp_path / f"model{step:06d}.safetensors" for step in STEPS}
    for step, path in paths.items():
        save_file(state_dict(step), path)
    return paths


def recipe(trajectory: Trajectory, coefficients: np.ndarray = COEFFICIENTS, dtype: str | None = None) -> Recipe:
    return Recipe.of(trajectory, np.array(coefficients), study="tests").model_copy(update={"dtype": dtype})


def packed(trajectory: Trajectory, coefficients: np.ndarray = COEFFICIENTS, dtype: str | None = None):
    return merge_exactly(trajectory, recipe(trajectory, coefficients, dtype))


@pytest.mark.parametrize("dtype", [None, "float32", "float16", "bfloat16", "float64"])
def test_files_and_the_packed_trajectory_give_the_same_bits(
    trajectory: Trajectory, files: dict[int, Path], dtype: str | None
) -> None:
    merged = packed(trajectory, dtype=dtype)
    again = merge_exactly(CheckpointFiles(files), recipe(trajectory, dtype=dtype))
    assert same_bits(merged, again)
    floating = {tensor.dtype for tensor in merged.values() if tensor.is_floating_point()}
    assert dtype is None or floating == {getattr(torch, dtype)}
    assert merged["index"].dtype == torch.int16


def test_neither_blocks_nor_threads_change_a_bit(trajectory: Trajectory, monkeypatch: pytest.MonkeyPatch) -> None:
    merged = packed(trajectory)
    monkeypatch.setattr(exact_merge, "ELEMENTS", 7)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert same_bits(merged, packed(trajectory))
    finally:
        torch.set_num_threads(threads)


def test_every_element_is_the_exact_sum_rounded_step_by_step(trajectory: Trajectory) -> None:
    """Against arithmetic in fractions, which rounds nothing: two IEEE operations a checkpoint, then one more."""
    total = None
    for coefficient, step in zip(COEFFICIENTS, STEPS, strict=True):
        value = fractions.Fraction(float(state_dict(step)["weight"][2, 3]))
        product = float(fractions.Fraction(float(coefficient)) * value)
        total = product if total is None else float(fractions.Fraction(total) + fractions.Fraction(product))
    assert float(packed(trajectory)["weight"][2, 3]) == float(np.float32(total))


GOLDEN = {
    "float64": "4e2ec680cff3ba52103b49e5e8ff082d475bbd040c68022531a8e32c91c7f305",
    None: "f15da5ebbb0bff348c4abf512ac3bfc00b08ba3724f6667d9117c8c1b28031c1",
    "float16": "e916a5b263543c3f362a5a72db3365b691217ac96c48fad067ded9917b83af52",
    "bfloat16": "d79bae05f7d5ea727dc17b21fbefb2f9ce99ef90d6669a4af4e63eb3df35ef5e",
}


@pytest.mark.parametrize(("dtype", "sha256"), GOLDEN.items())
def test_golden_bits(dtype: str | None, sha256: str, tmp_path: Path) -> None:
    """Written down once: a machine or a version of numpy or torch that gives other bits breaks the promise."""
    values = [(np.arange(1000) * (7919 * step) % 10007 - 5003) / 4096 for step in range(1, 8)]  # exact in float32
    states = ({"w": torch.from_numpy(each.astype(np.float32))} for each in values)
    trajectory = written(tmp_path / "golden.trajectory", *states)
    merged = packed(trajectory, np.array([0.1, -0.2, 0.3, -0.7, 0.9, -0.3, 0.9]), dtype=dtype)
    assert hashlib.sha256(bits(merged["w"])).hexdigest() == sha256


def test_a_merge_holds_float64_of_one_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_merge, "ELEMENTS", 2**14)
    tensors = {f"w{i}": torch.ones(200_000, dtype=torch.bfloat16) for i in range(12)}
    trajectory = written(tmp_path / "a.trajectory", *({n: t * step for n, t in tensors.items()} for step in (1, 2)))
    tracemalloc.start()  # sees what numpy allocates, which is all float64
    merge_exactly(trajectory, recipe(trajectory, np.array([-0.5, 1.5])))
    assert tracemalloc.get_traced_memory()[1] < 3 * 8 * 200_000
    tracemalloc.stop()


def test_checkpoints_with_coefficient_zero_are_not_needed(trajectory: Trajectory, files: dict[int, Path]) -> None:
    coefficients = np.array([0.0, 0.5, 0.0, 0.0, 0.5])
    some = CheckpointFiles({step: files[step] for step in (200, 500)})
    merged = merge_exactly(some, recipe(trajectory, coefficients))
    assert same_bits(merged, packed(trajectory, coefficients))


def test_swapped_names_are_refused(tmp_path: Path) -> None:
    """The bytes of a row do not tell its names: two tensors of one shape that change places in all checkpoints."""

    def tensors(step: int, *names: str) -> dict[str, torch.Tensor]:
        return {name: torch.full((64,), step / divisor) for name, divisor in zip(names, (3, 7), strict=True)}

    trajectory = written(tmp_path / "a.trajectory", tensors(1, "a", "b"), tensors(2, "a", "b"))
    paths = {step: tmp_path / f"{step}.safetensors" for step in (1, 2)}
    for step, path in paths.items():
        save_file(tensors(step, "x", "y"), path)
    with pytest.raises(TrajectoryError, match="other tensor names"):
        merge_exactly(CheckpointFiles(paths), recipe(trajectory, np.array([0.25, 0.75])))


def test_weights_too_large_for_the_dtype_are_refused(tmp_path: Path) -> None:
    trajectory = written(tmp_path / "large.trajectory", *({"w": torch.tensor([1e5 * step, 1.0])} for step in (1, 2)))
    assert torch.isfinite(packed(trajectory, np.array([0.5, 0.5]), dtype="bfloat16")["w"]).all()
    with pytest.raises(TrajectoryError, match="'w' has values too large for float16: pass --dtype float32"):
        packed(trajectory, np.array([0.5, 0.5]), dtype="float16")


def test_small_numbers_stay_where_the_thread_flushes_them(tmp_path: Path) -> None:
    """A library built with -ffast-math, or a user, may have set the processor to take tiny numbers for zero."""
    tiny = (
        {"w": torch.tensor([1e-40 * step, 3e-39]), "v": torch.tensor(1e-310 * step, dtype=torch.float64)}
        for step in (1, 2)
    )
    trajectory = written(tmp_path / "tiny.trajectory", *tiny)
    expected = packed(trajectory, np.array([-0.5, 1.5]))
    assert expected["w"][0] > 0
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.set_flush_denormal, True).result()
        assert same_bits(pool.submit(packed, trajectory, np.array([-0.5, 1.5])).result(), expected)


FLOATS = st.floats(allow_nan=False, allow_infinity=False, width=64)


@hypothesis.given(st.lists(FLOATS, min_size=1, max_size=20), st.sampled_from(["bfloat16", "float16"]))
def test_sixteen_bits_are_rounded_once(values: list[float], dtype: str) -> None:
    """The nearest of the two neighbours, found with fractions; torch rounds to float32 first."""
    for value in values:
        try:
            got = cast({"w": torch.tensor([value], dtype=torch.float64)}, dtype)["w"][0]
        except TrajectoryError:  # too large
            assert abs(value) >= float(torch.finfo(getattr(torch, dtype)).max)
            continue
        low, high = (torch.nextafter(got, torch.tensor(end, dtype=got.dtype)) for end in (-np.inf, np.inf))
        exact = fractions.Fraction(value)
        own = abs(fractions.Fraction(float(got)) - exact)
        others = [abs(fractions.Fraction(float(x)) - exact) for x in (low, high) if torch.isfinite(x)]
        assert own <= min(others)
        if own in others:
            assert int(got.view(torch.int16)) % 2 == 0  # ties to even
