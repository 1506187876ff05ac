"""Stores images of an experiment's answer, of the best that the user had, and of the reference."""

from __future__ import annotations

import numpy as np

from lcsc_opt.base.contact_sheet import contact_sheet
from lcsc_opt.base.records import HELD_OUT
from lcsc_opt.database.experiment import StoredExperiment
from lcsc_opt.database.report import Report
from lcsc_opt.objective.contract import Objective
from lcsc_opt.views.artifacts import (
    ANSWER_FARTHEST,
    ANSWER_SAMPLES,
    BEFORE_FARTHEST,
    BEFORE_SAMPLES,
    REAL_SAMPLES,
    artifact_directory,
)

PAIRS = 250  # images drawn from either model
SHOWN = 40  # of them, the first, and those that differ most


def attach_images(experiment: StoredExperiment, objective: Objective, report: Report) -> None:
    """Store images of the answer and of the best that the user had, from the same noise, with the experiment.

    First the images as they come, with real ones where there are some; then the pairs that differ most, by the distance
    of their features (App. E). There are none where the objective samples no images, or the user had the answer
    already.
    """
    before = report.best_had(report.headline_metric)
    if before is None or not report.is_found or objective.sampler is None:
        return
    from lcsc_opt.objective.merge_sample_score import MergeSampleScore  # with all metrics, which a score does not need

    if not isinstance(objective, MergeSampleScore):
        return
    images_before = objective.images(before.model.coefficients, HELD_OUT, PAIRS)
    images_of_answer = objective.images(report.of_answer.model.coefficients, HELD_OUT, PAIRS)
    difference = objective.features(images_before) - objective.features(images_of_answer)
    distance = np.linalg.norm(difference, axis=1)
    farthest = np.argsort(-distance, kind="stable")[:SHOWN]
    folder = artifact_directory(experiment.storage.url)
    folder.mkdir(parents=True, exist_ok=True)
    images_of_name = {
        BEFORE_SAMPLES: images_before[:SHOWN],
        ANSWER_SAMPLES: images_of_answer[:SHOWN],
        BEFORE_FARTHEST: images_before[farthest],
        ANSWER_FARTHEST: images_of_answer[farthest],
    }
    real_images = objective.real_images(SHOWN)
    if real_images is not None:
        images_of_name[REAL_SAMPLES] = real_images
    for name, images in images_of_name.items():
        experiment.record.attach(folder, name, contact_sheet(images.numpy()))
