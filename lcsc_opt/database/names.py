"""The names of studies, optimizers and metrics."""

from __future__ import annotations

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.records import TRAINER_EMA
from lcsc_opt.base.study_spec import EMA_GRID

# attributes of a study
HOLDER = "holder"  # its last coordinator
KEYS = "keys"  # only of an experiment's own

EMA = "EMA*"
LAST_CHECKPOINT = "last checkpoint"  # the baseline that every report has
BASELINES = {EMA_GRID: EMA, "Grid": "best of the grid"}
"""Optimizer that only tries averages of a family → the name of its best, as in the paper's tables."""


def split_name(study: str) -> tuple[str, str, int]:
    """``digits/LCSC/0`` → experiment, optimizer, seed.

    Raises:
        StudyStoreError: it is not of that form.
    """
    if not has_study_form(study):
        raise StudyStoreError(f"{study}: not a study of lcsc_opt; their names are experiment/optimizer/seed")
    experiment, optimizer, seed = study.rsplit("/", 2)
    return experiment, optimizer, int(seed)


def is_trained(model: str) -> bool:
    """Whether this is the name of a baseline that no search made."""
    return model == LAST_CHECKPOINT or model.startswith(TRAINER_EMA)


def has_study_form(study: str) -> bool:
    """Whether a study's name has our form."""
    parts = study.rsplit("/", 2)
    return len(parts) == 3 and parts[2].isdecimal()


def label(optimizer: str) -> str:
    """An optimizer's name in tables and legends."""
    return BASELINES.get(optimizer, optimizer)
