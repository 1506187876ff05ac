"""Stores images of a finished search's answer, of EMA* and of the reference with it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from lcsc_opt.base.contact_sheet import contact_sheet
from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.records import HELD_OUT
from lcsc_opt.base.study_spec import EMA_GRID
from lcsc_opt.database.history import best_ema
from lcsc_opt.database.names import is_ranked, split_name
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.objective.contract import Objective
from lcsc_opt.views.artifacts import (
    EMA_FARTHEST,
    EMA_SAMPLES,
    OWN_FARTHEST,
    OWN_SAMPLES,
    REAL_SAMPLES,
    artifact_directory,
)

PAIRS = 1000  # images drawn from either model
SHOWN = 40  # of them, the first, and those that differ most


def attach_images(study: StoredStudy, objective: Objective) -> None:
    """Store images of the answer and of EMA*, from the same noise, as artifacts of the chosen trial.

    First the images as they come, with real ones where there are some; then the pairs that differ most. There are none
    where the objective samples no images, or EMA* is not known, or of a landscape, which is no search.

    Raises:
        StudyStoreError: no trial is complete.
    """
    if not is_ranked(study.name):
        return
    reader = HistoryReader(study.storage)
    experiment_grids = (split_name(study.name)[0], EMA_GRID)
    names = [name for name in reader.searches() if name == study.name or split_name(name)[:2] == experiment_grids]
    studies = reader.read_studies(names)
    own = next(other for other in studies if other.study == study.name)
    answer = reader.answer(own)
    if own.chosen is None or answer is None:
        raise StudyStoreError(f"{study.name}: no complete trial to draw")
    ema = best_ema(studies)
    if ema is None or ema.study == study.name or objective.sampler is None:
        return
    ema_answer = reader.answer(ema)
    if ema_answer is None:
        return
    from lcsc_opt.objective.merge_sample_score import MergeSampleScore

    if not isinstance(objective, MergeSampleScore):
        return
    # images of both models from the same held-out noise; then those farthest apart in the features (App. E)
    ema_images = objective.images(ema_answer, HELD_OUT, PAIRS)
    answer_images = objective.images(answer, HELD_OUT, PAIRS)
    difference = objective.features(ema_images) - objective.features(answer_images)
    distance = np.linalg.norm(difference, axis=1)
    farthest = np.argsort(-distance, kind="stable")[:SHOWN]
    folder = artifact_directory(study.storage.url)
    folder.mkdir(parents=True, exist_ok=True)
    images_of_name = {
        EMA_SAMPLES: ema_images[:SHOWN],
        OWN_SAMPLES.format(optimizer=own.optimizer): answer_images[:SHOWN],
        EMA_FARTHEST: ema_images[farthest],
        OWN_FARTHEST.format(optimizer=own.optimizer): answer_images[farthest],
    }
    real_images = objective.real_images(SHOWN)
    if real_images is not None:
        images_of_name[REAL_SAMPLES] = real_images
    with tempfile.TemporaryDirectory() as temporary:
        for name, images in images_of_name.items():
            path = Path(temporary) / name
            path.write_bytes(contact_sheet(images.numpy()))
            study.attach(own.chosen, folder, path)
