"""The order of checkpoints: the training step of each, by all that their contents and names tell."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.progress import notice, progress
from lcsc_opt.checkpoints.counters import read_counters
from lcsc_opt.checkpoints.names import Named, is_end_by_name, read_names

_ADVICE = "rename the files, as model-100.pt, or give their steps (--steps; steps: in a study file)"


class _Clue(NamedTuple):
    """What may tell the order: how a message calls it, and its number in each file, ``None`` where it is not there."""

    name: str
    numbers: tuple[int | None, ...]

    @property
    def is_complete(self) -> bool:
        """Whether it tells the order of all files: a counter that is the same in several does not."""
        return None not in self.numbers and (len(set(self.numbers)) > 1 or len(self.numbers) == 1)

    def contradicts(self, other: _Clue) -> bool:
        """Whether two files come in one order by this and in the opposite one by the other."""
        pairs = sorted(
            (mine, theirs)
            for mine, theirs in zip(self.numbers, other.numbers, strict=True)
            if mine is not None and theirs is not None
        )
        latest = -1  # by the other, of all files that are earlier by this
        for _, group in itertools.groupby(pairs, key=operator.itemgetter(0)):  # files at one number have no order
            numbers = [theirs for _, theirs in group]
            if min(numbers) < latest:
                return True
            latest = max(latest, *numbers)
        return False


def checkpoint_steps(paths: Sequence[Path]) -> list[int]:
    """The training step of each checkpoint of a run; no weights are read.

    It is the first of these that all files have and that varies: the step in the metadata of safetensors or inside a
    torch file (:func:`read_counters`); the number in the names (:func:`read_names`); the epoch inside, or in the names.
    Times of files tell nothing: a copy has others.

    Raises:
        TrajectoryError: there is nothing of this; it is not clear which number in the names is the step; or two of
            these contradict each other, as steps do that begin again in each epoch.
    """
    named = read_names(paths)
    counters = []
    with progress("read steps", len(paths), after=2.0) as advance:
        for path in paths:
            counters.append(read_counters(path))
            advance()
    if all(each.step is None for each in counters):
        named = _with_number_of_end(paths, named)
    inside = _Clue("the steps inside the files", tuple(each.step for each in counters))
    epochs_inside = _Clue("the epochs inside the files", tuple(each.epoch for each in counters))
    epochs_in_names = _Clue("the epochs in the names", tuple(name.epoch for name in named))
    in_names = _step_in_names(paths, named, (inside, epochs_inside, epochs_in_names))
    clues = (inside, in_names, epochs_inside, epochs_in_names)
    # without a clue that tells the order of all, the names say which file lacks a step, or which are equal
    chosen = next((clue for clue in clues if clue.is_complete), in_names)
    steps = []
    for path, step in zip(paths, chosen.numbers, strict=True):
        if step is None:
            raise TrajectoryError(f"{path} has no step in its name or contents: {_ADVICE}.")
        steps.append(step)
    against = next((clue for clue in clues if chosen.contradicts(clue)), None)
    if against is not None:
        raise TrajectoryError(
            f"{paths[-1]}: {chosen.name} and {against.name} are in different orders, as where steps begin again "
            f"in each epoch, or runs are mixed: {_ADVICE}."
        )
    return steps


def _with_number_of_end(paths: Sequence[Path], named: list[Named]) -> list[Named]:
    """What the names tell; of a last file that is the end by its name, that it comes one interval after the others."""
    if not is_end_by_name(paths[-1], paths[:-1]):
        return named
    *_, before, last = sorted(name.numbers[-1] for name in named[:-1])
    number = last + (last - before)
    notice(f"{paths[-1].name} has no step inside, and is by its name the end of the others: it is taken as {number:,}")
    return [*named[:-1], named[-1]._replace(numbers=(number,))]


def _step_in_names(paths: Sequence[Path], named: Sequence[Named], others: Sequence[_Clue]) -> _Clue:
    """The number in the names that is the step; of several, the only one that no other clue contradicts.

    Args:
        paths: the checkpoints.
        named: what the name of each tells.
        others: the other clues, of which the first is the step inside the files.

    Raises:
        TrajectoryError: it is not clear which it is, and the files do not say their steps.
    """
    rows = [name.numbers for name in named]
    # names of several patterns have other numbers at the same place; the last is the step more often
    if len({len(row) for row in rows}) > 1:
        rows = [row[-1:] for row in rows]
    columns = zip(*(row or (None,) for row in rows), strict=True)
    clues = [_Clue("the numbers in the names", column) for column in columns]
    possible = clues
    if len(clues) > 1:
        possible = [clue for clue in clues if not any(clue.contradicts(other) for other in others)]
    # no two files have one step: of fairseq's checkpoint_1_500, checkpoint_1_1000, checkpoint_2_1500 it is the second
    distinct = [clue for clue in possible if len(set(clue.numbers)) == len(paths)]
    if len(distinct) == 1 and not any(distinct[0].contradicts(other) for other in possible):
        possible = distinct
    if len(possible) == 1:
        return possible[0]
    steps_inside = others[0]
    if steps_inside.is_complete:
        return _Clue("", (None,) * len(paths))  # none, which contradicts nothing: the files tell enough
    numbers = " or ".join(str(clue.numbers[-1]) for clue in clues)
    raise TrajectoryError(f"{paths[-1]}: it is not clear which number in its name is the step ({numbers}): {_ADVICE}.")
