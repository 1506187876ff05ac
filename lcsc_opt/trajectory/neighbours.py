"""Whether checkpoints are the steps of one run: no weights twice, each nearest to its neighbours, and none far off."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.progress import notice
from lcsc_opt.trajectory.manifest import Manifest, SavedRow
from lcsc_opt.trajectory.trajectory import Trajectory

_FEWEST = 4  # checkpoints that tell anything
_NEARER = 0.6  # of the distance between neighbours; unrelated weights of one size have 1, a steady run has 2
_SHARE = 0.75  # of the places at which that is so
_FURTHER = 4.0  # of a last checkpoint, times the largest distance between others


def check_distinct(manifest: Manifest) -> None:
    """Refuse two steps with the same weights: training never stood still, so a step was misread or a file is a copy.

    Checkpoints that are all the same are left to the search, which says what that means.

    Raises:
        TrajectoryError: naming both files.
    """
    first_with: dict[str, SavedRow] = {}
    for saved in manifest.checkpoints:
        first = first_with.setdefault(saved.sha256, saved)
        if first is not saved and manifest.varying:  # else all are the same
            raise TrajectoryError(
                f"{first.source} and {saved.source} hold the same weights, at steps {first.step} and {saved.step}: one "
                "is a copy, or its number counts something else. Leave one out, by naming the files or a window."
            )


def check_neighbours(trajectory: Trajectory, *, steps_given: bool) -> None:
    """Refuse checkpoints of mixed runs, or in a wrong order: each is nearer to the second next than to the next.

    Where this is not so, a notice names a single checkpoint that is far from those beside it.

    Args:
        trajectory: all checkpoints of a run.
        steps_given: whether the user has named the steps, and knows better: then there is only a notice.

    Raises:
        TrajectoryError: naming three files.
    """
    if len(trajectory) < _FEWEST or not trajectory.varying:
        return
    apart, across = _distances(trajectory)
    is_nearer = [distance < _NEARER * min(apart[index : index + 2]) for index, distance in enumerate(across)]
    names = [source or f"step {step}" for source, step in zip(trajectory.sources, trajectory.steps, strict=True)]
    if len(trajectory) == _FEWEST or sum(is_nearer) < _SHARE * len(is_nearer):  # one more tells of mixed runs
        far = _far_from_others(trajectory.steps, apart, across)
        if len(far) == 1:  # several are how the run was trained, such as in cycles
            notice(
                f"{names[far[0]]} is much further from the checkpoints beside it than these are from others: it may be "
                "of another run, or after a higher learning rate; to leave it out, list the others"
            )
        return
    place = is_nearer.index(True)
    first, between, second = names[place : place + 3]
    problem = (
        f"{first} is nearer to {second} than to {between}, which comes between them by its step, and most checkpoints "
        "are so: they are of several runs, or not in the order of the training"
    )
    if steps_given:
        notice(problem)
        return
    raise TrajectoryError(f"{problem}: name the files of one run; or give the steps (lcsc trajectory pack --steps).")


def _distances(trajectory: Trajectory) -> tuple[list[float], list[float]]:
    """Of each checkpoint to the next ``[K − 1]``, and to the second next ``[K − 2]``; three samples are in memory."""
    apart: list[float] = []
    across: list[float] = []
    first = between = trajectory.sample(0)
    for index in range(1, len(trajectory)):
        second = trajectory.sample(index)
        apart.append(float((second - between).norm()))
        across.append(float((second - first).norm()))
        first = between
        between = second
    return apart, across[1:]  # its first number is of the first two


def _far_from_others(steps: Sequence[int], apart: Sequence[float], across: Sequence[float]) -> list[int]:
    """The indices of checkpoints that may be of another run, from the distances to the next and the second next ones.

    One is far from both neighbours, which are near to each other and to those beyond: without the latter, it may be
    the start of a cycle of the learning rate. The last one is far from the one before, and after no more steps.
    """
    found = []
    for index, distance in enumerate(across):
        others = [distance, *apart[max(index - 2, 0) : index], *apart[index + 2 : index + 4]]
        if max(others) < _NEARER * min(apart[index : index + 2]):
            found.append(index + 1)
    gaps = [later - step for step, later in itertools.pairwise(steps)]
    if apart[-1] > _FURTHER * max(apart[:-1]) > 0 and gaps[-1] <= max(gaps[:-1]):
        found.append(len(apart))
    return found
