"""The examples in the docstrings of the names at the top level run as they are printed."""

from __future__ import annotations

import doctest
import inspect
import logging
from pathlib import Path

import pytest

import lcsc_opt
from lcsc_opt.experiment.calling import search

EXAMPLES = {
    "search": search,  # the module of this name has the function's signature, and its own docstring
    "Candidate": lcsc_opt.Candidate,
    "Evaluation": lcsc_opt.Evaluation,
    "LcscError": lcsc_opt.LcscError,
    "run": lcsc_opt.run,
    "load_study": lcsc_opt.load_study,
    "compare": lcsc_opt.compare,
    "Objective": lcsc_opt.Objective,
    "Study": lcsc_opt.Study,
    "Trajectory": lcsc_opt.Trajectory,
}


WITHOUT = {"__version__", "load_objective"}  # which needs a study file


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_of_a_name_runs(name: str, workplace: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, logger="lcsc_opt")
    [example] = doctest.DocTestFinder(recurse=False).find(EXAMPLES[name], name, globs={})
    assert len(example.examples) >= 2
    printed: list[str] = []
    results = doctest.DocTestRunner(verbose=False).run(example, out=printed.append)
    assert results.failed == 0, "".join(printed)


def test_every_function_of_the_top_level_has_an_example() -> None:
    classes = {name for name in lcsc_opt.__all__ if inspect.isclass(getattr(lcsc_opt, name))}
    assert set(lcsc_opt.__all__) - set(EXAMPLES) - classes == WITHOUT
