"""Saving a trajectory from other people's training loops: Lightning and Accelerate.

Each saves on one process only. When training continues from a checkpoint older than the last row, it drops the
later rows. It makes sure that the trajectory on the disk is never behind the training's own checkpoints.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.trajectory.writer import TrajectoryWriter

Weights = Callable[[Any], "nn.Module | Mapping[str, Tensor]"]


class TrajectorySaver:
    """The common part of the callbacks. In a loop of your own, with Accelerate, use it directly.

    ::

        saver = TrajectorySaver("run.trajectory", every=100, accelerator=accelerator)
        accelerator.load_state(...)  # to continue; the saver goes back to the saved step
        for step in ...:
            ...
            saver.step(step, ema_model)
        saver.close()

    Args:
        path: the path of the trajectory.
        every: save once in so many steps.
        accelerator: an ``accelerate.Accelerator``. Its main process saves, its wrappers are removed from the model, and
            its ``save_state`` and ``load_state`` keep the step.
        resume: ``restart`` lets a training that starts from step 0 drop the rows of an earlier one, such as a job that
            was killed before its first saved state and queued again.
        options: further arguments of :class:`TrajectoryWriter`.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        every: int,
        accelerator: Any = None,
        resume: Literal["restart"] | None = None,
        **options: Any,
    ) -> None:
        self._path = Path(path)
        self.saves = accelerator is None or bool(accelerator.is_main_process)
        self._options = {"every": every, **options}
        self._restarts = resume == "restart"
        self._accelerator = accelerator
        self._writer: TrajectoryWriter | None = None
        self._last_step = 0
        if accelerator is not None:
            accelerator.register_for_checkpointing(self)

    def begin(self, step: int) -> None:
        """Begin or continue training after ``step``; 0 is its start.

        Rows of later steps are dropped, since training makes them again. At the start rows are those of another
        training: they are dropped only with ``resume="restart"``, else they are refused.

        Raises:
            TrajectoryError: training starts, and the trajectory already holds rows of another training.
        """
        self.close()  # the writer of a training that began before a state was loaded
        self._last_step = step
        if not self.saves:
            return
        refuses_rows = step == 0 and not self._restarts
        writer = TrajectoryWriter(self._path, **self._options, resume=None if refuses_rows else step)
        if refuses_rows and writer.steps:
            writer.close()
            raise TrajectoryError(
                f"{self._path}: holds {len(writer.steps)} checkpoints of another training, and this one starts: name "
                'another path, remove it, or let the saver drop them with resume="restart"'
            )
        self._writer = writer

    def step(self, step: int, weights: nn.Module | Mapping[str, Tensor]) -> None:
        """Save the weights after ``step``, in the background, if it is the first at or after a multiple of ``every``.

        The first call begins a training from its start, unless :meth:`begin` was called.

        Raises:
            TrajectoryError: the weights cannot be saved.
        """
        if self._writer is None and self.saves:
            self.begin(0)
        # several batches have one step where gradients are accumulated
        if self._writer is not None and step != self._last_step:
            if self._accelerator is not None and isinstance(weights, nn.Module):
                weights = self._accelerator.unwrap_model(weights)
            self._writer.append(step, weights, wait=False)
        self._last_step = step

    def keep_start(self, weights: nn.Module | Mapping[str, Tensor]) -> None:
        """After :meth:`begin`, save the weights that a tuning begins with as the checkpoint of step 0."""
        if self._writer is not None:
            self._writer.append(0, weights, wait=False)

    def flush(self) -> None:
        """Wait until all rows are on the disk."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Flush, then let other processes write."""
        writer = self._writer
        self._writer = None  # also if closing raises an error: a second call does nothing
        if writer is not None:
            writer.close()

    def state_dict(self) -> dict[str, Any]:
        """The state for the training's own checkpoint. Waits until all rows are on the disk."""
        self.flush()
        return {"step": self._last_step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to the step of the training's checkpoint."""
        self.begin(int(state["step"]))


def lightning_callback(path: str | Path, *, every: int, weights: Weights | None = None, **options: Any) -> Any:
    """A callback for ``Trainer(callbacks=[...])`` of Lightning; steps are ``trainer.global_step``.

    Args:
        path: the path of the trajectory.
        every: save once in so many steps.
        weights: ``LightningModule`` → the weights to save, such as its EMA; ``None`` saves the whole module.
        options: further arguments of :class:`TrajectorySaver`.

    Raises:
        TrajectoryError: Lightning is not installed.
    """
    base: Any = _lightning_callback_class()

    class Callback(base):  # type: ignore[misc]
        """Saves on rank 0."""

        saver = TrajectorySaver(path, every=every, **options)

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
            self.saver.saves = bool(trainer.is_global_zero)  # the trainer has started its processes by now
            self.saver.begin(int(trainer.global_step))

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            self.saver.step(int(trainer.global_step), pl_module if weights is None else weights(pl_module))

        def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:  # noqa: ARG002
            self.saver.flush()

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
            self.saver.close()

        # then Lightning does not call on_train_end, and another trainer of this process could not write
        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:  # noqa: ARG002
            self.saver.close()

    return Callback()


def _lightning_callback_class() -> Any:
    """Lightning's base class of callbacks, from whichever of its two packages is installed."""
    for name in ("lightning.pytorch", "pytorch_lightning"):  # its present name and its old one
        with contextlib.suppress(ImportError):
            return importlib.import_module(name).Callback
    raise TrajectoryError("Lightning cannot be imported: pip install lightning")
