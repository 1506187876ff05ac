"""The gradient in the coefficients from the gradient in the merged weights, streamed like a merge.

With theta = Σ a_i theta_i, dF/da_i = ⟨theta_i, dF/dtheta⟩.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.weights import difference, shapes_of
from lcsc_opt.trajectory.disk.layout import Segment, TensorSpec
from lcsc_opt.trajectory.disk.rows import SlotRanges
from lcsc_opt.trajectory.disk.tiles import Tile, accumulator

TILE_BYTES = 4 * 2**20  # of all rows together; larger ones leave the cache between the two steps of a tile


def check_gradients(gradients: Mapping[str, Tensor], specs: Collection[TensorSpec]) -> None:
    """Compare gradients with the tensors of a trajectory, by name.

    Raises:
        TrajectoryError: a name that the trajectory lacks, or another shape.
    """
    expected = {spec.name: spec.shape for spec in specs}
    if (differs := difference(expected | shapes_of(gradients), expected)) is not None:  # not all need have one
        raise TrajectoryError(f"The gradients do not fit the trajectory: their model {differs}. Use its own names.")


def flatten(gradients: Mapping[str, Tensor], segment: Segment, device: torch.device) -> Tensor | None:
    """The gradients of a segment's tensors in the order of its columns, ``[n]`` on the device; those not given are 0.

    ``None`` where none of its tensors has one.
    """
    if not any(spec.name in gradients for spec in segment.tensors):
        return None
    dtype = accumulator(segment.dtype, device)
    parts = [
        gradients[spec.name].detach().to(device, dtype).reshape(-1)
        if spec.name in gradients
        else torch.zeros(spec.numel, dtype=dtype, device=device)
        for spec in segment.tensors
    ]
    return torch.cat(parts)


def project_tiles(tiles: Iterable[Tile], gradient: Tensor, slots: SlotRanges) -> Tensor:
    """⟨row, gradient⟩ for the rows in these slots: ``[slots]`` float64, zero for other slots.

    The differences of the rows from one of them are projected, and that one in float64: checkpoints are much closer to
    each other than to zero, and what they have in common would cost the digits in which they differ.

    Args:
        tiles: of one segment, at most ``TILE_BYTES`` each on the CPU.
        gradient: ``[n]`` for its columns, of the accumulator's dtype, on the device of the tiles.
        slots: of the rows that hold checkpoints.
    """
    dtype, device = gradient.dtype, gradient.device
    common = torch.zeros((), dtype=torch.float64, device=device)
    projected = torch.zeros(slots[-1][1], dtype=torch.float64, device=device)
    for tile in tiles:
        own = gradient[tile.start : tile.stop]
        origin = tile.read(slots[0][0], slots[0][0] + 1, dtype)[0][0] if tile.origin is None else tile.origin.to(dtype)
        common += origin.double() @ own.double()
        for first, last in slots:
            rows, scales = tile.read(first, last, dtype)
            products = ((rows if tile.origin is not None else rows - origin) @ own).double()
            projected[first:last] += products if scales is None else products * scales
    for first, last in slots:
        projected[first:last] += common
    return projected
