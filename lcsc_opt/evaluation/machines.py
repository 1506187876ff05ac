"""What a pool asks of the places where its workers run."""

from __future__ import annotations

from typing import Protocol

from lcsc_opt.base.errors import LcscError
from lcsc_opt.evaluation.worker import Answer, Ending, Job, WorkerSettings


class Link(Protocol):
    """The way to one worker that was started, and back."""

    @property
    def machine(self) -> str:
        """What people call the machine that it runs on; empty while that is not known."""
        ...

    def send(self, job: Job) -> None:
        """Give it a job. Raises OSError where it is gone, which :meth:`receive` says, too."""
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
        """Whether workers come and go with their machines, and others do what one that is not there should do."""
        ...

    def threads(self, workers: int) -> int:
        """How many each of so many workers may use."""
        ...

    def start(self, settings: WorkerSettings) -> Link:
        """Start a worker, or ask for one that starts when there is room. Raises OSError where it cannot be started."""
        ...

    def refused(self, link: Link, error: LcscError) -> LcscError | None:
        """A worker could not load the objective, or has another: what its jobs raise, or ``None``.

        With ``None`` the worker is started again, elsewhere.
        """
        ...
