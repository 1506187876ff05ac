"""Search the linear combination of saved checkpoints that samples best (LCSC, Liu et al. 2024).

::

    import lcsc_opt

    (study,) = lcsc_opt.run("digits", optimizers=["LCSCGradient"], seeds=[0])
    study.held_out, study.coefficients      # of its best: the loss on noise that no search saw, and [K] coefficients
    network.load_state_dict(study.merge())  # the merged weights

Every name is imported when it is first used, so that ``import lcsc_opt`` costs nothing and loads no torch. The import
changes nothing in the process: no environment variables, no import hooks, no handlers of logging.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lcsc_opt.base import VERSION

if TYPE_CHECKING:
    from lcsc_opt.base.errors import (
        LcscError,
        MetricError,
        MissingPackageError,
        ObjectiveError,
        SearchFailedError,
        StudySpecError,
        StudyStoreError,
        TrainingError,
        TrajectoryError,
    )
    from lcsc_opt.base.records import Candidate, Evaluation
    from lcsc_opt.experiment.api import Study, compare, load_objective, load_study, run
    from lcsc_opt.experiment.calling import search
    from lcsc_opt.objective.contract import Objective
    from lcsc_opt.trajectory.trajectory import Trajectory
    from lcsc_opt.trajectory.writer import TrajectoryWriter

__version__ = VERSION
__all__ = [
    "Candidate",
    "Evaluation",
    "LcscError",
    "MetricError",
    "MissingPackageError",
    "Objective",
    "ObjectiveError",
    "SearchFailedError",
    "Study",
    "StudySpecError",
    "StudyStoreError",
    "TrainingError",
    "Trajectory",
    "TrajectoryError",
    "TrajectoryWriter",
    "__version__",
    "compare",
    "load_objective",
    "load_study",
    "run",
    "search",
]

_MODULES = {
    "Candidate": "lcsc_opt.base.records",
    "Evaluation": "lcsc_opt.base.records",
    "LcscError": "lcsc_opt.base.errors",
    "MetricError": "lcsc_opt.base.errors",
    "MissingPackageError": "lcsc_opt.base.errors",
    "Objective": "lcsc_opt.objective.contract",
    "ObjectiveError": "lcsc_opt.base.errors",
    "SearchFailedError": "lcsc_opt.base.errors",
    "Study": "lcsc_opt.experiment.api",
    "StudySpecError": "lcsc_opt.base.errors",
    "StudyStoreError": "lcsc_opt.base.errors",
    "TrainingError": "lcsc_opt.base.errors",
    "Trajectory": "lcsc_opt.trajectory.trajectory",
    "TrajectoryError": "lcsc_opt.base.errors",
    "TrajectoryWriter": "lcsc_opt.trajectory.writer",
    "compare": "lcsc_opt.experiment.api",
    "load_objective": "lcsc_opt.experiment.api",
    "load_study": "lcsc_opt.experiment.api",
    "run": "lcsc_opt.experiment.api",
    "search": "lcsc_opt.experiment.calling",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'lcsc_opt' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value  # Python asks here only for names that the module lacks
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
