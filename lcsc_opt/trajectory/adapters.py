"""Trajectories of adapters that contain the base model, so that a combination has a strength; and several in one.

The base model stays what it is, whatever is combined, so the coefficients of adapters need not sum to one. What is left
to one is the coefficient of a further checkpoint, at step 0: the adapter of zeros, which changes nothing. So everything
that holds for coefficients holds here, too. Both factors of a LoRA are combined, and their product is what is added to
the base: where the coefficients of the others sum to t, the adapter has the strength t².

Several adapters of one base stand side by side in a module: their factors are joined along the rank, each with zeros
in the places of the others. So a combination of adapters is the sum of theirs, without products of one's factor with
another's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.progress import notice
from lcsc_opt.base.records import Coefficients
from lcsc_opt.checkpoints.lora import PACKED_ALPHAS, LoraAlphas, LoraModule, lora_flavour, lora_modules
from lcsc_opt.trajectory.continuing import find_packed
from lcsc_opt.trajectory.filling import finish_packing, made_once, partial_path
from lcsc_opt.trajectory.manifest import PACKED
from lcsc_opt.trajectory.matrix import MatrixWriter
from lcsc_opt.trajectory.packing import open_request
from lcsc_opt.trajectory.sources import PackRequest, path_of_packed
from lcsc_opt.trajectory.trajectory import Trajectory

BASE_MODEL = "base, no LoRA"  # what the model without an adapter is called
BASE = "adapters_with_base"  # in the metadata of such a trajectory: of how many adapters it is


def open_with_base(requests: Sequence[PackRequest]) -> Trajectory:
    """The checkpoints of one or more adapters of one base, and that of zeros at step 0, as one trajectory.

    It is written once, into the folder of the requests. The steps of each further adapter count on from the last step
    before. A study that continues gets the checkpoints that it began with.

    Args:
        requests: of each adapter.

    Raises:
        TrajectoryError: one is no LoRA of two factors a module, or begins at step 0; they name their modules otherwise;
            or the study's checkpoints were other ones.
    """
    folder = requests[0].folder
    known = requests[0].study_checkpoints
    if known is not None:
        packed = find_packed(folder, known)
        if packed is not None:
            return packed
    parts = [open_request(dataclasses.replace(request, study_checkpoints=None)) for request in requests]
    if len(parts) == 1 and BASE in parts[0].metadata:
        return parts[0]
    digest = hashlib.sha256(" ".join([BASE, *(part.sha256 for part in parts)]).encode()).hexdigest()
    out = path_of_packed(folder, digest)
    made = made_once(out, functools.partial(_make, parts, out))
    if known is not None and made.sha256 != known.sha256:
        raise TrajectoryError(
            f"{parts[0].path}: the adapters are others than those that the study began with; put these back, or give "
            "the study another name"
        )
    return made


def requests_of_adapters(request: PackRequest) -> list[PackRequest]:
    """A request for each folder, glob or packed trajectory of one; files are those of one adapter."""
    files = [path for path in request.patterns if Path(path).is_file()]
    series: list[list[str | Path]] = [[path] for path in request.patterns if path not in files]
    if files:
        series.insert(0, files)
    return [dataclasses.replace(request, patterns=patterns) for patterns in series]


def adapters_in(trajectory: Trajectory) -> int | None:
    """Of how many adapters a trajectory is that contains the base model; ``None`` of any other.

    A study without strengths may be given the rows of its checkpoints from such a trajectory, and not that of the base.
    """
    count = trajectory.metadata.get(BASE)
    if count is None or trajectory.steps[0] != 0:
        return None
    return int(count)


def is_of_adapters(trajectory: Trajectory) -> bool:
    """Whether its checkpoints are LoRAs, and no whole models; not known of an author's own trajectory."""
    names = getattr(trajectory, "names", None)
    return names is not None and lora_flavour(names) is not None


def base_coefficients(trajectory: Trajectory) -> Coefficients | None:
    """``[K]``, with which :func:`merged_or_base` gives the base model without a LoRA; ``None`` of whole models."""
    if not is_of_adapters(trajectory):
        return None
    coefficients = np.zeros(len(trajectory.steps))
    if adapters_in(trajectory) is not None:
        coefficients[0] = 1.0
    return coefficients


def merged_or_base(trajectory: Trajectory, coefficients: Coefficients) -> dict[str, Tensor]:
    """A combination of LoRAs, name → tensor; of coefficients that are all zero, factors of zeros: the base model."""
    if np.any(coefficients):
        return trajectory.merge(coefficients)
    first = trajectory.merge(np.eye(len(trajectory.steps))[0])
    return {name: torch.zeros_like(factor) for name, factor in first.items()}


