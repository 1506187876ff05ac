"""Finds the checkpoints of a training run in files, globs and folders, with their steps, and selects from them."""

from __future__ import annotations

import contextlib
import filecmp
import glob
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field, NonNegativeInt, PositiveInt

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.paths import MANIFEST, WEIGHTS, expanded_path, natural_order
from lcsc_opt.base.progress import notice
from lcsc_opt.base.settings import FrozenModel
from lcsc_opt.checkpoints.counters import read_counters
from lcsc_opt.checkpoints.folders import find_weights
from lcsc_opt.checkpoints.left_out import shown_left_out, why_left_out
from lcsc_opt.checkpoints.names import (
    CHECKPOINT_SUFFIXES,
    has_step,
    is_end_by_name,
    is_numbered,
    is_numbered_folder,
    is_shard,
    is_state_file,
    is_weights_file,
    read_names,
    without_suffix,
)
from lcsc_opt.checkpoints.order import checkpoint_steps

_COPY = re.compile(r"(.*[-_.])?(latest|last|best|newest|final)([-_.=0-9].*)?", re.IGNORECASE)  # names of copies
_MOST_SERIES_NAMED = 8  # in a message
_USUAL_FOLDER = "checkpoints"  # in which Lightning and Accelerate save them
_DEEPEST = 3  # folders below the one that was named, in which a run is looked for
Patterns = str | Path | Sequence[str | Path]


class RunFiles(NamedTuple):
    """The checkpoints of a run, and what is left out, each with the reason: copies, and other files of weights.

    The latter only where the run's folder was named itself: who names files or a glob has chosen.
    """

    checkpoints: list[Path]
    left_out: Mapping[Path, str]


def find_checkpoints(patterns: Patterns, *, key: str | None = None, has_steps: bool = False) -> list[Path]:
    """The checkpoints that ``patterns`` stand for, as :func:`find_run`; a notice says what is left out, and why."""
    run = find_run(patterns, key=key, has_steps=has_steps)
    if run.left_out:
        patterns = as_patterns(patterns)
        listed = shown_left_out(expanded_path(patterns[0], error=TrajectoryError), run.left_out)
        notice(f"{_place(patterns)}: {len(run.checkpoints)} checkpoints; left out: {listed}")
    return run.checkpoints


def find_run(patterns: Patterns, *, key: str | None = None, has_steps: bool = False) -> RunFiles:
    """The checkpoints that ``patterns`` stand for, each once, and what is left out.

    Those of a glob or a folder are in natural order; several patterns stay in the order in which they are listed. The
    files of one folder, one glob, or a list that a shell expanded are treated alike.

    Args:
        patterns: files; globs such as ``"runs/ema_0.9999_*.pt"``; folders that are one checkpoint (diffusers,
            Accelerate); folders of them (``checkpoint-500``, ``checkpoint-1000`` …); and folders of files. States
            of optimizers, schedulers and random numbers are left out, unless a key is given and nothing else is named.
        key: which state dict; it may name a subfolder of a checkpoint folder.
        has_steps: whether the user names the steps of all files of a list, so that nothing depends on their names.

    Raises:
        TrajectoryError: no checkpoint, a missing path or broken link, a packed trajectory, or several
            series of checkpoints, such as averages of several rates.
    """
    patterns = as_patterns(patterns)
    checkpoints: dict[Path, None] = {}  # an ordered set
    for pattern in patterns:
        path = expanded_path(pattern, error=TrajectoryError)
        checkpoints.update(dict.fromkeys(sorted(_expand(path, key), key=natural_order)))
    states = [path for path in checkpoints if is_state_file(path)]  # a glob may match them
    are_meant = key is not None and len(states) == len(checkpoints)  # EDM's training-state-*.pt hold the raw weights
    if not are_meant:
        for path in states:
            del checkpoints[path]
    if not checkpoints:
        names = ", ".join(map(str, patterns[:4])) or "an empty list"
        raise TrajectoryError(
            f"No checkpoint in {names}: expected {_expected()}; optimizer states are not checkpoints."
        )
    for path in checkpoints:
        if not path.exists():
            raise TrajectoryError(f"{path} does not exist: put it back, or remove the link to it.")
    if has_steps and len(patterns) > 1:
        return RunFiles(list(checkpoints), {})
    left_out: dict[Path, str] = {}
    originals = _without_copies(list(checkpoints), left_out)
    used = _only_series(_place(patterns), originals, left_out)
    folder = expanded_path(patterns[0], error=TrajectoryError)
    # a folder that is itself one checkpoint is not that of a run
    if len(patterns) == 1 and folder.is_dir() and used != [folder]:
        for file, reason in why_left_out(folder, used, key).items():
            # copies and the like have a reason already, which says more
            if left_out.keys().isdisjoint([file, *file.parents]):
                left_out[file] = reason
    return RunFiles(used, left_out)


