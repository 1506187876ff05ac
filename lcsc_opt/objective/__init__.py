"""Coefficients to an evaluation: the contract, and merge → sample → score behind it.

``contract`` is what searches know. ``merge_sample_score`` is the objective of this project, ``gradient`` the way back
through it. ``loading`` makes the objective that a study file names.
"""

from lcsc_opt.base.records import Candidate, Cost, Evaluation, Noise
from lcsc_opt.objective.contract import CoefficientFunction, Objective, StagedObjective, stop_if_told

__all__ = [
    "Candidate",
    "CoefficientFunction",
    "Cost",
    "Evaluation",
    "Noise",
    "Objective",
    "StagedObjective",
    "stop_if_told",
]
