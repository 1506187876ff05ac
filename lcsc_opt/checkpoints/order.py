"""The order of checkpoints: the training step of each, by all that their contents and names tell."""

from __future__ import annotations

import contextlib
import itertools
import operator
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.content import Content, whole_number
from lcsc_opt.checkpoints.names import TORCH_SUFFIXES, Named, post_hoc_step, read_names
from lcsc_opt.checkpoints.reading import read_metadata
from lcsc_opt.checkpoints.torch_files import read_content

_STEP_OF_AI_TOOLKIT = re.compile(r'"step":\s*(?P<step>[0-9]{1,18})\b')  # {"step": 250, "epoch": 1}
_ADVICE = "rename the files, as model-100.pt, or pass --steps"


class _Clue(NamedTuple):
    """What tells the order: how a message calls it, and its number in each file, as far as it is known."""

    name: str
    numbers: tuple[int | None, ...]

    @property
    def tells(self) -> bool:
        """Whether it tells an order: a counter that is the same in all files is none."""
        return len(set(self.numbers) - {None}) > 1 or len(self.numbers) == 1

    @property
    def is_complete(self) -> bool:
        """Whether it tells the order of all files."""
        return None not in self.numbers and self.tells

    def contradicts(self, other: _Clue) -> bool:
        """Whether two files come in one order by this and in the opposite one by the other."""
        known = [(mine, theirs) for mine, theirs in zip(self.numbers, other.numbers, strict=True) if mine is not None]
        pairs = sorted((mine, theirs) for mine, theirs in known if theirs is not None)
        latest = -1  # by the other, of all files that are earlier by this
        for _, group in itertools.groupby(pairs, key=operator.itemgetter(0)):
            numbers = [theirs for _, theirs in group]
            if min(numbers) < latest:
                return True
            latest = max(latest, *numbers)
        return False


def checkpoint_steps(paths: Sequence[Path]) -> list[int]:
    """The training step of each checkpoint of a run; no weights are read.

    It is the first of these that is known of all files and varies: ``step`` or ``ss_steps`` in the metadata of
    safetensors, ``global_step``, ``step`` or ``iteration`` inside a torch file, of any type; the number in the names
    (:func:`read_names`); the epoch inside, or in the names. Where only dates are known, checkpoints are numbered. Times
    of files tell nothing: a copy has others.

    Raises:
        TrajectoryError: there is nothing of this; it is not clear which number in the names is the step; or two of
            these contradict each other, as steps do that begin again in each epoch.
    """
    named = read_names(paths)
    inside, epochs = _clues_inside(paths)
    epochs_in_names = _Clue("the epochs in the names", tuple(name.epoch for name in named))
    number = _number_in_names(paths, named, (inside, epochs, epochs_in_names))
    table = [inside, number, epochs, epochs_in_names]
    for clue in table:
        if clue.is_complete:
            against = next((other for other in table if clue.contradicts(other)), None)
            if against is None:
                return [step for step in clue.numbers if step is not None]
            raise TrajectoryError(
                f"{paths[-1]}: {clue.name} and {against.name} are in different orders, as where steps begin again in "
                f"each epoch, or runs are mixed: {_ADVICE}."
            )
    dates = [str(name.date) for name in named if name.date is not None]
    if len(set(dates)) == len(paths):
        return [1 + sorted(dates).index(date) for date in dates]
    if None in number.numbers:
        path = paths[number.numbers.index(None)]
        raise TrajectoryError(f"{path} has no step in its name or contents: {_ADVICE}.")
    return [step for step in number.numbers if step is not None]


def steps_inside(paths: Sequence[Path]) -> list[int | None]:
    """The steps that files hold, where they tell the order: without those that another clue contradicts."""
    inside, epochs = _clues_inside(paths)
    columns = _columns(read_names(paths))
    others = [epochs, *columns] if len(columns) == 1 else [epochs]
    is_wrong = not inside.tells or any(inside.contradicts(other) for other in others)
    return [None if is_wrong else step for step in inside.numbers]


def step_in_metadata(path: Path) -> int | None:
    """The step in the header of a safetensors file."""
    metadata = {}
    if path.is_file():
        with contextlib.suppress(TrajectoryError):  # the name of a damaged file may tell its step
            metadata = dict(read_metadata(path))
    for name in ("step", "ss_steps"):
        text = metadata.get(name, "")
        if text.isascii() and text.isdigit() and len(text) <= 18:
            return int(text)
    training_info = _STEP_OF_AI_TOOLKIT.search(metadata.get("training_info", ""))
    return None if training_info is None else int(training_info["step"])


def _clues_inside(paths: Sequence[Path]) -> tuple[_Clue, _Clue]:
    """The steps and the epochs inside the files."""
    steps, epochs = zip(*map(_counters_in_file, paths), strict=True)
    return _Clue("the steps inside the files", steps), _Clue("the epochs inside the files", epochs)


def _counters_in_file(path: Path) -> tuple[int | None, int | None]:
    """The step and the epoch inside a file."""
    step = step_in_metadata(path)
    if step is not None or not path.name.endswith(TORCH_SUFFIXES) or not path.is_file():
        return step, None
    with contextlib.suppress(Exception):  # a damaged file can raise anything, and its name may tell the step
        content = Content(read_content(path))
        steps = [whole_number(value, path) for value in content.steps]
        if content.is_post_hoc_ema and steps == [None] * len(steps):  # rounded to float16; that in the name is not
            steps = [post_hoc_step(path)]
        epochs = [whole_number(value, path) for value in content.epochs]
        return _first(steps), _first(epochs)
    return None, None


def _columns(named: Sequence[Named]) -> list[_Clue]:
    """The numbers in the names that may be the step."""
    numbers = [name.numbers for name in named]
    if len({len(found) for found in numbers}) > 1:
        numbers = [found[-1:] for found in numbers]
    known = [found or (None,) for found in numbers]
    return [_Clue("the numbers in the names", column) for column in zip(*known, strict=False)]


def _first(numbers: Sequence[int | None]) -> int | None:
    return next((number for number in numbers if number is not None), None)


def _number_in_names(paths: Sequence[Path], named: Sequence[Named], others: Sequence[_Clue]) -> _Clue:
    """The number in the names that is the step; of several, the only one that no other clue contradicts.

    Raises:
        TrajectoryError: it is not clear which it is, and the files do not say their steps.
    """
    columns = _columns(named)
    possible = [column for column in columns if not any(column.contradicts(other) for other in others)]
    if len(columns) == 1:
        return columns[0]
    if len(possible) == 1:
        return possible[0]
    if others[0].is_complete:
        return _Clue("", (None,) * len(paths))
    listed = " or ".join(str(column.numbers[-1]) for column in columns)
    raise TrajectoryError(f"{paths[-1]}: it is not clear which number in its name is the step ({listed}): {_ADVICE}.")
