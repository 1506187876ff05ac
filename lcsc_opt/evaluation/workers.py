"""The worker processes of a study: on this machine, one for each device, or on a Ray cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.machine import cores
from lcsc_opt.base.paths import BuildContext
from lcsc_opt.base.study_spec import StudySpec
from lcsc_opt.evaluation.pool import WorkerPool
from lcsc_opt.objective.contract import Objective

_MOST_A_CORE = 8  # processes that evaluate: those that wait for a GPU need little of one


def check_workers(spec: StudySpec) -> None:
    """Refuse more processes than this machine can run, before anything is loaded; a cluster counts for itself.

    Raises:
        StudySpecError: it is too small for so many.
    """
    most = _MOST_A_CORE * cores()
    if spec.ray is None and spec.worker_count > most:
        raise StudySpecError(
            f"workers: {spec.worker_count} processes on {cores()} cores; expected at most {most}, or auto: one for "
            "each GPU"
        )


@contextlib.contextmanager
def open_workers(
    spec: StudySpec,
    objective: Objective,
    *,
    loader: Callable[[], Objective],
    context: BuildContext,
) -> Iterator[WorkerPool | None]:
    """A study's worker processes, which start when they are first used; ``None`` if this process evaluates.

    Args:
        spec: of the study.
        objective: as this process has loaded it.
        loader: loads the same objective in a process of this machine; picklable.
        context: where its files are.

    Raises:
        ObjectiveError: a worker's device is not there.
        StudySpecError: the Ray cluster has no room; or as :func:`check_workers`.
    """
    check_workers(spec)
    expected = objective.key
    if spec.ray is not None:
        from lcsc_opt.evaluation.ray import ray_workers

        with ray_workers(spec.ray, spec.objective, objective, expected=expected, context=context) as pool:
            yield pool
    elif spec.worker_count == 1 and not spec.devices:
        yield None
    else:
        environments: Sequence[Mapping[str, str]] = ()
        if not spec.names_device:  # else all workers use that one
            from lcsc_opt.base import accelerator  # which imports torch

            environments = accelerator.environments(spec.worker_count, spec.devices)
        pool = WorkerPool(loader, spec.worker_count, expected=expected, environments=environments)
        with contextlib.closing(pool):
            yield pool
