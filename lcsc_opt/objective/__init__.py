"""Coefficients to an evaluation: the contract, and merge → sample → score behind it.

``contract`` is what searches know. ``merge_sample_score`` is the objective of this project; ``stages`` and ``gradient``
are its evaluation in stages and the way back through it. ``function`` makes an objective of any callable, ``loading``
makes the one that a study file names.
"""

from lcsc_opt.base.records import Candidate, Cost, Evaluation, Noise
from lcsc_opt.objective.contract import Objective, StagedObjective, stop_if_told
from lcsc_opt.objective.function import CoefficientFunction

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
