"""Coefficients to an evaluation: the contract, and merge → sample → score behind it.

``contract`` is all that searches know. ``merge_sample_score`` is the objective over images: ``image_stages`` computes,
``gradient_pass`` leads the gradient back. ``weight_score`` is the objective for any other score, which a ``scorer``
measures, by a function of the network (``network_scorer``). ``loading`` builds the objective that a study file names,
and ``starting`` drafts a first study file.
"""

from lcsc_opt.base.records import Candidate, Cost, Evaluation, Noise, ReportedMetrics
from lcsc_opt.objective.contract import (
    CoefficientFunction,
    Objective,
    Samples,
    StagedObjective,
    stop_if_told,
)

__all__ = [
    "Candidate",
    "CoefficientFunction",
    "Cost",
    "Evaluation",
    "Noise",
    "Objective",
    "ReportedMetrics",
    "Samples",
    "StagedObjective",
    "stop_if_told",
]
