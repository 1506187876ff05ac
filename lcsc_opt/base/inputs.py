"""What a search from Python is given besides the study itself, validated as a study file is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import pydantic

from lcsc_opt.base.settings import Count, FrozenModel, parse_settings, plain
from lcsc_opt.base.study_spec import AUTO, Experiment, Rows, Seed


class Arguments(FrozenModel):
    """Arguments of :func:`lcsc_opt.search` and :func:`lcsc_opt.run`, by their names there."""

    name: Experiment | None = None
    rows: Rows = AUTO
    seed: Seed = 0
    jobs: Count = 1
    resume: bool = False
    accept_changes: bool = False
    # a list is fine, too: strict models take nothing but a tuple
    callbacks: Annotated[tuple[Callable[..., object], ...], pydantic.Field(strict=False)] = ()
    settings: dict[str, Any] | None = None


def read_arguments(function: str, **arguments: Any) -> Arguments:
    """Validate arguments of a function, whose name begins the message of an error.

    Raises:
        StudySpecError: ``function: argument: what was expected; …``.
    """
    return parse_settings(Arguments, plain(arguments), source=function)
