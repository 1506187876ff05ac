"""Saving checkpoints into a packed trajectory while a model trains."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor, nn

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.progress import notice
from lcsc_opt.checkpoints import module_weights
from lcsc_opt.trajectory.background import Background
from lcsc_opt.trajectory.disk.layout import Layout, WholeRow, flat_bytes
from lcsc_opt.trajectory.disk.saving import Saver, whole_step


class TrajectoryWriter:
    """Appends checkpoints to the trajectory at ``path``, which is made or continued.

    In a training loop::

        with TrajectoryWriter("run.trajectory", every=100) as writer:
            for step in range(1, steps + 1):
                train_step()
                writer.append(step, model, wait=False)  # costs a copy of the weights; the rest goes on behind the loop

    A checkpoint becomes visible to readers when all its bytes are on the disk, by one atomic replacement of
    the manifest: whatever instant the process dies at, the trajectory holds whole checkpoints only. With
    ``keep_last``, one spare row is kept, so that the oldest checkpoint stays until the new one is there. One process
    may write at a time, and one of its threads. A script that ends without closing its writer loses nothing.

    Args:
        path: the folder, by convention ``NAME.trajectory``.
        every: save only at steps that are multiples of it.
        keep_last: keep this many last checkpoints; ``None`` keeps all.
        metadata: texts to note in the manifest; they add to what is there.
        dtype: ``exact`` keeps every bit of the weights. ``float16``, ``bfloat16`` and ``int8`` store differences from a
            reference checkpoint in that dtype; :meth:`measure` tells what this does. ``None`` goes on as the
            trajectory began, or is ``exact``.
        reference: the checkpoint that differences are taken from, best one from the middle; read at the first append.
            ``None`` takes the first one appended.
        resume: the step that training goes on from, as :meth:`rewind` says.

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
        reference: Mapping[str, Tensor] | None = None,
        resume: int | None = None,
    ) -> None:
        self.path = Path(path)
        self._every = _at_least_one("every", every)
        keep_last = None if keep_last is None else _at_least_one("keep_last", keep_last)
        self._saver = Saver(self.path, keep_last=keep_last, metadata=metadata, dtype=dtype, reference=reference)
        self._staging = Staging()
        self._background = Background("lcsc-save")
        self._appending = threading.Lock()
        if resume is not None:
            try:
                self.rewind(resume)
            except TrajectoryError:
                self._saver.close()
                raise

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
        """The steps that were appended and are kept, in order; waits, and may complain, as the next append would."""
        self._background.finish()
        return self._saver.steps

    def rewind(self, step: int) -> int:
        """Go back to ``step``: drop the checkpoints that come after it, all at once, and say so.

        For training that begins again from a state that is older than the last checkpoint: what comes next may be other
        weights at the same steps.

        Returns:
            How many were dropped.

        Raises:
            TrajectoryError: the disk refuses.
        """
        self._background.finish()
        dropped = self._saver.truncate(step)
        if dropped:
            notice(f"{self.path}: goes back to step {step}, {dropped} later checkpoints are dropped")
        return dropped

    def measure(self) -> float | None:
        """What storing differences does to merged weights, and note it in the manifest.

        The relative error, root mean square, of random combinations of the size that searches find (Σ|a| near 5) of the
        checkpoints that this writer appended and that are kept, on some thousands of their weights.

        Returns:
            It; ``None`` where rows are exact or fewer than two checkpoints were appended.
        """
        self._background.finish()
        return self._saver.measure()

    def close(self) -> None:
        """Wait as :meth:`flush` does, then let another process write.

        Raises:
            TrajectoryError: as :meth:`flush`.
        """
        try:
            self.flush()
        finally:
            if not self._background.running:  # else the user interrupts the waiting, and saving goes on
                self._staging.release()
                self._saver.close()

    def flush(self) -> None:
        """Wait until everything appended is on the disk.

        Raises:
            TrajectoryError: a checkpoint that was appended without waiting was refused, as :meth:`append` says; it is
                not saved.
        """
        self._background.finish()

    def append(
        self, step: int, weights: Mapping[str, Tensor] | nn.Module, *, source: str = "", wait: bool = True
    ) -> bool:
        """Save ``weights`` as the checkpoint of training iteration ``step``.

        Args:
            step: larger than every saved step; or a saved step again with the same bytes, which changes
                nothing, so that resumed training may come by a second time.
            weights: a state dict or a module (prefixes that DataParallel or ``torch.compile`` put are left
                out, and of torch's ``AveragedModel`` or ema-pytorch's ``EMA`` the average is taken); on any device,
                contiguous or not, with or without gradients.
            source: where the checkpoint came from, as it is noted in the manifest.
            wait: until it is on the disk. Without, this returns when the weights are copied, on a GPU when the copy is
                queued, and they may change at once; all else goes on in the background. There is memory for one copy:
                where the one before is not written yet, this waits for that. :meth:`flush` tells when all is on
                the disk.

        Returns:
            Whether a checkpoint was taken: False when ``step`` is not a multiple of ``every``, or is
            saved already.

        Raises:
            TrajectoryError: names, shapes or dtypes differ from the first checkpoint's; a weight is not
                finite; a saved step comes with other weights, or the step is not larger than the last one; or the disk
                refuses. Of a checkpoint that was not waited for, what is wrong with its weights and what the disk says
                is told by the next append (which takes nothing then), flush or close. What was saved before
                stays as it was.
        """
        step = whole_step(step)
        if not self._appending.acquire(blocking=False):
            raise TrajectoryError(f"Step {step} comes while another is appended: append from one thread, no handler.")
        try:
            return self._append(step, weights, source=source, wait=wait)
        finally:
            self._appending.release()

    def _append(self, step: int, weights: Mapping[str, Tensor] | nn.Module, *, source: str, wait: bool) -> bool:
        self._background.check()
        if step % self._every:
            return False
        tensors = _named_tensors(weights)
        self._background.finish()
        layout = self._saver.check(tensors)
        if wait:
            return self._save(step, layout, tensors, source)
        new, staged = self._saver.is_new(step), self._staging.take(layout, tensors)
        self._background.start(lambda: self._save(step, layout, staged.wait(), source))
        return new

    def _save(self, step: int, layout: Layout, content: Mapping[str, Tensor], source: str) -> bool:
        new = self._saver.write(step, layout, content, source=source)
        self._saver.commit()
        return new


