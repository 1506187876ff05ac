"""A small front in a database, written as ``lcsc front`` leaves it."""

from __future__ import annotations

import numpy as np
from optuna.storages import RDBStorage

from lcsc_opt.base.records import Candidate, Cost, Evaluation
from lcsc_opt.coefficients.profiles import ema_coefficients
from lcsc_opt.database.store import StoredStudy, TrialKey
from tests.study_examples import STEPS, write_study

RECALL = 0.9


def metrics(fid: float, precision: float | None, at: str = "") -> dict[str, float]:
    """What a report holds; without a precision, what one of other metrics does."""
    return {f"fid{at}": fid, **({} if precision is None else {f"precision{at}": precision, f"recall{at}": RECALL})}


def write_point(storage: RDBStorage, name: str, *, fid: float, precision: float | None, at: str = "") -> None:
    """One search of a front, with its report."""
    report = {"trial": 1, "loss": fid + 1, "images": 1000, "metrics": metrics(fid, precision, at)}
    write_study(storage, name, [fid + 3, fid + 2], held_out=report)


def write_ema(storage: RDBStorage) -> None:
    """The rates of EMA at weight zero, each measured on the noise that answers are chosen on."""
    study = write_study(storage, "digits,near=0/EMAGrid/0", [])
    for rate, fid, precision in ((0.999, 30.0, 0.63), (0.99, 28.4, 0.62)):
        _add(study, ema_coefficients(STEPS, rate), fid, precision)


def _add(study: StoredStudy, coefficients: np.ndarray, fid: float, precision: float) -> None:
    number = len(study.trials())
    key = study.add_candidate(Candidate(coefficients))
    study.finish(key, Evaluation(fid, {"fid": fid}, Cost(images=10)), tell_index=number)
    measured = {"loss": fid, "metrics": metrics(fid, precision), "images": 1000}
    study.annotate(TrialKey.of(study.trials()[number]), {"selection": measured})


def write_front(storage: RDBStorage) -> None:
    """What was varied, three weights, and the rates of EMA."""
    write_study(storage, "digits/LCSC/0", [9.0, 4.0])
    write_ema(storage)
    for weight, fid, precision in (("12", 8.0, 0.65), ("0", 3.8, 0.547), ("6", 5.6, 0.617)):
        write_point(storage, f"digits,near={weight}/LCSC/0", fid=fid, precision=precision)
