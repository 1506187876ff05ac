"""State dicts in memory → a packed trajectory, named by the hash of their steps and weights."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import operator
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.weights import weights_sha256
from lcsc_opt.trajectory.filling import finish_packing, made_once, partial_path
from lcsc_opt.trajectory.layout import Layout
from lcsc_opt.trajectory.matrix import MatrixWriter
from lcsc_opt.trajectory.sources import path_of_packed

StateDicts = Mapping[int, Mapping[str, Tensor]]
"""Training step → state dict, in the order of the steps."""

_EXPECTED = "checkpoints: expected paths, or state dicts in a list or as {step: state_dict, …} with whole numbers"


def pack_state_dicts(states: StateDicts, folder: Path) -> Path:
    """Pack state dicts unless that is done. The same steps and weights are the same trajectory.

    Args:
        states: at least two, of one model.
        folder: for packed checkpoints.

    Returns:
        The path of the packed trajectory. It stays, like all packed trajectories, until it is deleted.

    Raises:
        TrajectoryError: fewer than two, of different models, or two of the same weights; or the disk refuses.
    """
    if len(states) < 2:
        raise TrajectoryError(f"checkpoints: got {len(states)} state dict, and a combination needs at least 2.")
    digests: dict[int, str] = {}
    for step, weights in states.items():
        with _naming(step):
            Layout.of(weights)  # refuses what has no bytes to hash
        digests[step] = weights_sha256(weights)
    _check_distinct(digests)
    digest = hashlib.sha256("".join(f"{step} {sha256}\n" for step, sha256 in digests.items()).encode())
    out = path_of_packed(folder, digest.hexdigest())
    made_once(out, functools.partial(_write, states, out))
    return out


def _check_distinct(digests: Mapping[int, str]) -> None:
    """Refuse two steps with the same weights. If all are the same, the search says so, and what that means.

    Args:
        digests: step → SHA-256 of its weights.
    """
    step_of: dict[str, int] = {}
    for step, sha256 in digests.items():
        first = step_of.setdefault(sha256, step)
        if first != step and len(set(digests.values())) > 1:
            raise TrajectoryError(
                f"checkpoints: steps {first} and {step} hold the same weights: keep copies of what training goes on to "
                "change (copy.deepcopy(network.state_dict())), or leave one out."
            )


def _write(states: StateDicts, out: Path) -> None:
    """Write the packed trajectory ``out``, which gets its name when it is complete."""
    partial = partial_path(out)
    if partial.exists():  # of a process that was killed
        shutil.rmtree(partial)
    try:
        with contextlib.closing(MatrixWriter(partial)) as writer:
            row: Tensor | None = None
            for step, weights in states.items():
                with _naming(step):
                    layout = writer.check(weights)
                row = layout.row_of(weights, memory=row)
                writer.write(step, layout, row)
            writer.commit()
        finish_packing(out)
    except TrajectoryError:
        shutil.rmtree(partial, ignore_errors=True)  # which no later call could continue
        raise


def repeatable(checkpoints: Any) -> Any:
    """The same checkpoints, or a list of those that a generator gives: they are gone through more than once."""
    if isinstance(checkpoints, (Mapping, Sequence)) or not isinstance(checkpoints, Iterable):
        return checkpoints
    return list(checkpoints)


def by_step(checkpoints: Any) -> StateDicts | None:
    """State dicts by their steps; ``None`` for paths and patterns.

    Args:
        checkpoints: ``{step: state_dict}``, or a list of state dicts, whose steps are 1, 2, …; or a path, or several.

    Raises:
        TrajectoryError: it is none of these.
    """
    if isinstance(checkpoints, (str, Path)):
        return None
    if isinstance(checkpoints, Sequence):
        if checkpoints and all(isinstance(path, (str, Path)) for path in checkpoints):
            return None
        checkpoints = dict(enumerate(checkpoints, start=1))
    if not isinstance(checkpoints, Mapping) or not checkpoints:
        raise TrajectoryError(f"{_EXPECTED}, got {type(checkpoints).__name__ if checkpoints else 'none'}.")
    states: dict[int, Mapping[str, Tensor]] = {}
    for step, state in checkpoints.items():
        if not isinstance(state, Mapping):
            raise TrajectoryError(f"{_EXPECTED}, got a {type(state).__name__}; of a network, give its state_dict().")
        if not hasattr(step, "__index__") or isinstance(step, bool):
            raise TrajectoryError(f"{_EXPECTED}, got the step {step!r}.")
        states[operator.index(step)] = state
    return dict(sorted(states.items()))


@contextlib.contextmanager
def _naming(step: int) -> Iterator[None]:
    """An error while this is open begins with the state dict of which it is."""
    try:
        yield
    except TrajectoryError as error:
        raise TrajectoryError(f"checkpoints: the state dict of step {step}: {error}") from error
