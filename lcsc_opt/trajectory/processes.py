"""What the processes of a sharded training tell each other while they write one row."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch.distributed

from lcsc_opt.base.errors import TrajectoryError

Result = TypeVar("Result")


class Processes:
    """The processes that write a trajectory together; without a group, this one alone.

    Each calls the same methods in the same order. All of them are one exchange of small messages, so processes that do
    different things notice it, and none waits for another for ever. An error in one process is raised in all.

    Args:
        group: their own group of ``torch.distributed``, which nothing else uses: rows are written in a thread.

    Attributes:
        is_alone: whether there is no group.
        rank: of this process.
        count: how many they are.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self.is_alone = group is None
        self.rank = 0
        self.count = 1
        if group is not None:
            self.rank = torch.distributed.get_rank(group)
            self.count = torch.distributed.get_world_size(group)

    @classmethod
    def of_training(cls) -> Processes:
        """All processes of ``torch.distributed``. Each of them has to call this.

        Raises:
            TrajectoryError: it is not initialized, or has no gloo.
        """
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            raise TrajectoryError(
                "sharded: torch.distributed is not initialized: call init_process_group first, or leave sharded out."
            )
        try:
            return cls(torch.distributed.new_group(backend="gloo"))
        except (RuntimeError, ValueError) as error:
            raise TrajectoryError(f"sharded: no group of processes with gloo ({_first_line(error)}).") from error

    @property
    def is_first(self) -> bool:
        """Whether this process names the rows."""
        return self.rank == 0

    def gathered(self, label: str, value: Any) -> list[Any]:
        """The values of all processes, by rank.

        Raises:
            TrajectoryError: a process has ended, or does something else than ``label``.
        """
        if self.is_alone:
            return [value]
        messages: list[Any] = [None] * self.count
        try:
            torch.distributed.all_gather_object(messages, (label, value), group=self._group)
        except (RuntimeError, ValueError) as error:
            raise TrajectoryError(
                f"Another process of this training has ended or does not answer ({_first_line(error)}): resume the "
                "training."
            ) from error
        labels = [label_there for label_there, _ in messages]
        for rank, label_there in enumerate(labels):
            if label_there != labels[0]:
                raise TrajectoryError(
                    f"The processes do different things (0: {labels[0]}; {rank}: {label_there}): call the writer's "
                    "methods in each process, in the same order and with the same steps."
                )
        return [value for _, value in messages]

    def agree(self, what: str, value: object) -> None:
        """Compare a value of each process.

        Raises:
            TrajectoryError: they are not the same; or as :meth:`gathered`.
        """
        values = self.gathered(what, value)
        if any(value_there != values[0] for value_there in values):
            raise TrajectoryError(f"The processes of this training have different values: {what}.")

    @contextlib.contextmanager
    def together(self, label: str) -> Iterator[None]:
        """Go on if all processes come to the end of the block, and raise an error in all if one does not."""
        if self.is_alone:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        self._raise_any(self.gathered(label, _message(error)), error)

    def first(self, label: str, function: Callable[[], Result]) -> Result:
        """Call ``function`` in the first process; gives its result, or raises its error, in all."""
        if self.is_alone:
            return function()
        error: Exception | None = None
        result: Result | None = None
        if self.is_first:
            try:
                result = function()
            except Exception as raised:
                error = raised
        answers = self.gathered(label, (_message(error), result))
        self._raise_any([message for message, _ in answers], error)
        answer: Result = answers[0][1]
        return answer

    def _raise_any(self, messages: list[str | None], error: Exception | None) -> None:
        if error is not None:
            raise error
        for message in messages:
            if message is not None:
                raise TrajectoryError(message)


def _message(error: Exception | None) -> str | None:
    if error is None:
        return None
    return str(error) or type(error).__name__


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]
