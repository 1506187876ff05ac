"""The means of a training that is running: the open one, those on the disk, and what a resumed training needs."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.progress import notice
from lcsc_opt.checkpoints.weights import difference
from lcsc_opt.coefficients.rows import Row
from lcsc_opt.trajectory.layout import Layout
from lcsc_opt.trajectory.manifest import TRAINING
from lcsc_opt.trajectory.matrix import MatrixWriter
from lcsc_opt.trajectory.means import Interval, RunningMean
from lcsc_opt.trajectory.windows import Windows, pair_to_merge

_MOST_MERGES = 2  # after a row: one more than keeps their number, and never many at once


class MeansOfTraining:
    """Adds checkpoints to the open mean, and writes means as rows. The caller keeps other calls out meanwhile.

    A pair of rows is merged only if no state from which the training may be resumed lies before its end: these are the
    last state that was given out, and the one before, since the last may not be on the disk.

    Args:
        saver: writes the rows.
        means: the most full windows.
        device: of the open mean; ``None`` is that of the weights.

    Attributes:
        windows: which checkpoints were added.
    """

    def __init__(self, saver: MatrixWriter, means: int, device: torch.device | str | None) -> None:
        self.windows = Windows(means)
        self._saver = saver
        self._device: torch.device | None = None
        if device is not None:
            self._device = torch.device(device)
        self._mean: RunningMean | None = None
        self._loaded: dict[str, Tensor] = {}  # a mean of the training's state, until the first checkpoint comes
        self._loaded_before: dict[str, Tensor] = {}
        self._last_bits: list[Tensor] = []  # of the last checkpoint that was added
        self._training = ""
        self._needed_from: list[int] = []  # the first steps of the open means of the last two states
        self._state_additions = -1  # of the last state
        self._is_finished = False
        self._is_broken = False

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The open mean."""
        if self._mean is None:
            return self._loaded
        return self._mean.tensors

    def check_step(self, step: int) -> None:
        """Refuse a step that cannot be the next one.

        Raises:
            TrajectoryError: it is not larger than the last one; or the rows are not those of this training.
        """
        path = self._saver.path
        if self._is_broken:
            raise TrajectoryError(f"{path}: an earlier mean could not be written: resume from the training's state.")
        if self._is_finished:
            raise TrajectoryError(f"{path}: the training is finished: open a new writer and load the training's state.")
        self._saver.check_kind(means=True)
        self._begin()
        if step < self.windows.last:
            raise TrajectoryError(
                f"Step {step} comes after step {self.windows.last}; steps have to increase: load the training's state "
                "to continue from an earlier step."
            )

    def begins_another(self, step: int, layout: Layout) -> bool:
        """Whether the open mean is complete before ``step`` is added.

        Raises:
            TrajectoryError: the step was added already, or the mean of the training's state is of another model.
        """
        if step == self.windows.last:
            raise TrajectoryError(f"Step {step} was added already; steps have to increase.")
        self._open(layout)
        return self.windows.is_full

    def add(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Add the next checkpoint, to the open mean or to a new one."""
        assert self._mean is not None  # see begins_another
        if self.windows.is_full:
            self._mean.clear()
        self._mean.add(tensors)
        self._last_bits = self._mean.bit_sums(tensors)
        self.windows.add(step)

    def _begin(self) -> None:
        """Give the training its name, by which the rows and a state are told to be of it.

        Raises:
            TrajectoryError: there are rows, and no state says that they are of this training.
        """
        if self._training:
            return
        if self._saver.steps:
            raise TrajectoryError(
                f"{self._saver.path} holds means already: load the training's state with load_state_dict, or begin "
                "again with resume=0."
            )
        self._training = secrets.token_hex(8)
        self._saver.add_metadata(TRAINING, self._training)

    def _open(self, layout: Layout) -> RunningMean:
        """The open mean, with what was loaded."""
        if self._mean is None:
            mean = RunningMean(layout, dtype=torch.float32, device=self._device)
            if self._loaded:
                differs = difference(self._loaded, layout.shapes)
                if differs is not None:
                    raise TrajectoryError(f"The mean of the training's state does not fit the model: it {differs}.")
                mean.load(self._loaded, self._loaded_before, self.windows.count)
            self._mean = mean
            self._loaded = {}
            self._loaded_before = {}
        return self._mean

    def write(self, layout: Layout, tensors: Mapping[str, Tensor], interval: Interval) -> None:
        """Write a complete mean, and merge pairs of rows that have become one window.

        Raises:
            TrajectoryError: a weight is not finite, or the disk refuses. No further mean can then be written.
        """
        try:
            self._saver.write(Row(interval.last_step), layout, tensors, interval=interval)
            self._saver.commit()
            self._merge(_MOST_MERGES, state=0)
        except BaseException:
            self._is_broken = True
            raise

    def finish(self, step: int, layout: Layout, tensors: Mapping[str, Tensor]) -> None:
        """Write the open mean without the checkpoint of ``step``, and this checkpoint as a row of its own.

        Weights that are not those that were added at ``step`` cannot be taken out of the mean: they are saved as those
        of the next step. The last state is on the disk if the training went on after it, so pairs before it are merged.
        """
        mean = self._open(layout)
        self._merge(None, state=-1)
        first, last, count = self.windows.interval
        averaged: Mapping[str, Tensor] = mean.tensors
        if step == last and not self._was_added_last(mean, tensors):
            step += 1
            notice(f"{self._saver.path}: step {last} was added with other weights: these are saved as step {step}")
        elif step == last:
            last = self.windows.before_last
            count -= 1
            if count:
                averaged = mean.without(tensors)
        if count:
            self._saver.write(Row(last), layout, averaged, interval=Interval(first, last, count))
            self._saver.commit()
        self._saver.write(Row(step), layout, tensors, interval=Interval(step, step, 1))
        self._saver.commit()
        self._is_finished = True

    def _was_added_last(self, mean: RunningMean, tensors: Mapping[str, Tensor]) -> bool:
        """Whether these are the weights that were added last."""
        if not self._last_bits:  # the training's state is of an older version
            return True
        return list(map(int, mean.bit_sums(tensors))) == list(map(int, self._last_bits))

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` takes: numbers, texts, and tensors on the CPU."""
        self._begin()
        is_another = self._state_additions != self.windows.additions  # one state may be asked for twice
        if is_another:
            self._needed_from = [*self._needed_from[-1:], self.windows.first]
            self._state_additions = self.windows.additions
        copied_before = self._loaded_before
        if self._mean is not None:
            copied_before = self._mean.copied_before
        return {
            "training": self._training,
            "windows": self.windows.state(),
            "mean": _on_cpu(self.tensors),
            "copied_before": _on_cpu(copied_before),
            "last_bits": [bits.cpu() for bits in self._last_bits],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> int:
        """Continue from a state; gives how many later rows were dropped.

        Raises:
            TrajectoryError: this is no such state, or that of another training or of other ``means``, or rows were
                merged since.
        """
        windows, last_step = self._checked(state)
        training = str(state["training"])
        dropped = self._saver.truncate(last_step)
        self.windows = windows
        self._loaded = dict(state["mean"])
        self._loaded_before = dict(state.get("copied_before", {}))
        self._last_bits = list(state.get("last_bits", []))
        self._training = training
        self._saver.add_metadata(TRAINING, training)
        self._needed_from = [windows.first]
        self._state_additions = windows.additions
        return dropped

    def _checked(self, state: Mapping[str, Any]) -> tuple[Windows, int]:
        """The windows of a state, and the step of the last row before its open mean; -1 if there is none."""
        path = self._saver.path
        if self.windows.additions:
            raise TrajectoryError(f"{path}: checkpoints were added already: load the state before the first step.")
        if not isinstance(state, Mapping) or not state.keys() >= {"training", "windows", "mean"}:
            raise TrajectoryError(f"{path}: the state has no mean: load what the writer's state_dict() gave.")
        windows = Windows.of_state(state["windows"])
        mean = state["mean"]
        if not isinstance(mean, Mapping) or (windows.count > 0 and not mean):
            raise TrajectoryError(f"{path}: the state lacks its mean of {windows.count} checkpoints: save all of it.")
        if windows.means != self.windows.means:
            raise TrajectoryError(f"{path}: the training began with means={windows.means}: resume it with the same.")
        self._saver.check_kind(means=True)
        training = str(state["training"])
        if self._saver.steps and self._saver.metadata.get(TRAINING) != training:
            raise TrajectoryError(
                f"{path} holds the means of another training than the state: name its trajectory, or begin again with "
                "resume=0."
            )
        closed = [interval for interval in self._saver.intervals if interval.last_step < windows.first]
        if sum(interval.checkpoints for interval in closed) != windows.closed:
            raise TrajectoryError(
                f"{path} does not hold the means before step {windows.first} of the state: resume from a later state, "
                "or begin again with resume=0."
            )
        last_step = -1  # drops all
        if closed:
            _, last_step, _ = closed[-1]
        return windows, last_step

    def _merge(self, most: int | None, *, state: int) -> None:
        """Merge up to ``most`` pairs of rows that are one window, and lie before the open mean of a state."""
        before = math.inf
        if self._needed_from:
            before = self._needed_from[state]
        merged = 0
        while most is None or merged < most:
            row = pair_to_merge(self._saver.intervals, self.windows.size, before)
            if row is None:
                return
            self._saver.merge_pair(row)
            merged += 1


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies, which later steps do not change."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
