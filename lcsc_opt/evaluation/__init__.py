"""Where candidates are evaluated: in this process, or in one process per worker."""

from lcsc_opt.evaluation.base import Evaluator, Failure, Outcome, evaluate_safely
from lcsc_opt.evaluation.in_process import InProcessEvaluator
from lcsc_opt.evaluation.processes import ProcessEvaluator

__all__ = ["Evaluator", "Failure", "InProcessEvaluator", "Outcome", "ProcessEvaluator", "evaluate_safely"]
