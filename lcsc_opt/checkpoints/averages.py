"""Averages that are saved as a list without names, as score_sde, torch-ema and diffusers' ``EMAModel`` do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lcsc_opt.checkpoints.contents import Refused, is_tensor

MAX_SKIPPED = 50  # entries of a state dict that an average may lack
MAX_TENSORS = 20_000
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def name_averages(averages: Sequence[Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """Name → average: match the list with the model's state dict, in order and by shape.

    Args:
        averages: one tensor per trained parameter, in the order of ``model.parameters()``.
        model: the state dict, which has buffers in between.

    Raises:
        Refused: there is no way to match them, or more than one.
    """
    names = [name for name in model if name.rpartition(".")[2] not in STATISTICS]
    skipped = len(names) - len(averages)
    if not 0 <= skipped <= MAX_SKIPPED or len(names) > MAX_TENSORS or not all(map(is_tensor, averages)):
        raise Refused(_ambiguous(len(averages), len(model)))
    shapes = [tuple(model[name].shape) for name in names]
    ways = _count_ways([tuple(tensor.shape) for tensor in averages], shapes, skipped)
    if ways[0][0] != 1:
        raise Refused(_ambiguous(len(averages), len(model)))
    found = {}
    gap = 0
    for index, tensor in enumerate(averages):
        while shapes[index + gap] != tuple(tensor.shape) or ways[index + 1][gap] == 0:
            gap += 1
        found[names[index + gap]] = tensor
    return found


def _count_ways(short: list[Any], long: list[Any], skipped: int) -> list[list[int]]:
    """``ways[i][g]``: in how many ways ``short[i:]`` matches parts of ``long[i + g:]`` in order, counted up to 2."""
    ways = [[1] * (skipped + 1)]
    for index in reversed(range(len(short))):
        row = [0] * (skipped + 1)
        for gap in reversed(range(skipped + 1)):
            here = ways[-1][gap] if short[index] == long[index + gap] else 0
            later = row[gap + 1] if gap < skipped else 0
            row[gap] = min(here + later, 2)
        ways.append(row)
    return ways[::-1]


def _ambiguous(averages: int, names: int) -> str:
    return (
        f"holds {averages} averages without names, which do not fit the model's {names} in exactly one way: "
        "save a state dict of them, or take the raw weights with --key model."
    )
