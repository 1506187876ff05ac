"""Whether checkpoints are the steps of one run: no weights twice, and each nearest to its neighbours."""

from __future__ import annotations

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.progress import notice
from lcsc_opt.trajectory.manifest import Manifest, SavedRow
from lcsc_opt.trajectory.trajectory import Trajectory

_FEWEST = 5  # checkpoints that tell anything
_NEARER = 0.6  # of the distance between neighbours; unrelated weights of one size have 1, a steady run has 2
_SHARE = 0.75  # of the places at which that is so


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

    Args:
        trajectory: all checkpoints of a run.
        steps_given: whether the user has named the steps, and knows better: then this is only a notice.

    Raises:
        TrajectoryError: naming three files.
    """
    if len(trajectory) < _FEWEST or not trajectory.varying:
        return
    place = _mixed_at(trajectory)
    if place is None:
        return
    first, between, second = (
        trajectory.sources[index] or f"step {trajectory.steps[index]}" for index in range(place, place + 3)
    )
    problem = (
        f"{first} is nearer to {second} than to {between}, which comes between them by its step, and most checkpoints "
        "are so: they are of several runs, or not in the order of the training"
    )
    if steps_given:
        notice(problem)
        return
    raise TrajectoryError(f"{problem}: name the files of one run; or give the steps (lcsc trajectory pack --steps).")


def _mixed_at(trajectory: Trajectory) -> int | None:
    """The index of the first checkpoint that is nearer to the second next than to the next; ``None`` if few are.

    Three samples are in memory at a time.
    """
    is_nearer: list[bool] = []
    first = trajectory.sample(0)
    between = trajectory.sample(1)
    for index in range(2, len(trajectory)):
        second = trajectory.sample(index)
        to_next = min(float((between - first).norm()), float((second - between).norm()))
        is_nearer.append(float((second - first).norm()) < _NEARER * to_next)
        first = between
        between = second
    if sum(is_nearer) < _SHARE * len(is_nearer):
        return None
    return is_nearer.index(True)
