"""State dicts in memory → a packed trajectory, named by the hash of their steps and weights."""

from __future__ import annotations

import contextlib
import hashlib
import operator
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.files import only_process
from lcsc_opt.checkpoints.weights import weights_sha256
from lcsc_opt.trajectory.cached import packed_path
from lcsc_opt.trajectory.filling import finish_packing, partial_path
from lcsc_opt.trajectory.layout import Layout
from lcsc_opt.trajectory.matrix import MatrixWriter

StateDicts = Mapping[int, Mapping[str, Tensor]]
"""Training step → state dict, in the order of the steps."""


def pack_state_dicts(states: StateDicts, folder: Path) -> Path:
    """Pack state dicts unless that is done. The same steps and weights are the same trajectory.

    Args:
        states: at least two, of one model.
        folder: for packed checkpoints.

    Returns:
        The path of the packed trajectory. It stays, like all packed trajectories, until it is deleted.

    Raises:
        TrajectoryError: they are of different models, or one memory was saved several times; or the disk refuses.
    """
    check_state_dicts(states)
    digest = hashlib.sha256()
    for step, weights in states.items():
        digest.update(f"{step} {weights_sha256(weights)}\n".encode())
    fingerprint = digest.hexdigest()
    out = packed_path(folder, fingerprint)
    with only_process(out, busy=f"another process packs the same checkpoints to {out}: waiting"):
        if out.exists():
            return out
        partial = partial_path(out)
        if partial.exists():  # of a process that was killed
            shutil.rmtree(partial)
        try:
            with contextlib.closing(MatrixWriter(partial)) as writer:
                for step, weights in states.items():
                    writer.write(step, _layout(writer, step, weights), weights)
                writer.commit()
            finish_packing(out)
        except TrajectoryError:
            shutil.rmtree(partial, ignore_errors=True)  # which no later call could continue
            raise
    return out


def listed(checkpoints: Any) -> Any:
    """Checkpoints that can be gone through several times: of a generator, a list."""
    if isinstance(checkpoints, (Mapping, Sequence)) or not isinstance(checkpoints, Iterable):
        return checkpoints
    return list(checkpoints)


def by_step(checkpoints: Any) -> StateDicts | None:
    """``{step: state_dict}``, or a list of state dicts with the steps 1, 2, …; ``None`` for paths and patterns.

    Raises:
        TrajectoryError: it is neither.
    """
    if isinstance(checkpoints, (str, Path)):
        return None
    if isinstance(checkpoints, Mapping):
        if not checkpoints:
            raise TrajectoryError("checkpoints: expected {step: state_dict, …}, got none.")
        return dict(sorted((_step(step, state), state) for step, state in checkpoints.items()))
    if not isinstance(checkpoints, Iterable):
        raise TrajectoryError(f"checkpoints: expected paths or state dicts, got {type(checkpoints).__name__}.")
    given_checkpoints = list(checkpoints)
    if not given_checkpoints:
        raise TrajectoryError("checkpoints: expected paths or state dicts; the list is empty.")
    if all(isinstance(state, Mapping) for state in given_checkpoints):
        return dict(enumerate(given_checkpoints, start=1))
    if all(isinstance(path, (str, Path)) for path in given_checkpoints):
        return None
    kinds = sorted({type(checkpoint).__name__ for checkpoint in given_checkpoints})
    advice = ""
    if any(isinstance(checkpoint, nn.Module) for checkpoint in given_checkpoints):
        advice = "; of a network, give its state_dict()"
    raise TrajectoryError(f"checkpoints: expected paths or state dicts, got a list of {' and '.join(kinds)}{advice}.")


def _step(step: Any, state: Any) -> int:
    """A key of ``{step: state_dict}`` as a whole number, of NumPy too."""
    if isinstance(state, Mapping) and not isinstance(step, bool):
        with contextlib.suppress(TypeError):
            return operator.index(step)
    raise TrajectoryError("checkpoints: expected {step: state_dict, …}, with whole numbers as steps.")


def check_state_dicts(states: StateDicts) -> None:
    """Refuse fewer than two state dicts, several that share their memory, and weights that are not finite.

    Raises:
        TrajectoryError: one line that says what to do.
    """
    if len(states) < 2:
        raise TrajectoryError(f"checkpoints: got {len(states)} state dict, and a combination needs at least 2.")
    memories: dict[tuple[int, ...], int] = {}
    for step, weights in states.items():
        _check_tensors(step, weights)
        memory = tuple(tensor.data_ptr() for tensor in weights.values())
        if memory in memories:
            raise TrajectoryError(
                f"checkpoints: the state dicts of the steps {memories[memory]} and {step} are one memory, so they hold "
                "the same weights: keep copies, as copy.deepcopy(net.state_dict())."
            )
        memories[memory] = step


def _check_tensors(step: int, weights: Mapping[str, Any]) -> None:
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            advice = ""
            if isinstance(value, Mapping):
                advice = f" If it is the state dict itself, give state[{name!r}]."
            raise TrajectoryError(
                f"checkpoints: the state dict of step {step}: {name} is a {kind}, not a tensor.{advice}"
            )


def _layout(writer: MatrixWriter, step: int, weights: Mapping[str, Tensor]) -> Layout:
    try:
        return writer.check(weights)
    except TrajectoryError as error:
        raise TrajectoryError(f"checkpoints: the state dict of step {step}: {error}") from error
