"""Asks and tells an optimizer of Nevergrad's so that it repeats, fails with a sentence, and ends.

Some of them draw from the global generators of numpy and Python, which are seeded while they compute, and given back
as they were: the candidates of a study depend on nothing but its seed. Some compute in a thread of their own, which
would keep the process alive.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import cma.options_parameters
from nevergrad.optimization.base import Optimizer

from lcsc_opt.base.errors import LcscError, SearchFailedError, one_line
from lcsc_opt.base.reproducibility import blas_threads, seeded_generators

_POLL_SECONDS = 0.001
_MOST_SECONDS = 60.0  # that a thread may compute

T = TypeVar("T")


class Driver:
    """One running optimizer; a context manager that ends its threads.

    Args:
        build: makes the optimizer.
        name: of the optimizer, for messages.
        seed: of the study.

    Attributes:
        optimizer: Nevergrad's.

    Raises:
        LcscError: it cannot be built.
    """

    def __init__(self, build: Callable[[], Optimizer], name: str, seed: int = 0) -> None:
        self._name = name
        self._seed = seed
        self._asks = 0
        self._tells = 0
        self.optimizer: Optimizer = self._computed(build, "build")

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        for optimizer in _with_parts(self.optimizer):
            thread = getattr(optimizer, "_messaging_thread", None)
            if thread is not None:
                thread.stop()

    @property
    def finished(self) -> bool:
        """Whether it has nothing more to ask."""
        return bool(getattr(self.optimizer, "finished", False))

    @property
    def is_unchecked(self) -> bool:
        """Whether it follows a path on which it has moved since it last evaluated where it is."""
        return bool(getattr(self.optimizer, "is_unchecked", False))

    def ask(self, *, check: bool = False) -> Any:
        """Nevergrad's next candidate.

        Args:
            check: ask an optimizer that follows a path for a check of where it is; for others it means nothing.

        Raises:
            SearchFailedError: the optimizer raised an error.
        """
        self._asks += 1
        if hasattr(self.optimizer, "check_next"):
            self.optimizer.check_next = check
        return self._computed(self.optimizer.ask, "ask", self._asks)

    def tell(self, candidate: Any, loss: float) -> None:
        """The loss of a candidate that was asked.

        pycma knows its mirrored samples by their bits, and Nevergrad tells them rounded differently. The warning about
        it is nothing that a user could act on; such a sample is then one like any other.

        Raises:
            SearchFailedError: the optimizer raised an error.
        """
        self._tells += 1

        def tell() -> None:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "orphanated injected solution")
                self.optimizer.tell(candidate, loss)
            for optimizer in _with_parts(self.optimizer):
                _wait_for_thread(optimizer)

        self._computed(tell, "tell", self._tells)

    def _computed(self, step: Callable[[], T], *stream: str | int) -> T:
        """Compute a step of the optimizer, repeatably: the number of BLAS threads changes the candidates of CMA-ES.

        ``stream`` names the step: a verb, which also stands in the error, and how many there were of that kind.
        """
        pycma_defaults = cma.options_parameters.cma_default_options
        try:
            with blas_threads(1), seeded_generators(self._seed, *stream):
                seed_of_pycma = pycma_defaults["seed"]
                pycma_defaults["seed"] = math.nan  # seed nothing: pycma alone would seed numpy's generator by the time
                try:
                    return step()
                finally:
                    pycma_defaults["seed"] = seed_of_pycma
        except LcscError:
            raise
        except Exception as error:
            raise SearchFailedError(
                f"the optimizer {self._name} cannot {stream[0]} here: {one_line(error)}; take another one"
            ) from error


def _with_parts(optimizer: Optimizer) -> Iterator[Optimizer]:
    """An optimizer of Nevergrad's and, of a portfolio, those that it is made of."""
    waiting = [optimizer]
    seen: set[int] = set()
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        yield part
        for value in vars(part).values():
            values = value if isinstance(value, list) else [value]
            waiting += [item for item in values if isinstance(item, Optimizer)]


def _wait_for_thread(optimizer: Optimizer) -> None:
    """Wait until an optimizer's thread has computed what it asks next: it may draw from the global generators.

    Nevergrad's optimizers that wrap another library's have such a thread. After a minute the search goes on without it.
    """
    thread = getattr(optimizer, "_messaging_thread", None)
    if thread is None:
        return
    # it goes on only when all points that it gave out have their losses, also those of a batch that nobody asked yet
    waits_for_losses = optimizer.num_ask > optimizer.num_tell or getattr(optimizer, "_current_batch", None)
    if waits_for_losses:
        return
    give_up_at = time.monotonic() + _MOST_SECONDS
    while thread.is_alive() and thread.messages_ask.empty() and time.monotonic() < give_up_at:
        time.sleep(_POLL_SECONDS)