def _place(patterns: Sequence[str | Path]) -> str:
    """How messages call what the user named."""
    if len(patterns) == 1:
        return str(patterns[0])
    return "The list"


def as_patterns(patterns: Patterns) -> Sequence[str | Path]:
    """A sequence of patterns, also if there is only one."""
    if isinstance(patterns, (str, Path)):
        return [patterns]
    return patterns


def _expected() -> str:
    """What a message says that checkpoints are."""
    return f"files ending in {', '.join(CHECKPOINT_SUFFIXES)}, or folders named checkpoint-N"


def is_packed(path: Path) -> bool:
    """Whether ``path`` is a packed trajectory."""
    return (path / MANIFEST).is_file() and (path / WEIGHTS).is_file()


def _expand(pattern: Path, key: str | None) -> list[Path]:
    """The checkpoints that one pattern stands for, in any order."""
    if pattern.is_dir():
        return _in_folder(pattern, key)
    if pattern.exists():
        return [pattern]
    if not re.search(r"[*?\[]", str(pattern)):
        raise TrajectoryError(f"{pattern} does not exist: check the path.")
    matches = [Path(path) for path in glob.glob(str(pattern), recursive=True)]  # noqa: PTH207 - takes all patterns
    folders = [path for path in matches if not path.is_file() and not is_packed(path)]  # and links to nothing
    checkpoints = [folder for folder in folders if _why_no_checkpoint(folder, key) is None]
    return [*checkpoints, *(path for path in matches if is_weights_file(path) or is_state_file(path))]


def _in_folder(folder: Path, key: str | None, depth: int = 0) -> list[Path]:
    """The checkpoints in a folder: its largest series of files or folders, or that of a folder in it; or itself.

    What else may be the end of the run is given with them, such as ``final/`` and ``last.ckpt``, which is decided with
    the steps of all.

    Raises:
        TrajectoryError: there is none, or a larger series lies elsewhere in the folder.
    """
    if is_packed(folder):
        raise TrajectoryError(f"{folder} is packed already: give it alone, without checkpoints.")
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise TrajectoryError(f"{folder} cannot be read: {error.strerror}.") from error
    folders, reasons = _numbered_folders(entries, key)
    files = [path for path in entries if is_weights_file(path) and not is_shard(path)]
    numbered = [*folders, *filter(is_numbered, files)]
    # not may_be_alone: the only file of any name may be a run of one checkpoint, and its name tells the step
    is_checkpoint = not folders and _why_no_checkpoint(folder, key, may_be_alone=False) is None
    if is_checkpoint:
        beside = find_weights(folder, None, may_be_alone=False).alternatives  # such as Accelerate's model_1
        numbered = [path for path in numbered if without_suffix(path.name) not in beside]
        if _largest(numbered) < 2:
            return [folder]
    inner = {}
    if depth < _DEEPEST:
        inner = _runs_in(set(entries) - set(folders), key, depth, may_be_short=not numbered)
    larger = {place: run for place, run in inner.items() if not numbered or _largest(run) > _largest(numbered)}
    if numbered and larger:
        here = ", ".join(sorted({named.glob for named in read_names(numbered)})[:_MOST_SERIES_NAMED])
        raise _several_series(str(folder), {here: _largest(numbered), **_counts(larger)})
    if len(larger) > 1:
        raise _several_series(str(folder), _counts(larger))
    for run in larger.values():
        return [*run, *files]
    if folders:
        return [*folders, *_unnumbered(entries, key)]
    if files:
        return files
    for path, reason in reasons.items():  # of the first one
        raise TrajectoryError(f"{path} {reason}")
    names = ", ".join(path.name for path in entries[:4]) or "nothing"
    raise TrajectoryError(f"No checkpoint in {folder}: expected {_expected()}; it holds {names}.")


