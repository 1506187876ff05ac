"""Saving checkpoints into a packed trajectory while a model trains."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor, nn

from lcsc_opt.base.accelerator import asynchronous, recorded, wait_for
from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.progress import notice
from lcsc_opt.checkpoints.reading import weights_of_module
from lcsc_opt.checkpoints.weights import check_weights
from lcsc_opt.trajectory.background import Background
from lcsc_opt.trajectory.layout import Layout
from lcsc_opt.trajectory.matrix import MatrixWriter, whole_step


class TrajectoryWriter:
    """Appends checkpoints to the trajectory at ``path``, which is made or continued.

    In a training loop::

        with TrajectoryWriter("run.trajectory", every=100) as writer:
            for step in range(1, steps + 1):
                train_step()
                writer.append(step, model, wait=False)  # copies the weights; the rest happens in the background

    A checkpoint becomes visible to readers when all its bytes are on the disk, by one atomic replacement of the
    manifest. So the trajectory holds only whole checkpoints, whenever the process dies. With ``keep_last``, one spare
    row is kept, so that the oldest checkpoint stays until the new one is complete. Only one thread of one process may
    write at a time. A script that ends without closing its writer loses nothing.

    Args:
        path: the folder, by convention ``NAME.trajectory``.
        every: save once in each interval of so many steps: at its end, or at the first step after it. So no checkpoint
            is missing where steps are counted in images, or by two optimizers.
        keep_last: keep this many last checkpoints; ``None`` keeps all.
        metadata: texts to add to the manifest.
        dtype: ``exact`` keeps every bit of the weights; ``float16`` and ``bfloat16`` round floating-point weights,
            which are read and merged in float32. ``None`` is the dtype that the trajectory began with; ``exact`` for a
            new one.
        resume: the step that training continues from. Later checkpoints are dropped, all at once, and a notice says
            so: training may reach their steps again with other weights.

    Raises:
        TrajectoryError: the dtype is none of these, or the trajectory began with another; the folder holds something
            else, cannot be written, or another process writes to it.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        every: int = 1,
        keep_last: int | None = None,
        metadata: Mapping[str, str] | None = None,
        dtype: str | None = None,
        resume: int | None = None,
    ) -> None:
        self.path = Path(path)
        for name, value in (("every", every), ("keep_last", 1 if keep_last is None else keep_last)):
            if not hasattr(value, "__index__") or value < 1:  # NumPy's whole numbers have it, too
                raise TrajectoryError(f"{name}: expected a whole number of at least 1, got {value!r}.")
        self._every = every
        self._saver = MatrixWriter(self.path, keep_last=keep_last, metadata=metadata, dtype=dtype)
        self._row: Tensor | None = None  # memory for one checkpoint, used again for the next one
        self._background = Background()
        self._appending = threading.Lock()
        if resume is not None:
            try:
                dropped = self._saver.truncate(resume)
            except TrajectoryError:
                self._saver.close()  # else this process could not open another one
                raise
            if dropped:
                notice(f"{self.path}: goes back to step {resume}, {dropped} later checkpoints are dropped")
        # the step of the last call of :meth:`append`; at first the last saved one
        self._previous: int | None = max(self._saver.steps, default=resume)

    def __enter__(self) -> TrajectoryWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:  # the first error says more
            with contextlib.suppress(TrajectoryError):
                self.close()

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that were appended and are kept, in order. Waits, and may raise, as the next append would."""
        self._background.finish()
        return self._saver.steps

    def close(self) -> None:
        """Wait as :meth:`flush` does, then let another process write.

        Raises:
            TrajectoryError: as :meth:`flush`.
        """
        try:
            self.flush()
        finally:
            if not self._background.running:  # else the user has interrupted the waiting, and saving continues
                self._row = None
                self._saver.close()

    def flush(self) -> None:
        """Wait until everything appended is on the disk.

        Raises:
            TrajectoryError: a checkpoint that was appended without waiting was refused, as :meth:`append` says, and is
                not saved.
        """
        self._background.finish()

    def append(
        self,
        step: int,
        weights: Mapping[str, Tensor] | nn.Module,
        *,
        wait: bool = True,
    ) -> bool:
        """Save ``weights`` as the checkpoint of training iteration ``step``.

        Args:
            step: larger than every saved step. A saved step with the same bytes is also allowed and changes nothing:
                resumed training may reach it again.
            weights: a state dict or a module, on any device, contiguous or not, with or without gradients. A state dict
                keeps its names. Of a module, prefixes of DataParallel and ``torch.compile`` are removed, and of torch's
                ``AveragedModel`` or ema-pytorch's ``EMA`` the average is saved. A module that holds an average beside
                other parts is saved whole.
            wait: until it is on the disk. Otherwise this returns when the weights are copied, on a GPU when the copy is
                queued; then they may change, and the rest happens in the background. There is memory for one copy:
                this waits until the previous one is written. :meth:`flush` waits until all is on the disk.

        Returns:
            Whether the checkpoint is new: False if its interval (``every``) has one already, or the step is saved.

        Raises:
            TrajectoryError: names, shapes or dtypes differ from the first checkpoint's; a weight is not finite; a saved
                step comes with other weights; the step is not larger than the last one; or the disk refuses. For a
                checkpoint that was not waited for, errors in its weights and of the disk are raised by the next append
                (which then saves nothing), flush or close. Earlier checkpoints stay as they were.
        """
        step = whole_step(step)
        if not self._appending.acquire(blocking=False):
            raise TrajectoryError(
                f"Step {step} comes while another is appended: append from one thread, and not from a signal handler."
            )
        try:
            if not self._background.running:
                self._background.finish()  # raises the error of a saving that has ended
            if not self._is_due(step):
                self._previous = step
                return False
            self._background.finish()
            if self._background.running:  # a signal's handler, within the saving that it would wait for
                raise TrajectoryError(f"Step {step} comes while another is saved: do not append from a signal handler.")
            tensors = _named_tensors(weights)
            layout = self._saver.check(tensors)
            is_new = self._saver.is_new(step)
            row, copied = self._begin_to_copy(layout, tensors)

            def save() -> None:
                for event in copied:
                    wait_for(event)
                self._saver.write(step, layout, row)
                self._saver.commit()

            if wait:
                save()
            else:
                self._background.start(save)
            self._previous = step  # only now: a step that was refused is due again
            return is_new
        finally:
            self._appending.release()

    def _is_due(self, step: int) -> bool:
        """Whether a multiple of ``every`` was reached since the step before, or by this step again, as when resumed."""
        previous = step - 1 if self._previous is None else self._previous
        return step % self._every == 0 or step // self._every > previous // self._every

    @torch.inference_mode(mode=False)  # else nothing outside the caller's inference mode could write to the memory
    @torch.no_grad()
    def _begin_to_copy(self, layout: Layout, tensors: Mapping[str, Tensor]) -> tuple[Tensor, list[torch.Event]]:
        """Begin to copy a checkpoint into a row, over the previous one.

        From a GPU the weights are copied into pinned memory, on the stream that trains. So the copy ends before a later
        kernel of that stream changes a weight, and the caller does not wait. From the CPU they are copied at once.

        Returns:
            The row, and the events after which it is complete, one for each GPU.
        """
        gpus = {tensor.device for tensor in tensors.values() if asynchronous(tensor.device)}
        if gpus and (self._row is None or len(self._row) != layout.row_bytes):
            # zeros, as the memory that :meth:`Layout.row_of` makes
            self._row = torch.empty(layout.row_bytes, dtype=torch.uint8, device="cpu", pin_memory=True).zero_()

        def copy(place: Tensor, tensor: Tensor) -> None:
            place.copy_(tensor, non_blocking=tensor.device in gpus)

        self._row = layout.row_of(tensors, memory=self._row, copy=copy)
        return self._row, [recorded(device) for device in gpus]


def _named_tensors(weights: object) -> Mapping[str, Tensor]:
    """The state dict of what a user appends.

    Raises:
        TrajectoryError: it is neither a module nor a state dict.
    """
    if isinstance(weights, nn.Module):
        weights = weights_of_module(weights)
    if not isinstance(weights, Mapping):
        raise TrajectoryError(
            f"A checkpoint is a module or a state dict, not {type(weights).__name__}: pass the model."
        )
    check_weights(weights)
    return weights
