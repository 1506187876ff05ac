"""The table of what lies in a run: which files are its checkpoints, what each holds, and what is made of it.

What is packed and reported is decided by the functions that this table is made of, so it shows what a run will do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.averages import Kept, trainers_averages
from lcsc_opt.checkpoints.finding import Patterns, RunFiles, find_run
from lcsc_opt.checkpoints.folders import in_file
from lcsc_opt.checkpoints.inventory import Container, Inventory, Role
from lcsc_opt.checkpoints.order import checkpoint_steps
from lcsc_opt.checkpoints.reading import naming, read_checkpoint, read_value, searched_weights

COMBINED = "combined"


@dataclasses.dataclass(frozen=True)
class Held:
    """A state dict of the last checkpoint.

    Attributes:
        file: the name of its file.
        key: its key there.
        what: what it seems to be.
        rate: of an average, where it has one.
        tensors: how many.
        use: what becomes of it: ``combined``, a row of the report, or nothing.
    """

    file: str
    key: str
    what: str
    rate: str
    tensors: int
    use: str


@dataclasses.dataclass(frozen=True)
class RunTable:
    """What lies in the files of a run.

    Attributes:
        checkpoints: training step → file or folder.
        held: the state dicts of the last one.
        left_out: what is not read, each with the reason.
        said: what a run says of its choices.
    """

    checkpoints: Mapping[int, Path]
    held: Sequence[Held]
    left_out: Mapping[Path, str]
    said: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """The table as JSON."""
        return {
            "checkpoints": {str(step): str(path) for step, path in self.checkpoints.items()},
            "held": [dataclasses.asdict(held) for held in self.held],
            "left_out": {str(path): reason for path, reason in self.left_out.items()},
            "said": list(self.said),
        }


def table_of(patterns: Patterns, *, key: str | None = None) -> RunTable:
    """The table of files, a glob, a folder, or one checkpoint.

    Args:
        patterns: as for :func:`~lcsc_opt.checkpoints.finding.find_run`.
        key: which state dict of each checkpoint; ``None`` as where nobody chooses.

    Raises:
        TrajectoryError: there is no checkpoint, or what a run would refuse, too.
    """
    found = find_run(patterns, key=key)
    by_step = sorted(zip(_steps(found), found.checkpoints, strict=True))
    paths = [path for _, path in by_step]
    said: list[str] = []
    if key is None:
        searched = searched_weights(*paths)
        said += searched.said
        key = searched.key
    last = paths[-1]
    key = read_checkpoint(last, key=key).key
    kept = Kept([], [])
    if len(paths) > 1:
        kept = trainers_averages(last, key, paths[-2])
        said += kept.said
    held = [*_held(last, key, kept)]
    return RunTable(dict(by_step), held, found.left_out, said)


def _steps(found: RunFiles) -> list[int]:
    """The steps of the checkpoints; of one alone that has none, 0."""
    try:
        return checkpoint_steps(found.checkpoints)
    except TrajectoryError:
        if len(found.checkpoints) > 1:
            raise
        return [0]


def _held(last: Path, key: str, kept: Kept) -> Iterator[Held]:
    """The state dicts of the last checkpoint, and the averages beside it."""
    rows = dict(zip([(average.path, average.key) for average in kept.averages], kept.names, strict=True))
    file, outer, inner = in_file(last, key)
    with naming(file):
        inventory = Inventory(read_value(file))
    containers = inventory.containers or [Container("", read_checkpoint(last, key=key).tensors)]
    alike = inventory.alike(inner)
    for container in containers:
        place = (outer + container.key).rstrip(".")
        row = rows.pop((last, place), None)
        use = f"row of the report: {row}" if row else "–"
        if place == key:
            use = COMBINED
        what = _what(container)
        if place != key and any(container is other for other in alike):
            what = "of the model's names and shapes, but called no average"
        yield Held(file.name, place, what, container.rate, len(container.tensors), use)
    for average in kept.averages:
        if (average.path, average.key) in rows:
            name = rows[average.path, average.key]
            use = f"row of the report: {name}"
            yield Held(average.path.name, average.key, Role.AVERAGE.value, average.rate, len(average.tensors), use)


def _what(container: Container) -> str:
    """What a state dict seems to be, in words."""
    if container.is_collected:
        return "raw weights, kept while the average was in the model"
    if container.average_of is not None:
        of = container.average_of.key
        return f"an average of {of}" if of else Role.AVERAGE.value
    if container.is_no_average:
        return "called an average, of other names than the model"
    return container.role.value