def _named_tensors(weights: object) -> Mapping[str, Tensor]:
    if isinstance(weights, nn.Module):
        weights = module_weights(weights)
    if not isinstance(weights, Mapping):
        raise TrajectoryError(
            f"A checkpoint is a module or a state dict, not {type(weights).__name__}: pass the model that has the "
            "weights, or its state_dict()."
        )
    for name, tensor in weights.items():
        if not isinstance(tensor, Tensor):
            instead = "pass it alone" if isinstance(tensor, Mapping) else "leave it out"
            raise TrajectoryError(f"Entry {name!r} is {type(tensor).__name__}, not a tensor: {instead}.")
    return weights


def _at_least_one(name: str, value: int) -> int:
    if not isinstance(value, int) or value < 1:
        raise TrajectoryError(f"{name}: expected a whole number of at least 1, got {value!r}.")
    return value


@dataclasses.dataclass(frozen=True)
class Staged:
    """A checkpoint that is being copied.

    Attributes:
        content: all there after :meth:`wait`.
        events: of the devices that it comes from.
    """

    content: WholeRow
    events: Sequence[torch.cuda.Event]

    def wait(self) -> WholeRow:
        """The content, when all of it is there."""
        for event in self.events:
            event.synchronize()
        return self.content


class Staging:
    """Memory for one checkpoint, which is used again for the next one.

    From a GPU the copy goes into pinned memory, in the order of the stream that trains: it has ended before a later
    kernel of that stream changes a weight, and the caller waits for none of it. From the CPU it is copied at once.
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def release(self) -> None:
        """Give the memory back."""
        self._buffer = None

    @torch.inference_mode(mode=False)  # a buffer made in it could not be written to outside
    @torch.no_grad()
    def take(self, layout: Layout, tensors: Mapping[str, Tensor]) -> Staged:
        """Begin to copy a checkpoint over the one before, which is lost.

        Args:
            layout: of its exact row.
            tensors: on any devices.

        Raises:
            TrajectoryError: there is no memory for the copy.
        """
        buffer = self._room(layout.row_bytes, pinned=any(tensor.is_cuda for tensor in tensors.values()))
        content = WholeRow(layout, buffer)
        for name, place in content.items():
            tensor = tensors[name]
            place.copy_(flat_bytes(tensor), non_blocking=tensor.is_cuda)
        return Staged(content, _events({tensor.device for tensor in tensors.values() if tensor.is_cuda}))

    def _room(self, size: int, *, pinned: bool) -> Tensor:
        buffer = self._buffer
        if buffer is None or len(buffer) != size or (pinned and not buffer.is_pinned()):
            self._buffer = None  # not beside the new one
            try:
                buffer = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned)
            except (RuntimeError, MemoryError) as error:
                raise TrajectoryError(
                    f"No memory for a copy of a checkpoint, {size / 1e9:.1f} GB: append with wait=True, without one."
                ) from error
            self._buffer = buffer
        return buffer


def _events(devices: set[torch.device]) -> list[torch.cuda.Event]:
    """One for each GPU, which has passed when all that was asked of its current stream is done."""
    events = []
    for device in devices:
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # who waits for it sleeps
        event.record(torch.cuda.current_stream(device))
        events.append(event)
    return events
