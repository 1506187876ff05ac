"""Where candidates are evaluated: in this process, or in worker processes, whole or divided by images."""

from lcsc_opt.evaluation.base import Evaluator, Failure, InProcessEvaluator, Outcome, evaluate_safely
from lcsc_opt.evaluation.pipeline import Pipeline
from lcsc_opt.evaluation.pool import ProcessEvaluator, WorkerPool
from lcsc_opt.evaluation.spread import SpreadEvaluator

__all__ = [
    "Evaluator",
    "Failure",
    "InProcessEvaluator",
    "Outcome",
    "Pipeline",
    "ProcessEvaluator",
    "SpreadEvaluator",
    "WorkerPool",
    "evaluate_safely",
]
