"""The model that a refinement begins with: the best EMA of the checkpoints, or the best combination of a study."""

from __future__ import annotations

import dataclasses

from lcsc_opt.base.catalog import find
from lcsc_opt.base.errors import ObjectiveError, StudySpecError
from lcsc_opt.base.progress import progress
from lcsc_opt.base.records import Candidate, Coefficients
from lcsc_opt.base.study_file import only_one, read_studies
from lcsc_opt.coefficients.profiles import plain_averages
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.database.summary import chosen_trial
from lcsc_opt.database.urls import storage_url
from lcsc_opt.evaluation import Failure, evaluate_safely
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.loading import load_objective
from lcsc_opt.search.held_out import DEFAULT_IMAGES, HeldOutPlan, known_ema
from lcsc_opt.search.study import objective_of


@dataclasses.dataclass(frozen=True)
class Begun:
    """The objective to refine, and where it comes from.

    Attributes:
        objective: of the study.
        held_out_images: how many images the study's answers are reported on.
        study: the stored study; ``None`` where there is only a study file.
    """

    objective: Objective
    held_out_images: int
    study: StoredStudy | None = None

    def ema(self) -> Coefficients:
        """``[K]`` of EMA*, as the experiment's EMAGrid found it, else of the best average on the search's noise.

        Raises:
            ObjectiveError: none of the averages can be evaluated.
        """
        known = None if self.study is None else known_ema(self.study)
        return best_ema(self.objective) if known is None else known

    def best(self) -> Coefficients:
        """``[K]`` of the study's answer: the trial chosen on other noise, else the best of the search.

        Raises:
            StudySpecError: there is only a study file.
            StudyStoreError: no trial is complete yet.
        """
        if self.study is None:
            raise StudySpecError("--from best: a study file has found nothing; give experiment/optimizer/seed")
        return chosen_trial(self.study)[1]


def start_from_file(study_file: str) -> Begun:
    """Load the objective of a study file.

    Raises:
        LcscError: the study file is wrong, or its objective cannot be built.
    """
    path = find("studies", study_file)
    spec = only_one(read_studies(path), source="lcsc refine")
    held_out = DEFAULT_IMAGES if spec.held_out is None else spec.held_out.images
    return Begun(load_objective(spec.objective, beside=path.parent), held_out)


def start_from_study(name: str, storage: str | None) -> Begun:
    """The objective of a stored study, which must not have changed.

    Raises:
        StudyStoreError: there is no such study, or its objective has changed.
    """
    opened = open_storage(storage_url(storage), write=False)
    study = StoredStudy.open(opened, name)
    objective = objective_of(study)
    study.require("fingerprint", objective.describe(), part="objective")
    return Begun(objective, HeldOutPlan.of(study).images, study)


def best_ema(objective: Objective) -> Coefficients:
    """``[K]`` of the one of the :func:`plain_averages` with the lowest loss on the search's noise.

    Raises:
        ObjectiveError: none of them can be evaluated.
    """
    averages = plain_averages(objective.steps)
    losses: dict[int, float] = {}
    with progress("EMA*", len(averages)) as advance:
        for i, average in enumerate(averages):
            outcome = evaluate_safely(objective, Candidate(average))
            if not isinstance(outcome, Failure):
                losses[i] = outcome.loss
            advance(note=f"loss {min(losses.values(), default=float('nan')):.4g}")
    if not losses:
        raise ObjectiveError("no average of these checkpoints can be evaluated; `lcsc run` says why")
    return averages[min(losses, key=losses.__getitem__)]
