"""Every error that lcsc_opt raises on purpose.

::

    LcscError                      one line, says what was wrong, where, and what to do
    ├── CoefficientsError          coefficients or profiles that do not make sense
    ├── StudySpecError             a study file or an option of the command line
    ├── CatalogError               an objective, study or dashboard that cannot be found or loaded
    ├── TrajectoryError            a packed trajectory, or checkpoints that do not belong together
    │   └── CheckpointError        one checkpoint file
    ├── TrainingError              a recipe, its data or the models that it begins from
    ├── MetricError                features, reference statistics, distances
    ├── ObjectiveError             an objective that cannot evaluate what it was asked for
    │   └── NotFiniteError         a candidate whose numbers are not finite
    ├── ClusterError               machines that evaluations are to run on
    ├── OptimizerError             an unknown optimizer, or options that it does not have
    ├── StudyStoreError            the study database
    │   ├── StudyMismatchError     the stored study was made with other settings
    │   ├── ReplayError            the optimizer did not ask the stored candidates again
    │   ├── StudyHeldError         another process is running the study
    │   └── LeaseLostError         another process has taken the study over
    ├── ContractError              an objective, optimizer, … that breaks its contract
    ├── TakesLongError             what would take long was about to begin where nothing may
    ├── FigureError                a figure or a report that cannot be drawn or written
    └── SearchFailedError          the search ran, and failed
"""

from __future__ import annotations


class LcscError(Exception):
    """Base of all errors; the command line prints it as one line and leaves with ``exit_status``."""

    exit_status = 2


class CoefficientsError(LcscError, ValueError):
    """Coefficients, steps or a profile that do not make sense."""


class StudySpecError(LcscError, ValueError):
    """A study file or an option that is wrong; the message starts with its path."""


class CatalogError(LcscError):
    """An objective, a study or a dashboard that cannot be found or loaded."""


class TrajectoryError(LcscError):
    """A packed trajectory that cannot be used, or checkpoints that do not belong together."""


class CheckpointError(TrajectoryError):
    """One checkpoint file that cannot be read as weights."""


class TrainingError(LcscError):
    """A recipe that cannot train: its settings, its data, the models that it begins from, or a loss that diverges."""


class MetricError(LcscError, ValueError):
    """Features, reference statistics or a distance that cannot be computed."""


class ObjectiveError(LcscError):
    """An objective that cannot be built, or that cannot evaluate what it was asked for."""


class NotFiniteError(ObjectiveError):
    """The numbers of this candidate are not finite; those of another candidate may be."""


class ClusterError(LcscError):
    """Machines that evaluations are to run on: not there, too small, or with other software."""


class OptimizerError(LcscError, ValueError):
    """An optimizer that does not exist, or an option that it does not have."""


class StudyStoreError(LcscError):
    """The study database cannot be opened, read or written."""


class StudyMismatchError(StudyStoreError):
    """The stored study was made with other settings than the ones given now."""


class ReplayError(StudyStoreError):
    """On resume the optimizer asked another candidate than the stored one."""


class StudyHeldError(StudyStoreError):
    """Another process is running the study."""


class LeaseLostError(StudyStoreError):
    """Another process has taken the study over; nothing more is written from here."""

    exit_status = 1


class ContractError(LcscError, AssertionError):
    """An objective, optimizer, format, extractor or storage does not keep its contract (:mod:`lcsc_opt.testing`)."""


class TakesLongError(LcscError):
    """Something that takes long was about to begin where nothing may, as in a dry run; the message says what."""


class FigureError(LcscError):
    """A figure or a report that cannot be drawn or written."""


class SearchFailedError(LcscError):
    """The search itself failed; everything evaluated so far is in the database."""

    exit_status = 1
