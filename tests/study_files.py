"""Study files as tests write them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lcsc_opt.base.study_file import StudySpec, only_one, read_studies


def read_study_file(path: Path, overrides: Sequence[str] = ()) -> StudySpec:
    """The only experiment of a study file."""
    return only_one(read_studies(path, overrides), source=str(path))
