"""The packed trajectory: a memory-mapped matrix with a checkpoint in each row, merged without loading it.

It is a folder with ``weights.bin``, whose rows are the checkpoints, and ``manifest.json``, which describes the rows.
The columns of one dtype are a ``[K, P]`` view of it. A one-hot combination is that checkpoint bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lcsc_opt.base import accelerator
from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.paths import MANIFEST, WEIGHTS, KnownCheckpoints
from lcsc_opt.base.progress import notice, progress
from lcsc_opt.base.records import TRAINER_EMA
from lcsc_opt.base.study_spec import Rule
from lcsc_opt.checkpoints import lora
from lcsc_opt.checkpoints.averages import Kept, files_of_averages, trainers_averages
from lcsc_opt.checkpoints.finding import shown_steps
from lcsc_opt.checkpoints.inventory import COLLECTED, is_average
from lcsc_opt.checkpoints.reading import read_checkpoint
from lcsc_opt.checkpoints.weights import Renaming, completed, difference, renaming, weights_sha256
from lcsc_opt.coefficients.layer_groups import LayerGroups
from lcsc_opt.coefficients.profiles import check_coefficients, index_of_trainer_ema
from lcsc_opt.trajectory.layout import Layout, TensorSpec
from lcsc_opt.trajectory.manifest import Manifest, SavedRow
from lcsc_opt.trajectory.matrix import row_sha256
from lcsc_opt.trajectory.merge import Merger, StateDict
from lcsc_opt.trajectory.placement import ColumnsInMemory, ColumnSource, Placement, place

_COMPARED_BYTES = 4096  # the beginning of a tensor, which tells most of them apart


class Trajectory:
    """K checkpoints of one training run, opened for reading with :meth:`open`.

    Any linear combination of them is merged at the speed of memory, without K state dicts in it:

    >>> import torch, lcsc_opt
    >>> with lcsc_opt.TrajectoryWriter("run.trajectory", every=1) as writer:
    ...     for step in (1, 2, 3):
    ...         _ = writer.append(step, {"weight": torch.tensor([float(step)])})
    >>> trajectory = lcsc_opt.Trajectory.open("run.trajectory")
    >>> trajectory.merge([-1.0, 0.0, 2.0])["weight"]
    tensor([5.])

    Only the pages that are read use memory, and the system can free them. Several threads may use one object. It is
    pickled as its path and steps.

    Attributes:
        path: the path of its folder.
        steps: the training step of each checkpoint, ``[K]``, strictly increasing.
        sources: where each checkpoint came from, ``[K]``; empty text for those that a training loop wrote.
        checkpoint_sha256: the SHA-256 of each checkpoint's row, ``[K]``.
        sha256: the SHA-256 of names, shapes, dtypes, steps and the bytes of all rows.
        tensors: the tensors of every checkpoint, in the order of their bytes.
        names: the names of the tensors, in this order.
        varying: the names of the tensors that are not the same in all checkpoints.
        parameters: P, how many scalars of a checkpoint are floating-point numbers that a merge combines.
        packed_layout: where the tensors lie in each row, by the names with which they were packed.
        nbytes: the size of the K checkpoints on disk.
        stored: what floating-point weights were rounded to when they were stored; ``None`` if every bit was kept.
        metadata: the writer's notes, name → text.
        trainer_ema_at: where the trainer's own average of the weights is, a file or a key of the last checkpoint;
            ``None`` for the one that was packed with the checkpoints, if there was one beside the last weights.
        renaming: how a network has changed the names of the files' tensors (:meth:`fitting`).
        layer_groups: which weights are merged with which of S rows of coefficients; ``None`` if all are merged with
            one row.
    """

    layer_groups: LayerGroups | None = None
    trainer_ema_at: str | Path | None = None
    renaming: Renaming = Renaming()

    def __init__(self, path: Path, manifest: Manifest, stamp: tuple[int, int, int] | None) -> None:
        checkpoints = manifest.checkpoints
        self.path = path
        self.steps = tuple(saved.step for saved in checkpoints)
        self.sources: tuple[str, ...] = tuple(saved.source for saved in checkpoints)
        self.checkpoint_sha256: tuple[str, ...] = tuple(saved.sha256 for saved in checkpoints)
        self.sha256 = manifest.sha256_of(self.steps)
        self.tensors = manifest.tensors
        self.names = tuple(spec.name for spec in self.tensors)
        self.varying = frozenset(manifest.varying)
        self.parameters = sum(spec.numel for spec in self.tensors if spec.merged)
        self.nbytes = len(checkpoints) * manifest.row_bytes
        self.stored = manifest.stored
        self.metadata: Mapping[str, str] = manifest.metadata
        self.packed_layout = manifest.layout
        self._manifest = manifest
        self._stamp = stamp
        self._rows = manifest.map_rows(path)
        columns = ColumnsInMemory.mapped(self._rows, manifest.layout.segments(self.varying))
        self._merger = Merger(columns, self._rows, manifest)

    @property
    def checkpoint_names(self) -> list[str]:
        """``[K]``: ``step 300``, and the file where its name does not tell the step, as of kohya's epochs."""
        names = []
        for step, source in zip(self.steps, map(Path, self.sources), strict=True):
            name = f"step {step}"
            if source.name and str(step) not in f"{source.parent.name}/{source.name}":
                name += f", {source.stem}"
            names.append(name)
        return names

    @classmethod
    def holding(cls, path: Path, checkpoints: KnownCheckpoints) -> Trajectory | None:
        """The checkpoints of a study out of those at ``path``; ``None`` if one is missing or has other weights."""
        try:
            if Manifest.load(path).sha256_of(checkpoints.steps) != checkpoints.sha256:
                return None
            return cls.open(path, steps=checkpoints.steps)
        except TrajectoryError:  # being written, broken, or gone
            return None

    @classmethod
    def open(cls, path: str | Path, *, steps: Sequence[int] | None = None) -> Trajectory:
        """Map the trajectory at ``path``.

        Args:
            path: the folder.
            steps: ``[K]``, opens only the checkpoints of these steps; ``None`` opens all.

        Raises:
            TrajectoryError: there is none, its manifest is broken, it holds no checkpoint, it is truncated, or it lacks
                one of the ``steps``.
        """
        path = Path(path)
        stamp = _stamp(path)  # before reading, so that a later change is noticed
        manifest = Manifest.load(path)
        if not manifest.checkpoints:
            raise TrajectoryError(f"{path} holds no complete checkpoint yet: append one, or pack again.")
        if steps is not None:
            if not len(steps):  # also of NumPy
                raise TrajectoryError(f"{path}: steps: expected at least one, got none.")
            missing = sorted(set(steps) - {saved.step for saved in manifest.checkpoints})
            if missing:
                count = len(manifest.checkpoints)
                raise TrajectoryError(
                    f"{path} has no checkpoint of step {missing[0]}: it holds {count} checkpoints of other steps."
                )
            checkpoints = tuple(saved for saved in manifest.checkpoints if saved.step in steps)
            manifest = manifest.model_copy(update={"checkpoints": checkpoints})
        return cls(path, manifest, stamp)

    def on(self, device: torch.device | str, *, how: Placement | None = None) -> Trajectory:
        """The same trajectory, merged and projected on ``device``, in the fastest way possible.

        On a GPU: from a copy of the trajectory in its memory (``resident``) if the copy fits into a part of the free
        memory. On the CPU, which also serves devices that cannot merge: from the map (``mapped``) if the machine's
        memory can hold the file. Else the trajectory is read for each merge (``streamed``), part by part, while the
        part before is combined. A line on stderr says which way, unless it is the map.

        ``how`` asks for one of the three ways; ``mapped`` on the CPU only. ``resident`` becomes ``streamed`` where the
        device runs out of memory. Pickling forgets the device.

        Raises:
            TrajectoryError: a checkpoint was overwritten since opening; or ``how`` does not fit the device.
            ObjectiveError: this machine has no such device.
        """
        merger = self._merger
        with self._unchanged():
            found = accelerator.find(str(device))
            source = place(self.path / WEIGHTS, self._rows, merger.segments, merger.slots, found, how)
        return self._merged_by(source, self.layer_groups)

    def in_rows(self, rule: Rule | None) -> Trajectory:
        """The same trajectory for coefficients ``[S, K]``, a row for each group of weights; ``None`` for one row.

        A tensor that has several names (:attr:`tied`) has the same rows under each.

        Args:
            rule: how the tensors that vary are divided, see :meth:`LayerGroups.by`.
        """
        groups: LayerGroups | None = None
        if rule is not None:
            shapes = {spec.name: spec.shape for spec in self.tensors if spec.name in self.varying}
            groups = LayerGroups.by(rule, shapes, self.tied)
        return self.in_groups(groups)

    @functools.cached_property
    def _squares(self) -> Mapping[str, tuple[float, float]]:
        """As :meth:`Merger.squares`."""
        with self._unchanged():
            return self._merger.squares()

    def closeness(self, groups: LayerGroups | None) -> npt.NDArray[np.float64]:
        """How close the checkpoints are to each other, for each row of coefficients: ``[S]``, or ``[1]``.

        It is the root mean square of their mean weights, divided by that of their deviations from it. Tensors that
        share a row count together; channels have the closeness of their tensor. It is rounded, to be the same on all
        machines.

        Raises:
            TrajectoryError: a checkpoint was overwritten since opening.
        """
        squares = self._squares
        weights = np.zeros(1 if groups is None else len(groups))
        deviations = np.zeros_like(weights)
        for name, (of_weights, of_deviations) in squares.items():
            rows: npt.NDArray[np.int64] | int = 0
            if groups is not None:
                rows = groups.rows_of[name].of_channels()
            np.add.at(weights, rows, of_weights)
            np.add.at(deviations, rows, of_deviations)
        ratio = np.divide(weights, deviations, out=np.zeros_like(weights), where=deviations > 0)
        closeness: npt.NDArray[np.float64] = np.sqrt(ratio * (len(self) - 1))
        return closeness.astype(np.float16).astype(np.float64)

    def in_groups(self, groups: LayerGroups | None) -> Trajectory:
        """The same trajectory, merged by these layer groups, which have all tensors that vary; ``None`` for one row."""
        return self._merged_by(self._merger.source, groups)

    def fitting(self, network: Mapping[str, Tensor]) -> Trajectory:
        """The same trajectory under the names of a network, if they differ by a prefix.

        Tensors without that prefix are left out. Training loops save networks inside of wrappers, whose names in a file
        look like those of the network's parts. Where a name fits already, or no prefix fits, all stays as it is.

        Args:
            network: its state dict.

        Raises:
            TrajectoryError: the files hold several models that fit.
        """
        new_names = renaming(self.layout.shapes, network)
        if new_names is None:
            return self
        return self.renamed(new_names)

    def renamed(self, names: Renaming) -> Trajectory:
        """The same trajectory with other names, without the tensors that lack the prefix.

        It is mapped again, so :meth:`on` and :meth:`in_rows` come after it.
        """
        remaining = [spec for spec in self.tensors if spec.name.startswith(names.removed)]
        tensors = tuple(dataclasses.replace(spec, name=names(spec.name)) for spec in remaining)
        varying = sorted(names(spec.name) for spec in remaining if spec.name in self.varying)
        manifest = self._manifest.model_copy(update={"tensors": tensors, "varying": tuple(varying)})
        changed = Trajectory(self.path, manifest, self._stamp)
        changed.renaming = names
        changed.trainer_ema_at = self.trainer_ema_at
        changed.sha256 = self.sha256  # they are the same checkpoints: studies compare it
        changed.packed_layout = self.packed_layout
        return changed

    @functools.cached_property
    def tied(self) -> Mapping[str, str]:
        """Further names of tensors that a checkpoint has under several names, each → the first of them.

        These are floating-point tensors of one shape and dtype that vary, and that are equal bit for bit in all
        checkpoints. Constants and counters are left out, which often are equal without being one tensor. A file does
        not always tell more: safetensors writes a shared tensor twice, or once.

        Raises:
            TrajectoryError: a checkpoint was overwritten since opening.
        """
        alike: dict[tuple[object, ...], list[TensorSpec]] = {}
        with self._unchanged():
            for spec in self.tensors:
                if spec.name in self.varying and spec.merged and spec.numel:
                    content = spec.of_row(self._rows[self._merger.slots[-1]])  # any: equal tensors are so in all
                    beginning = content[:_COMPARED_BYTES].numpy().tobytes()
                    alike.setdefault((spec.shape, spec.dtype, beginning), []).append(spec)
            first_names: dict[str, str] = {}
            for specs in alike.values():
                distinct: list[TensorSpec] = []
                for spec in specs:
                    first = next((earlier for earlier in distinct if self._are_equal(earlier, spec)), None)
                    if first is None:
                        distinct.append(spec)
                    else:
                        first_names[spec.name] = first.name
        return first_names

    def _are_equal(self, one: TensorSpec, other: TensorSpec) -> bool:
        """Whether two tensors have the same bytes in all checkpoints."""
        return all(
            torch.equal(one.of_row(self._rows[slot]), other.of_row(self._rows[slot])) for slot in self._merger.slots
        )

    def _merged_by(self, source: ColumnSource, groups: LayerGroups | None) -> Trajectory:
        """The same trajectory, on the same map, with another merger."""
        changed = object.__new__(Trajectory)  # nothing is read, mapped or searched for again
        changed.__dict__.update(self.__dict__)
        changed.layer_groups = groups
        changed._merger = Merger(source, self._rows, self._manifest, groups)
        return changed

    def __reduce__(self) -> tuple[object, ...]:
        return _reopened, (self.path, self.steps, self.layer_groups, self.trainer_ema_at, self.renaming)

    def __len__(self) -> int:
        return len(self.steps)

    def __repr__(self) -> str:
        return f"<Trajectory {str(self.path)!r}: {len(self)} checkpoints of {self.parameters} parameters>"

    def checkpoint(self, index: int) -> StateDict:
        """A copy of checkpoint ``index`` (0 … K−1, or from the end when negative), bit for bit, on the CPU.

        Floating-point tensors that were rounded when they were stored come in float32.

        Raises:
            TrajectoryError: the checkpoint has been overwritten since opening.
        """
        return self._copied(self.tensors, self._rows[self._merger.slots[index]])

    def _copied(self, tensors: Iterable[TensorSpec], row: Tensor) -> StateDict:
        """A copy of these tensors of a row, as :meth:`checkpoint` gives it."""
        widened = self.stored is not None
        with self._unchanged():
            return {spec.name: spec.copy_from(spec.of_row(row), widened=widened) for spec in tensors}

    @property
    def merges_averages(self) -> bool:
        """Whether the checkpoints are running averages of a trainer, by the key under which they were read."""
        key = self.metadata.get("key", "")
        return is_average(key) and not key.endswith(COLLECTED)

    @property
    def averages(self) -> tuple[str, ...]:
        """The names of the averages that the trainer kept of the last checkpoint's weights, the usual one last."""
        if self.trainer_ema_at is not None:
            return (TRAINER_EMA,)
        if self._kept is not None:
            return tuple(self._kept.names)
        # this may be a part of the trajectory, without the step of the averages
        return tuple(saved.name for saved in self._manifest.averages if saved.step == self.steps[-1])

    def trainer_ema(self, index: int = -1) -> StateDict | None:
        """One of the trainer's own :attr:`averages`, on the CPU; ``None`` where there is none of this index.

        Tensors that it lacks, such as buffers, are the last checkpoint's. The others keep their own dtype where that is
        wider: mixed precision has averages in float32 of weights in bfloat16.

        Raises:
            TrajectoryError: :attr:`trainer_ema_at` is not there, or of another model.
        """
        names = self.averages
        if not -len(names) <= index < len(names):
            return None
        if self.trainer_ema_at is None:
            if self._kept is not None:
                return completed(self._renamed(self._kept.averages[index].tensors), self.checkpoint(-1))
            [saved] = [saved for saved in self._manifest.averages if saved.name == names[index]]
            tensors = saved.layout(self.packed_layout).tensors
            return self._renamed(self._copied(tensors, self._bytes_of(saved)))
        if Path(self.trainer_ema_at).exists():
            averages = read_checkpoint(self.trainer_ema_at).tensors
        else:
            averages = read_checkpoint(self.sources[-1], key=str(self.trainer_ema_at)).tensors
        try:
            return completed(self._renamed(averages), self.checkpoint(-1))
        except TrajectoryError as error:
            raise TrajectoryError(f"trainer_ema: {error}") from error

    @functools.cached_property
    def _kept(self) -> Kept | None:
        """The averages as they are now, where files of their own may hold some, beside the file of the last checkpoint.

        These may have been copied there, or written again, since the checkpoints were packed. ``None`` where there are
        no such files: what was packed is all then.
        """
        if len(self) < 2 or not (self.sources[-1] and Path(self.sources[-1]).exists()):  # a training loop wrote them
            return None
        *_, earlier, last = map(Path, self.sources)
        key = self.metadata.get("key", "")
        with contextlib.suppress(TrajectoryError):  # what was packed is still there
            if any(True for _ in files_of_averages(last, key)):
                kept = trainers_averages(last, key, earlier)
                return kept if kept.averages else None
        return None

    def _renamed(self, averages: Mapping[str, Tensor]) -> StateDict:
        """Averages under the names of :attr:`tensors`, without those of the parts that :meth:`fitting` left out."""
        other_parts = {name for name in self.packed_layout.shapes if not name.startswith(self.renaming.removed)}
        return {self.renaming(name): tensor for name, tensor in averages.items() if name not in other_parts}

    @functools.cached_property
    def averages_sha256(self) -> dict[str, str]:
        """The SHA-256 of each of the trainer's :attr:`averages`. Raises TrajectoryError as :meth:`trainer_ema`."""
        digests = {}
        for index, name in enumerate(self.averages):
            weights = self.trainer_ema(index)
            if weights is not None:
                digests[name] = weights_sha256(weights)
        return digests

    @property
    def layout(self) -> Layout:
        """Where the tensors lie in each row."""
        return self._manifest.layout

    @property
    def device(self) -> torch.device:
        """Where merged tensors are; see :meth:`on`."""
        return self._merger.source.device

    def merge(self, coefficients: npt.ArrayLike | Tensor, *, wide: bool = False) -> StateDict:
        """The linear combination of the checkpoints: ``coefficients`` ``[K]``, any sign, sum to one.

        With :attr:`layer_groups` also ``[S, K]``: each tensor is combined with the row of its group, each row sums to
        one. Equal rows give the bits of one row.

        The tensors are new, contiguous and on :attr:`device`. They have the dtypes of :attr:`tensors`, or float32 for
        weights that were rounded when they were stored. Tensors of one dtype share one memory, and all are finished
        when this returns. float64 is accumulated in float64, every other dtype in float32 and rounded once. Tensors
        that are the same in all checkpoints are copied. Integers and bools come from the checkpoint with the largest
        coefficient, the first of those that tie. In one row, a single coefficient of exactly 1 gives that checkpoint
        bit for bit. ``[0, …, 0, 1]`` of K + 1 numbers is the first of :attr:`averages`, of K + 2 the second, as
        :meth:`trainer_ema` gives it.

        With ``wide``, sums stay in float32 where the checkpoints have half types.

        Raises:
            StudySpecError: not ``[K]`` or ``[S, K]``, not finite, or another sum than one.
            TrajectoryError: a checkpoint was overwritten since opening, a merged weight is too large for its dtype, or
                there is no average of the trainer's.
        """
        index = index_of_trainer_ema(coefficients, len(self))
        if index is not None:
            average = self.trainer_ema(index)
            if average is None:
                raise TrajectoryError(f"{self.path}: its last checkpoint has no average of the trainer's.")
            return {name: tensor.to(self.device) for name, tensor in average.items()}
        checked = check_coefficients(coefficients, len(self), rows=self.layer_groups)
        with self._unchanged():
            return self._merger.merge(checked, wide=wide)

    def project(self, gradients: Mapping[str, Tensor]) -> npt.NDArray[np.float64]:
        """From the gradient of a function of the merged weights to its gradient in the coefficients, ``[K]`` float64.

        That is ⟨theta_i, gradient⟩ for each checkpoint, in one read of the trajectory; with :attr:`layer_groups`, for
        each group and checkpoint, ``[S, K]``. Names without a gradient count as zero, and so do tensors that a merge
        copies: constant ones, integers and bools. The rounding at the end of a merge counts as having the derivative
        one.

        Args:
            gradients: name → gradient, of the shape of the tensor, of any dtype, on any device.

        Raises:
            TrajectoryError: another name or shape, or a checkpoint was overwritten since opening.
        """
        expected = self.layout.shapes
        differs = difference({**expected, **gradients}, expected)  # not every tensor needs a gradient
        if differs is not None:
            raise TrajectoryError(
                f"The gradients do not fit the trajectory: their model {differs}. Use the names of its tensors."
            )
        with self._unchanged():
            return self._merger.project(gradients)

    def sample(self, index: int) -> Tensor:
        """The first numbers of each tensor that varies, as float64 in one row ``[n]``: what tells checkpoints apart.

        Args:
            index: of the checkpoint, 0 … K−1.
        """
        specs = [spec for spec in self.tensors if spec.merged and spec.name in self.varying and spec.numel]
        row = self._rows[self._merger.slots[index]]
        with self._unchanged():
            beginnings = [spec.of_row(row)[:_COMPARED_BYTES].view(spec.torch_dtype) for spec in specs]
            # torch cannot join no tensors, and perhaps only integers vary
            return torch.cat([torch.zeros(1, dtype=torch.float64, device="cpu"), *beginnings])

    def identical(self) -> list[str]:
        """A warning for each set of checkpoints that have the same bytes."""
        steps_by_hash: dict[str, list[int]] = {}
        for step, sha256 in zip(self.steps, self.checkpoint_sha256, strict=True):
            steps_by_hash.setdefault(sha256, []).append(step)
        alike = [steps for steps in steps_by_hash.values() if len(steps) > 1]
        return [f"identical weights: steps {shown_steps(steps)}" for steps in alike]

    @property
    def touched(self) -> bool:
        """Whether the weights file is newer than the manifest, which a writer replaces last.

        So weights may have changed since. In a copied folder they have not, and :meth:`verify` tells the difference.
        """
        try:
            weights = (self.path / WEIGHTS).stat().st_mtime_ns
            manifest = (self.path / MANIFEST).stat().st_mtime_ns
        except OSError as error:
            raise TrajectoryError(f"Cannot read {self.path}: {error.strerror}.") from error
        return weights > manifest

    def lora_alphas(self, given: float | None = None) -> lora.LoraAlphas:
        """The alphas of LoRA checkpoints whose tensors hold none: as they were packed, or the one that is ``given``.

        Raises:
            TrajectoryError: one is given beside the checkpoints' own; PEFT has them in a file, which was not there; or
                the metadata is broken.
        """
        text = self.metadata.get(lora.PACKED_ALPHAS)
        in_tensors = all(module.alpha is not None for module in lora.lora_modules(self.names))
        if given is not None and (text or in_tensors):
            raise TrajectoryError("lora_alpha: the checkpoints hold their own alphas; leave it out")
        if given is not None:
            return lora.LoraAlphas.constant(given)
        if text:
            try:
                return lora.LoraAlphas.model_validate_json(text)
            except ValueError as error:
                raise TrajectoryError(f"{self.path}: the configuration of its LoRA is broken.") from error
        if in_tensors:
            return lora.LoraAlphas()
        advice = "lora_alpha in a study file"
        if lora.lora_flavour(self.names) == "peft":
            file = lora.ADAPTER_CONFIG
            raise TrajectoryError(f"The LoRA was saved without {file}: put it beside the weights, or give {advice}.")
        notice(f"assuming that the LoRA's alpha is its rank, as diffusers does; if that is wrong, give {advice}")
        return lora.LoraAlphas()

    def verify(self) -> None:
        """Hash every row again, also that of the trainer's average.

        Raises:
            TrajectoryError: the bytes of a row are not those that were written, and the message names the first such
                row; or a row was overwritten since opening.
        """
        with progress("verify", len(self._manifest.rows)) as advance:
            for saved in self._manifest.rows:
                if row_sha256(self._bytes_of(saved)) != saved.sha256:
                    self._check()  # a row that a writer has used again is not damaged
                    raise TrajectoryError(
                        f"{self.path}: the weights of step {saved.step} are damaged: remove the folder and pack again."
                    )
                advance()

    def _bytes_of(self, saved: SavedRow) -> Tensor:
        """A row, ``[n]`` uint8, which may have several slots; not copied."""
        return self._rows[saved.slot : saved.end].view(-1)

    @contextlib.contextmanager
    def _unchanged(self) -> Iterator[None]:
        """For reading rows, without gradients.

        Raises:
            TrajectoryError: a row was overwritten before this was opened, or while it was open.
        """
        self._check()
        # callers may be in inference mode, whose tensors nothing outside it may change
        with torch.inference_mode(mode=False), torch.no_grad():
            yield
        self._check()

    def _check(self) -> None:
        """Refuse if a writer has dropped a checkpoint since opening: it may use the row again. Appending is fine.

        Raises:
            TrajectoryError: that is so, or the manifest is gone.
        """
        stamp = _stamp(self.path)
        if stamp == self._stamp:
            return
        manifest = Manifest.load(self.path)
        same_layout = manifest.layout == self.packed_layout
        if not (same_layout and set(self._manifest.checkpoints) <= set(manifest.checkpoints)):
            raise TrajectoryError(f"{self.path} was changed since it was opened: open it again.")
        self._stamp = stamp


def describe_renaming(trajectory: object) -> dict[str, list[str]]:
    """What an objective's ``describe()`` says of the names that its network has changed; nothing if it has not.

    Args:
        trajectory: an author's own may lack :attr:`Trajectory.renaming`.
    """
    renaming = getattr(trajectory, "renaming", Renaming())
    if any(renaming):  # one of its two prefixes is not empty
        return {"names": [*renaming]}
    return {}


def _reopened(
    path: Path,
    steps: tuple[int, ...],
    groups: LayerGroups | None,
    trainer_ema_at: str | Path | None,
    names: Renaming,
) -> Trajectory:
    """What pickle calls for a trajectory."""
    opened = Trajectory.open(path, steps=steps)
    if any(names):  # else nothing was renamed
        opened = opened.renamed(names)
    opened.trainer_ema_at = trainer_ema_at
    return opened.in_groups(groups)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """What tells two versions of the manifest apart: every write makes a new file. ``None`` if there is none."""
    try:
        status = (path / MANIFEST).stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
