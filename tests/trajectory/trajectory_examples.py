from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lcsc_opt.checkpoints.finding import Patterns, as_patterns
from lcsc_opt.trajectory import Trajectory, TrajectoryWriter
from lcsc_opt.trajectory.packing import open_request
from lcsc_opt.trajectory.sources import PackRequest

STEPS = (100, 200, 300, 400, 500)
COMBINED = ("weight", "bias", "scale", "double", "bfloat", "half")


def state_dict(step: int) -> dict[str, Tensor]:
    """Every kind of tensor a model can have; all but ``constant`` and ``flags`` change with the step."""
    return {name: tensor.clone() for name, tensor in _drawn(step).items()}


@functools.cache
def _drawn(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    weight = normal(37, 25)
    weight[0, 0] = -0.0
    return {
        "weight": weight,
        "bias": normal(3),
        "scale": normal(),
        "nothing": torch.empty(0, 4),
        "double": normal(600, dtype=torch.float64),
        "bfloat": normal(900, dtype=torch.bfloat16),
        "half": normal(30, 30, dtype=torch.float16),
        "constant": torch.tensor([0.1, -0.0, 1e-40]),
        "batches": torch.tensor(step),
        "flags": torch.tensor([True, False]),
        "index": torch.arange(3, dtype=torch.int16) + step,
    }


def append(path: Path, *steps: int, weights: Callable[[int], Any] = state_dict, **options: Any) -> Any:
    with TrajectoryWriter(path, **options) as writer:
        return [writer.append(step, weights(step)) for step in steps]


def make_trajectory(path: Path, steps: Iterable[int] = STEPS, **options: Any) -> Trajectory:
    append(path, *steps, **options)
    return Trajectory.open(path)


def open_or_pack(patterns: Patterns, folder: Path, **options: Any) -> Trajectory:
    """The packed trajectory of checkpoints, in ``folder``; the ``options`` are those of a request."""
    return open_request(PackRequest(as_patterns(patterns), folder, **options))


def assert_whole(path: Path, steps: Iterable[int]) -> None:
    """The trajectory holds exactly these checkpoints, each as it was given."""
    trajectory = Trajectory.open(path)
    trajectory.verify()
    assert trajectory.steps == tuple(steps)
    for index, step in enumerate(trajectory.steps):
        assert same_bits(trajectory.checkpoint(index), state_dict(step))


def interrupt(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, count: int, error: BaseException) -> None:
    """Make the ``count``-th call of ``owner.<name>`` fail; an ``os.write`` has written half of its bytes."""
    plain = getattr(owner, name)
    calls = itertools.count(1)

    def call(*arguments: Any, **options: Any) -> Any:
        if next(calls) == count:
            if name == "write":
                plain(arguments[0], arguments[1][: len(arguments[1]) // 2])
            raise error
        return plain(*arguments, **options)

    monkeypatch.setattr(owner, name, call)


def same_bits(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Whether names, dtypes, shapes and all bits are the same."""
    if tensors.keys() != expected.keys():
        return False
    for name, tensor in tensors.items():
        if (tensor.dtype, tensor.shape) != (expected[name].dtype, expected[name].shape):
            return False
        if bits(tensor) != bits(expected[name]):
            return False
    return True


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
