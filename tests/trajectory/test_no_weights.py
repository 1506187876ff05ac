"""Tensors in checkpoints that are no weights: refused, or copied from one checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.trajectory import Trajectory, pack


def packed(folder: Path, *states: dict[str, Tensor]) -> Trajectory:
    for step, state in enumerate(states, start=1):
        torch.save(state, folder / f"m_{step}.pt")
    return pack(folder, folder / "run.trajectory")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn])
def test_quantized_weights_that_change_are_refused(tmp_path, dtype):
    """As bitsandbytes, GPTQ and others save them, beside their scales."""
    states = [{"fc.weight": torch.full((2, 2), step).to(dtype), "fc.SCB": torch.ones(2) * step} for step in (1, 2)]
    with pytest.raises(TrajectoryError, match=r"'fc.weight' is \w+ and changes between.*quantized weights dequantized"):
        packed(tmp_path, *states)


@pytest.mark.parametrize(
    "constant",
    [
        *(torch.full((3, 3), infinity).triu(1) for infinity in (float("-inf"), float("inf"))),
        torch.ones(2, 2, dtype=torch.int32),
    ],
    ids=["a mask", "a mask of plus infinity", "positions"],
)
def test_infinity_and_integers_that_stay_are_copied(tmp_path, constant):
    trajectory = packed(tmp_path, *({"w": torch.full((2,), step), "kept": constant} for step in (1.0, 2.0, 3.0)))
    merged = trajectory.merge([0.5, 0.25, 0.25])
    assert merged["kept"].equal(constant)
    assert merged["w"].tolist() == [1.75, 1.75]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ((float("nan"), float("nan")), "'w' at step 1 holds NaN or infinity"),
        ((float("inf"), 1.0), "'w' holds infinity up to step 1 and has other values now"),
        ((float("inf"), float("inf"), 1.0), "'w' holds infinity up to step 2 and has other values now"),
    ],
)
def test_infinity_that_changes_and_every_nan_are_refused(tmp_path, values, said):
    with pytest.raises(TrajectoryError, match=said):
        packed(tmp_path, *({"w": torch.tensor([value, 2.0])} for value in values))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("normalize", [spectral_norm, parametrizations.spectral_norm])
def test_singular_vectors_of_spectral_norm_come_from_one_checkpoint(tmp_path, normalize):
    net = nn.Sequential(normalize(nn.Linear(4, 3)), nn.Linear(3, 1))
    states = []
    for _ in range(2):
        net.train()
        nn.init.normal_(next(parameter for parameter in net.parameters() if parameter.dim() == 2))
        net(torch.randn(8, 4))
        states.append({name: tensor.clone() for name, tensor in net.state_dict().items()})
    vectors = [name for name in states[0] if name.endswith(("_u", "_v"))]
    assert len(vectors) == 2
    merged = packed(tmp_path, *states).merge([0.4, 0.6])
    for name, tensor in merged.items():
        assert tensor.equal(states[1][name]) == (name in vectors or states[0][name].equal(states[1][name]))