def _make(parts: Sequence[Trajectory], out: Path) -> None:
    """Write the trajectory ``out``."""
    adapters = [_Adapter.of(part) for part in parts]
    joined = _Joined(adapters) if len(parts) > 1 else None
    metadata = {BASE: str(len(parts)), **_shared_metadata(parts, joined)}
    with contextlib.closing(MatrixWriter(partial_path(out), metadata=metadata)) as writer:
        for step, weights, source in _rows(adapters, joined):
            layout = writer.check(weights)
            writer.write(step, layout, layout.row_of(weights), source=source)
        if joined is None:
            _write_averages(writer, parts[0])
        writer.commit()
    finish_packing(out)
    notice(f"strength: the checkpoint of step 0 is the base model without {_in_words(len(parts))}")


def _write_averages(writer: MatrixWriter, trajectory: Trajectory) -> None:
    """Write the averages that the trainer kept itself, as further rows."""
    for index, name in enumerate(trajectory.averages):
        average = trajectory.trainer_ema(index)
        if average is not None:
            layout = writer.layout_of_average(average)
            writer.write_trainer_ema(layout, layout.row_of(average), source=trajectory.sources[-1], name=name)


def _in_words(count: int) -> str:
    return "an adapter" if count == 1 else f"any of the {count} adapters"


class _Adapter(NamedTuple):
    """One part.

    Attributes:
        trajectory: its checkpoints.
        modules: name → module.
        scales: name of a module → what its product is multiplied by, alpha / rank.
    """

    trajectory: Trajectory
    modules: Mapping[str, LoraModule]
    scales: Mapping[str, float]

    @classmethod
    def of(cls, trajectory: Trajectory) -> _Adapter:
        """Raises TrajectoryError as :func:`with_base`."""
        if trajectory.steps[0] == 0:
            raise TrajectoryError(
                f"{trajectory.path}: begins at step 0, which stands for the base model; leave it out (first_step: 1)"
            )
        modules = {module.name: module for module in lora_modules(trajectory.names)}
        weights = trajectory.checkpoint(-1)
        alphas = trajectory.lora_alphas()
        scales = {name: module.factors(weights, alphas)[2] for name, module in modules.items()}
        return cls(trajectory, modules, scales)


class _Joined:
    """Several adapters whose factors stand side by side.

    Raises:
        TrajectoryError: their names are of different flavours, or one module has other sizes in two of them.
    """

    def __init__(self, adapters: Sequence[_Adapter]) -> None:
        self._adapters = adapters
        self._last = [adapter.trajectory.checkpoint(-1) for adapter in adapters]
        self._names: dict[str, LoraModule] = {}
        flavour = lora_flavour(adapters[0].trajectory.names)
        for adapter in adapters:
            for name, module in adapter.modules.items():
                known = self._names.setdefault(name, module)
                is_same = lora_flavour([module.down]) == flavour and known.down == module.down
                if not is_same:
                    raise TrajectoryError(
                        f"{adapter.trajectory.path}: names its factors otherwise ({module.down}) than "
                        f"{adapters[0].trajectory.path} ({known.down}): save both by one program."
                    )

    def row(self, index: int, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The factors of one checkpoint of the adapter ``index``, in its places among those of all.

        alpha / rank is multiplied into ``up``, since adapters may differ in it: the joined ones have alpha = rank.
        """
        row: dict[str, Tensor] = {}
        for name, module in self._names.items():
            downs, ups = [], []
            for number, adapter in enumerate(self._adapters):
                if name not in adapter.modules:
                    continue
                own = adapter.modules[name]
                down, up = self._last[number][own.down], self._last[number][own.up]
                if number == index:
                    down, up = weights[own.down], weights[own.up] * adapter.scales[name]
                else:
                    down, up = torch.zeros_like(down), torch.zeros_like(up)
                downs.append(down)
                ups.append(up)
            try:
                row[module.down] = torch.cat(downs, dim=0)
                row[module.up] = torch.cat(ups, dim=1)
            except RuntimeError as error:
                raise TrajectoryError(
                    f"{name}: has other sizes in two of the adapters; combine adapters of one base."
                ) from error
        return row


def _rows(adapters: Sequence[_Adapter], joined: _Joined | None) -> Iterator[tuple[int, dict[str, Tensor], str]]:
    """Step, weights and source of each checkpoint: first the base, then those of one adapter after the other."""
    before = 0  # the last step of the adapters so far
    for index, adapter in enumerate(adapters):
        trajectory = adapter.trajectory
        for number, step in enumerate(trajectory.steps):
            weights = dict(trajectory.checkpoint(number))
            if joined is not None:
                weights = joined.row(index, weights)
            if index == 0 and number == 0:
                yield 0, _nothing(weights), ""
            yield before + step, weights, trajectory.sources[number]
        before += trajectory.steps[-1]


def _nothing(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Factors of zero; alphas stay."""
    return {name: tensor if name.endswith(".alpha") else torch.zeros_like(tensor) for name, tensor in weights.items()}


def _shared_metadata(parts: Sequence[Trajectory], joined: _Joined | None) -> dict[str, str]:
    """What all parts state alike; where factors are joined, that alphas are ranks."""
    shared = dict(sorted(set.intersection(*(set(part.metadata.items()) for part in parts))))
    shared.pop(PACKED, None)
    if joined is not None:
        shared[PACKED_ALPHAS] = LoraAlphas().model_dump_json()
    return shared
