"""Stores images of the models of a report: what the user had, the answer, the best that was found; and real ones."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from lcsc_opt.base.contact_sheet import contact_sheet
from lcsc_opt.base.records import HELD_OUT
from lcsc_opt.database.experiment import StoredExperiment
from lcsc_opt.database.measurement import Measurement
from lcsc_opt.database.names import KEYS
from lcsc_opt.database.report import Report
from lcsc_opt.database.states import Attributes, row_rule_of
from lcsc_opt.objective.contract import Objective
from lcsc_opt.views.artifacts import FARTHEST, SAMPLES, artifact_directory, lacks_files
from lcsc_opt.views.pictures import PAIRS, Shows, pair_of, pictured

_PICTURED = "pictured"  # an attribute of the experiment: whose images are stored
SHOWN = 40  # of them, the first, and those that differ most


def attach_images(
    experiment: StoredExperiment, objective: Objective, report: Report, studies: Mapping[str, Attributes]
) -> None:
    """Store images of the models of a report, all from the same noise, with the experiment.

    First the images as they come, with real ones where there are some; then the pairs that differ most, by the distance
    of their features (App. E). There are none where the objective samples no images. Those that are stored stay where
    a report is made again with the same models.

    Args:
        experiment: where they are stored.
        objective: samples them; afterwards it has the rows of the last model that has some.
        report: of the experiment.
        studies: name → attributes of its searches.
    """
    if objective.sampler is None:
        return
    from lcsc_opt.objective.merge_sample_score import MergeSampleScore  # with all metrics, which a score does not need

    if not isinstance(objective, MergeSampleScore):
        return
    pair = pair_of(report)
    today = next(iter(experiment.attributes[KEYS].values()))
    of = {role: measured.model.key for role, measured in pictured(report).items()} | {"search": today["search"]}
    if experiment.attributes.get(_PICTURED) == of and not lacks_files(experiment.record, report):
        return

    def sampled(role: Shows, measured: Measurement) -> Tensor:
        rows = row_rule_of(measured.model.study, studies)
        if rows is not None:  # one row can be merged in any
            objective.merge_in_rows(rows)
        return objective.images(measured.model.coefficients, HELD_OUT, PAIRS if role in pair else SHOWN)

    images_of = {role: sampled(role, measured) for role, measured in pictured(report).items()}
    images_of_name = {SAMPLES[role]: images[:SHOWN] for role, images in images_of.items()}
    if pair:
        left, right = pair
        difference = objective.features(images_of[left]) - objective.features(images_of[right])
        farthest = np.argsort(-np.linalg.norm(difference, axis=1), kind="stable")[:SHOWN]
        images_of_name |= {FARTHEST[role]: images_of[role][farthest] for role in pair}
    real_images = objective.real_images(SHOWN)
    if real_images is not None:
        images_of_name[SAMPLES["real"]] = real_images
    folder = artifact_directory(experiment.storage.url)
    folder.mkdir(parents=True, exist_ok=True)
    for name, images in images_of_name.items():
        experiment.record.attach(folder, name, contact_sheet(images.numpy()))
    experiment.set_attribute(_PICTURED, of)
