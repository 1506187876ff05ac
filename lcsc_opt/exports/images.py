"""Stores images of a finished search's answer and of EMA* with it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from lcsc_opt.base.contact_sheet import contact_sheet
from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.records import HELD_OUT
from lcsc_opt.database.history import best_ema
from lcsc_opt.database.names import EMA_GRID, is_search, split_name
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.objective.contract import Objective
from lcsc_opt.views.artifacts import EMA_IMAGES, OWN_IMAGES, artifact_directory

PAIRS = 1000  # images drawn from either model
SHOWN = 40  # of them, those that differ most


def attach_images(study: StoredStudy, objective: Objective) -> None:
    """Store images of the answer and of EMA*, from the same noise, as artifacts of the chosen trial.

    There are none where the objective samples no images, or EMA* is not known, or of a landscape, which is no search.

    Raises:
        StudyStoreError: no trial is complete.
    """
    if not is_search(study.name):
        return
    reader, grid = HistoryReader(study.storage), (split_name(study.name)[0], EMA_GRID)
    known = reader.read_studies(
        [name for name in reader.searches() if name == study.name or split_name(name)[:2] == grid]
    )
    own = next(other for other in known if other.study == study.name)
    if own.chosen is None or (found := reader.answer(own)) is None:
        raise StudyStoreError(f"{study.name}: no complete trial to draw")
    ema = best_ema(known)
    before = None if ema is None or ema.study == own.study else reader.answer(ema)
    if before is None or objective.sampler is None:
        return
    from lcsc_opt.objective.merge_sample_score import MergeSampleScore

    if not isinstance(objective, MergeSampleScore):
        return
    # of both models from the same held-out noise, those farthest apart in the features first (App. E)
    first, second = (objective.images(coefficients, HELD_OUT, PAIRS) for coefficients in (before, found))
    distance = np.linalg.norm(objective.features(first) - objective.features(second), axis=1)
    shown = np.argsort(-distance, kind="stable")[:SHOWN]
    images = {EMA_IMAGES: first, OWN_IMAGES.format(optimizer=own.optimizer): second}
    sheets = {name: contact_sheet(each[shown].numpy()) for name, each in images.items()}
    folder = artifact_directory(study.storage.url)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        for name, content in sheets.items():
            path = Path(temporary) / name
            path.write_bytes(content)
            study.attach(own.chosen, folder, path)