def _numbered_folders(entries: Sequence[Path], key: str | None) -> tuple[list[Path], dict[Path, str]]:
    """The folders that are checkpoints, by a number in their names; and why others that are called so are none.

    One alone is called so: ``checkpoint-500``, ``epoch_3``, ``1000``. Of several, the number differs.
    """
    possible = [path for path in entries if has_step(path.name) and not path.is_file()]  # a broken link is named later
    names = read_names(possible)
    sizes = Counter(name.series for name in names)
    reasons = {}
    checkpoints = []
    for path, name in zip(possible, names, strict=True):
        is_called_so = is_numbered_folder(path.name)
        if not is_called_so and (sizes[name.series] < 2 or not path.exists()):
            continue
        reason = _why_no_checkpoint(path, key)
        if reason is None:
            checkpoints.append(path)
        elif is_called_so:
            reasons[path] = reason
    return checkpoints, reasons


def _runs_in(entries: Collection[Path], key: str | None, depth: int, *, may_be_short: bool) -> dict[Path, list[Path]]:
    """Folder → the run in it, of two checkpoints or more; ``may_be_short``: in ``checkpoints/`` one is enough."""
    runs = {}
    for place in sorted(entries):
        if place.name.startswith(".") or not place.is_dir() or place.is_symlink() or is_packed(place):
            continue
        try:
            run = _in_folder(place, key, depth + 1)
        except SeveralSeriesError:
            if may_be_short:  # else there is a run beside
                raise
        except TrajectoryError:  # it holds something else
            continue
        else:
            if _largest(run) > 1 or (may_be_short and place.name == _USUAL_FOLDER):
                runs[place] = run
    return runs


def _largest(paths: Sequence[Path]) -> int:
    """How many checkpoints the largest series has, of those whose number differs."""
    numbered = [path for path in paths if is_numbered(path)]
    return max(Counter(named.series for named in read_names(numbered)).values(), default=0)


def _counts(runs: Mapping[Path, Sequence[Path]]) -> dict[str, int]:
    """Folder → how many checkpoints its largest series has."""
    return {str(place): _largest(run) for place, run in runs.items()}


class SeveralSeriesError(TrajectoryError):
    """A folder or a list holds several series: a question to the user, with what may be chosen."""


def _several_series(place: str, counts: Mapping[str, int]) -> SeveralSeriesError:
    """The question, with how many checkpoints each series has."""
    listed = ", ".join(f"{series} ({count})" for series, count in sorted(counts.items())[:_MOST_SERIES_NAMED])
    return SeveralSeriesError(
        f"{place} holds several series of checkpoints: {listed}. Choose one, quoted, or give the steps "
        "(lcsc trajectory pack --steps)."
    )


def _unnumbered(entries: Sequence[Path], key: str | None) -> list[Path]:
    """Weights beside numbered folders, as ``final/`` and a root's ``pytorch_model.bin``: perhaps the end of the run."""
    folders = [path for path in entries if path.is_dir() and _COPY.fullmatch(path.name)]
    files = [path for path in entries if is_weights_file(path) and not is_shard(path)]
    return [*(folder for folder in folders if _why_no_checkpoint(folder, key) is None), *files]


