"""The interface of the places where a pool's workers run."""

from __future__ import annotations

from typing import Protocol

from lcsc_opt.base.errors import LcscError
from lcsc_opt.evaluation.worker import Answer, Ending, Job, WorkerSettings


class Link(Protocol):
    """The connection to one worker that was started."""

    @property
    def machine(self) -> str:
        """The name of the machine that it runs on; empty while this is not known."""
        ...

    def send(self, job: Job) -> None:
        """Give it a job. Raises OSError where it is gone; then :meth:`receive` raises, too."""
        ...

    def receive(self) -> Answer:
        """Wait for its next answer. Raises EOFError or OSError where it is gone."""
        ...

    def terminate(self) -> None:
        """Stop it, also in the middle of a job; :meth:`receive` then ends."""
        ...

    def join(self) -> Ending:
        """Wait until it is gone."""
        ...


class Machines(Protocol):
    """Where workers run."""

    @property
    def elastic(self) -> bool:
        """Whether workers come and go with their machines; then others do the jobs of a missing one."""
        ...

    def threads(self, workers: int) -> int:
        """How many threads each of ``workers`` workers may use."""
        ...

    def start(self, settings: WorkerSettings) -> Link:
        """Start a worker, or ask for one that starts when there is room. Raises OSError where it cannot be started."""
        ...

    def refused(self, link: Link, error: LcscError) -> LcscError | None:
        """The error for the jobs of a worker that could not load the objective, or has another one.

        With ``None`` the worker is started again, elsewhere.
        """
        ...
