"""A queue of jobs for workers that several users share; users are served in turns."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Hashable, Iterator, Mapping
from typing import Generic, Protocol, TypeVar


class Queued(Protocol):
    """A waiting job: its user, and the worker that has to do it, ``None`` for any."""

    @property
    def user(self) -> Hashable:
        """The user who submitted it."""
        ...

    @property
    def worker(self) -> int | None:
        """Which worker has to do it."""
        ...


Item = TypeVar("Item", bound=Queued)


class FairQueue(Generic[Item]):
    """The user with the fewest running jobs is served first; among equals, the one who was served longest ago.

    The jobs of one user for the same worker, or for any, keep their order.
    """

    def __init__(self) -> None:
        self._waiting: dict[Hashable, dict[int | None, collections.deque[Item]]] = {}
        self._served: dict[Hashable, int] = {}
        self._count = itertools.count(1)

    def add(self, item: Item) -> None:
        """Add a job behind the others of its user."""
        self._waiting.setdefault(item.user, {}).setdefault(item.worker, collections.deque()).append(item)

    def in_turn(self, running: Mapping[Hashable, int]) -> Iterator[Item]:
        """The first job of each user for each worker, in the order in which they should be done.

        Args:
            running: user → how many of their jobs workers have now.
        """
        users = sorted(self._waiting, key=lambda user: (running.get(user, 0), self._served.get(user, 0)))
        for user in users:
            yield from [queue[0] for queue in self._waiting[user].values()]

    def take(self, item: Item) -> None:
        """Remove a job that :meth:`in_turn` gave; its user counts as served."""
        self._served[item.user] = next(self._count)
        of_user = self._waiting[item.user]
        of_user[item.worker].popleft()
        if not of_user[item.worker]:
            del of_user[item.worker]
        if not of_user:
            del self._waiting[item.user]

    def withdraw(self, user: Hashable) -> list[Item]:
        """Remove all jobs of one user."""
        self._served.pop(user, None)
        return [item for queue in self._waiting.pop(user, {}).values() for item in queue]

    def clear(self) -> list[Item]:
        """Remove all jobs."""
        return [item for user in tuple(self._waiting) for item in self.withdraw(user)]
