"""How straight the way from a study file to the answer is: calls, classes, and reads of all studies' attributes.

``python benchmarks/way.py`` runs one search of a function of eight coefficients, with its report, and counts what of
lcsc_opt is called. Counts are the same on every machine.
"""

from __future__ import annotations

import collections
import os
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

import nevergrad.optimization.base as nevergrad
from optuna.storages import RDBStorage

import lcsc_opt

ROOT = str(Path(lcsc_opt.__file__).parent) + os.sep
FUNCTIONS = """
def norm(c): return float(((c - .1) ** 2).sum())
def held_out(c): return float(((c - .11) ** 2).sum())
"""
SETTINGS = {"callable": "target:norm", "held_out": "target:held_out", "steps": list(range(1, 9))}
STUDY = {
    "name": "way",
    "objective": {"file": "function.py", "settings": SETTINGS},
    "optimizers": ["LCSC"],
    "budget": {"evaluations": 6},
    "held_out": {"top": 6},
}


class Counter:
    """Counts the calls of functions of lcsc_opt, until the first ask, between tells, and in all."""

    def __init__(self) -> None:
        self.calls = 0
        self.until_first_ask = 0
        self.at_tells: list[int] = []
        self.classes: collections.Counter[str] = collections.Counter()
        self.reads = 0

    def profile(self, frame: FrameType, event: str, _: Any) -> None:
        """Of ``sys.setprofile``."""
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(ROOT) or code.co_name.startswith("<"):
            return
        self.calls += 1
        first = next(iter(code.co_varnames[: code.co_argcount]), None)
        owner = frame.f_locals.get(first) if first in ("self", "cls") else None
        if owner is not None:
            kind = owner if isinstance(owner, type) else type(owner)
            if kind.__module__.startswith("lcsc_opt."):
                self.classes[kind.__qualname__] += 1


def main() -> None:
    """Print the counts."""
    counter = Counter()
    ask, tell, read = nevergrad.Optimizer.ask, nevergrad.Optimizer.tell, RDBStorage.get_all_studies

    def counted_ask(self: Any) -> Any:
        counter.until_first_ask = counter.until_first_ask or counter.calls
        return ask(self)

    def counted_tell(self: Any, *arguments: Any, **options: Any) -> None:
        counter.at_tells.append(counter.calls)
        tell(self, *arguments, **options)

    def counted_read(self: Any) -> Any:
        counter.reads += 1
        return read(self)

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("target.py").write_text(FUNCTIONS)
        lcsc_opt.run(STUDY, storage="sqlite:///warm.db")  # imports are no part of the way
        nevergrad.Optimizer.ask, nevergrad.Optimizer.tell = counted_ask, counted_tell
        RDBStorage.get_all_studies = counted_read  # type: ignore[method-assign]
        sys.setprofile(counter.profile)
        lcsc_opt.run(STUDY, storage="sqlite:///way.db")
        sys.setprofile(None)
        os.chdir("/")
    trials = [later - earlier for earlier, later in zip(counter.at_tells, counter.at_tells[1:], strict=False)]
    print(f"calls: {counter.until_first_ask} until the first ask, {trials} a trial, {counter.calls} with the report")
    print(f"reads of all studies' attributes: {counter.reads}")
    print(f"classes: {len(counter.classes)}: {', '.join(sorted(counter.classes))}")


if __name__ == "__main__":
    main()