def _why_no_checkpoint(folder: Path, key: str | None, *, may_be_alone: bool = True) -> str | None:
    """Why a folder is no checkpoint; ``None`` if it is one. ``may_be_alone`` is as for :func:`find_weights`."""
    if not folder.exists():
        if is_numbered_folder(folder.name):  # a link to nothing is a gap in the series, which is refused later
            return None
        return "does not exist"
    reason = ""
    for candidate in (key, None):  # the key may also be one of the file inside
        try:
            find_weights(folder, candidate, may_be_alone=may_be_alone)
        except (TrajectoryError, OSError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            continue
        return None
    return reason


def _without_copies(paths: list[Path], left_out: dict[Path, str]) -> list[Path]:
    """Without links to others, and without ``latest``, ``best-3.ckpt`` and the like that have another's bytes.

    These are put into ``left_out``, each with its reason.
    """
    suspects = [path for path in paths if path.is_symlink() or _COPY.fullmatch(path.stem) is not None]
    originals = [path for path in paths if path not in suspects]
    for path in suspects:
        original = next((original for original in originals if _is_same(path, original)), None)
        if original is None:
            originals.append(path)
        else:
            left_out[path] = f"it is {original.name}"
    return [path for path in paths if path not in left_out]


def _is_same(path: Path, other: Path) -> bool:
    """Whether both are one file; or have the same bytes, which are compared only for the usual names of copies."""
    with contextlib.suppress(OSError):
        if path.samefile(other):
            return True
        if _COPY.fullmatch(path.stem) is not None and path.is_file() and other.is_file():
            return filecmp.cmp(path, other, shallow=False)
    return False


def _only_series(place: str, paths: list[Path], left_out: dict[Path, str]) -> list[Path]:
    """The paths of a series, in their order; ``last.ckpt`` and its like are its end, or left out of it.

    Args:
        place: what the user named, for messages.
        paths: the checkpoints that were found there.
        left_out: gets the paths that are left out, each with its reason.

    Raises:
        TrajectoryError: the paths are of several series; the message has a glob for each.
    """
    numbered = [path for path in paths if is_numbered(path)]
    unnumbered = [path for path in paths if not is_numbered(path)]
    numbered_names = read_names(numbered)
    others = [path for path, named in zip(numbered, numbered_names, strict=True) if Path(named.glob) != Path(place)]
    # the user may have named a glob that a message offered: model_*.pt, which also matches model_100_ema.pt
    if 0 < len(others) < len(numbered):
        left_out.update(dict.fromkeys(others, "of another series"))
        return _only_series(place, [path for path in paths if path not in others], left_out)
    sizes = Counter(named.series for named in numbered_names)
    # one file is no series: MONAI's checkpoint_final_iteration=8000.pt beside its epochs, kohya's hat_v2.safetensors
    alone = [path for path, named in zip(numbered, numbered_names, strict=True) if sizes[named.series] == 1]
    is_one_series = len(sizes) - len(alone) == 1
    of_series = [(path, named) for path, named in zip(numbered, numbered_names, strict=True) if sizes[named.series] > 1]
    # the numbers of another pattern, and of folders beside files, may count other things
    if is_one_series and len({(path.is_dir(), _numbered_parts(named.glob)) for path, named in of_series}) > 1:
        raise _several_series(place, Counter(named.glob for _, named in of_series))
    if is_one_series:
        numbered = [path for path in numbered if path not in alone]
        used = numbered
        for path in unnumbered + alone:
            copied = _copied_at_end(path, numbered)
            if copied is not None:
                left_out[path] = f"it is {copied.name}"
                continue
            # kohya's hat_v2.safetensors beside hat_v2-000001.safetensors
            has_their_name = all(other.stem.startswith(path.stem) for other in numbered)
            if (path in unnumbered or has_their_name) and _is_later(path, used):
                used = [*numbered, path]  # a run has one end: of final.pt and last.pt, the later one
        reason = "not of the series by its name, and not clearly its end by a step inside: give it a number, as theirs"
        left_out.update((path, reason) for path in unnumbered + alone if path not in (*used, *left_out))
        return used
    names_read = read_names(paths)
    sizes = Counter(named.series for named in names_read)
    if len(sizes) > 1 and max(sizes.values()) > 1:
        raise _several_series(place, Counter(named.glob for named in names_read))
    return paths


def _copied_at_end(path: Path, numbered: Sequence[Path]) -> Path | None:
    """The checkpoint that has the bytes of a file that is the end of a run by its name; ``None`` if it is no copy."""
    if not is_end_by_name(path, numbered):
        return None
    return next((other for other in numbered if filecmp.cmp(path, other, shallow=False)), None)


def _numbered_parts(pattern: str) -> tuple[str, ...]:
    """The parts of a glob in which numbers stand, whatever the format of the files and the folders above them."""
    return tuple(without_suffix(part) for part in Path(pattern).parts if "*" in part)


def _is_later(path: Path, others: Sequence[Path]) -> bool:
    """Whether a checkpoint is the end of a run that has these others: all tell their steps, and its own is the last."""
    # the number in its name may count something else
    if is_numbered(path) and read_counters(path).step is None and not is_end_by_name(path, others):
        return False
    try:
        *steps, last = checkpoint_steps([*others, path])
    except TrajectoryError:  # the files do not tell it
        return False
    return last > max(steps)


class Selection(FrozenModel):
    """Checkpoints of a window, an interval apart, as Liu et al. select them (Sec. 5.1 and App. B).

    The window and the interval count back from the last remaining step, n_K. Rules that are ``None`` are not applied;
    the others are applied in this order:

    Attributes:
        last_step: drops checkpoints after this step, as if the training had ended there.
        first_step: drops checkpoints before this step.
        window: n_K − n_1, in steps; leaves out what is further than this from the last step. The window of 40,000 with
            an interval of 100 is 401 checkpoints.
        interval: n_k − n_{k−1}, in steps. The points are n_K, n_K − interval, n_K − 2 · interval …, down to the first
            step that is left. Each checkpoint belongs to its nearest point, and each point keeps its nearest
            checkpoint; of two that are equally near, the later one. Where the steps are multiples of a number that
            divides the interval, this keeps (n_K − n) % interval = 0. A step that is off by one, or a last checkpoint
            between two regular ones, does not empty the selection.
        last: keeps this many of the last ones.
        count: of these, keeps this many evenly spaced ones, the last among them; all if there are fewer.

    Raises:
        pydantic.ValidationError: a number that is not whole, or too small.
    """

    last: Annotated[int, Field(ge=2)] | None = None
    first_step: NonNegativeInt | None = None
    window: PositiveInt | None = None
    interval: PositiveInt | None = None
    last_step: PositiveInt | None = None
    count: Annotated[int, Field(ge=2)] | None = None

    @property
    def given(self) -> dict[str, int]:
        """The rules that are applied, name → number."""
        return self.model_dump(exclude_none=True)

    def chosen(self, steps: Sequence[int]) -> list[int]:
        """The ``steps`` that are selected, in order.

        Args:
            steps: ``[K]``, increasing.

        Raises:
            TrajectoryError: fewer than two remain; the message names the available steps.
        """
        lowest_step = self.first_step or min(steps)
        highest_step = self.last_step or max(steps)
        final = max((step for step in steps if step <= highest_step), default=0)  # n_K; 0 where none is left
        if self.window is not None:
            lowest_step = max(lowest_step, final - self.window)
        chosen = [step for step in steps if lowest_step <= step <= highest_step]
        if self.interval is not None:
            chosen = _nearest_to_grid(chosen, self.interval)
        if self.last is not None:
            chosen = chosen[-self.last :]
        if self.count is not None and self.count < len(chosen):
            interval = (len(chosen) - 1) / (self.count - 1)
            chosen = [chosen[round(index * interval)] for index in range(self.count)]
        if len(chosen) < 2:
            rules = ", ".join(f"{name} {value}" for name, value in self.given.items()) or "this"
            raise TrajectoryError(
                f"{rules} leaves {len(chosen)} of {len(steps)} checkpoints and a trajectory needs at least 2; their "
                f"steps: {shown_steps(steps)}."
            )
        return chosen


def shown_steps(steps: Sequence[int]) -> str:
    """Steps for a message: the first ones, and the last."""
    texts = [str(step) for step in steps]
    if len(texts) > 8:
        texts[7:-1] = ["…"]
    return ", ".join(texts) or "none"


def span_of(steps: Sequence[int]) -> str:
    """How many checkpoints these are, and their steps: ``3 checkpoints, steps 100 to 300``."""
    if len(steps) == 1:
        return f"1 checkpoint, step {steps[0]}"
    return f"{len(steps)} checkpoints, steps {steps[0]} to {steps[-1]}"


def _nearest_to_grid(steps: Sequence[int], interval: int) -> list[int]:
    """For every multiple of ``interval``, counted back from the last step, the step that is nearest to it.

    ``steps`` increase; a multiple that is the nearest of no step is passed over.
    """
    nearest: dict[int, tuple[int, int]] = {}  # multiple → (distance to it, −step)
    for step in steps:
        age = steps[-1] - step
        multiple = (2 * age + interval - 1) // (2 * interval)  # halves go to the later checkpoint's multiple
        multiple = min(multiple, (steps[-1] - steps[0]) // interval)  # no point lies before the first step
        candidate = (abs(age - multiple * interval), -step)  # of two as near, the smaller is the later step
        nearest[multiple] = min(nearest.get(multiple, candidate), candidate)
    return sorted(-negative_step for _, negative_step in nearest.values())
