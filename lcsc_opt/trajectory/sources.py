"""Which checkpoints are packed: files and folders by their training steps, selected ones, and their fingerprint."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from lcsc_opt.base.errors import StudySpecError, TrajectoryError
from lcsc_opt.base.progress import notice
from lcsc_opt.checkpoints import hub
from lcsc_opt.checkpoints.finding import Selection, checkpoint_step, step_in_file
from lcsc_opt.checkpoints.names import checkpoint_series, natural_order, width_in_name
from lcsc_opt.coefficients.rows import Row, check_width
from lcsc_opt.trajectory.layout import EXACT

Sources = Mapping[Row, Path]
"""Training step and width → checkpoint that is not packed yet, in this order."""


def find_sources(
    paths: Sequence[Path], steps: Sequence[int] | None = None, widths: Sequence[float] | None = None
) -> dict[Row, Path]:
    """The checkpoints by their steps, and averages by their widths, in this order. No weights are read.

    EDM2's averages tell their width in their names. Those of step 0, which are averages of nothing, are left out.

    Args:
        paths: the checkpoints.
        steps: the step of each checkpoint; ``None`` reads them from metadata, names and contents.
        widths: of averages whose names do not tell, ``sigma_rel`` of each series, in the natural order of the series.

    Raises:
        TrajectoryError: the step of a checkpoint is unknown, or not the given one; the numbers of steps and
            checkpoints, or of widths and series, differ; a name tells another width; or two checkpoints have the same
            step and width.
    """
    if steps is None:
        steps = [checkpoint_step(path) for path in paths]
    else:
        steps = [int(step) for step in steps]
        _check_steps(paths, steps)
    width_of = _widths(paths, widths)
    rows = [Row(step, width) for step, width in zip(steps, width_of, strict=True)]
    sources: dict[Row, Path] = {}
    for row, path in sorted(zip(rows, paths, strict=True)):
        earlier = sources.get(row)
        if earlier is not None:
            same_series = checkpoint_series(earlier) == checkpoint_series(path)
            advice = "Leave one out."
            if not same_series:
                advice = "Name the files of one series; if they are averages of several widths, give --widths."
            raise TrajectoryError(f"{str(row).capitalize()} appears twice: {earlier} and {path}. {advice}")
        if row.width and not row.step:
            notice(f"{path.name} left out: an average before the first step")
            continue
        sources[row] = path
    if not sources:
        raise TrajectoryError(
            "All averages are of step 0: an average with a width needs the step up to which it was made: give --steps."
        )
    return sources


def _widths(paths: Sequence[Path], widths: Sequence[float] | None) -> list[float]:
    """The width of each checkpoint: given for its series, else told by its name, else 0."""
    named = [width_in_name(path) or 0.0 for path in paths]
    if widths is None:
        return named
    all_series = sorted({checkpoint_series(path) for path in paths}, key=lambda series: natural_order(Path(series)))
    if len(widths) != len(all_series):
        raise TrajectoryError(
            f"--widths: expected {len(all_series)}, one for each series ({', '.join(all_series)}), got {len(widths)}."
        )
    width_of = dict(zip(all_series, widths, strict=True))
    given = [width_of[checkpoint_series(path)] for path in paths]
    for path, width, told in zip(paths, given, named, strict=True):
        try:
            check_width(Row(1, width))
        except StudySpecError as error:
            raise TrajectoryError(f"--{error}.") from error
        if told not in (0.0, width):
            raise TrajectoryError(
                f"{path}: --widths gives it width {width:g}, but its name says {told:g}: leave --widths out."
            )
    return given


def _check_steps(paths: Sequence[Path], steps: Sequence[int]) -> None:
    """Refuse steps that a user gave and the files contradict, as when a shell has put 10.50.pt before 2.50.pt.

    Names do not count: their numbers may mean something else, and ``--steps`` is how a user says so.
    """
    if len(steps) != len(paths):
        raise TrajectoryError(f"--steps: expected {len(paths)}, one for each checkpoint, got {len(steps)}.")
    for step, path in zip(steps, paths, strict=True):
        saved_step = step_in_file(path)
        if saved_step not in (None, step):
            raise TrajectoryError(
                f"{path}: --steps gives it step {step}, but it was saved at step {saved_step}: name the files in the "
                "order of the steps, or leave --steps out."
            )


def select_sources(sources: Sources, selection: Selection) -> dict[Row, Path]:
    """The sources that ``selection`` chooses, two or more, with all widths of a step; a notice says which.

    Raises:
        TrajectoryError: fewer than two are left.
    """
    all_steps = sorted({row.step for row in sources})
    if len(all_steps) == 1 and len(sources) > 1 and not selection.given:
        return dict(sources)  # several widths of one step
    steps = [all_steps[position] for position in selection.choose(all_steps)]
    selected = {row: path for row, path in sources.items() if row.step in steps}
    if selection.given:
        intervals = {later - earlier for earlier, later in itertools.pairwise(steps)}
        apart = " to ".join(str(interval) for interval in sorted({min(intervals), max(intervals)}))
        span = f"steps {steps[0]} to {steps[-1]}, {apart} apart"
        notice(f"of {len(sources)} checkpoints, selected {len(selected)}: {span}")
    return selected


def sources_fingerprint(sources: Sources, key: str | None, dtype: str) -> str:
    """SHA-256, in hex, of the paths, sizes, times and steps of the checkpoints, the key and the dtype.

    Raises:
        TrajectoryError: a checkpoint cannot be read.
    """
    described: list[tuple[float | int | str, ...]] = []
    for row, path in sources.items():
        size, newest = _size_and_time(path)
        width = (row.width,) if row.width else ()
        described.append((row.step, str(path.resolve()), size, newest, *width))
    content: list[object] = [described, key]
    if dtype != EXACT:
        content.append(dtype)
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _size_and_time(path: Path) -> tuple[int, int]:
    """The bytes of a checkpoint's files, and the latest of their times in nanoseconds; zeros for a hub's revision."""
    if hub.repository_of(path):  # its path names the revision, whose content never changes
        return 0, 0
    try:
        files = [path, *path.rglob("*")]
        status = [file.stat() for file in files if file.is_file()]
    except OSError as error:
        raise TrajectoryError(f"{path} cannot be read: {error.strerror}.") from error
    size = sum(entry.st_size for entry in status)
    newest = max((entry.st_mtime_ns for entry in status), default=0)
    return size, newest
