"""What studies and optimizers are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from optuna.trial import FrozenTrial, TrialState

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.records import SEARCH, Noise
from lcsc_opt.coefficients.plane import LANDSCAPE

BASELINES = {"EMAGrid": "EMA*", "PowerEMAGrid": "power-EMA*"}
"""What the best point of a grid is called in the paper's tables."""


def split_name(study: str) -> tuple[str, str, int]:
    """``digits/LCSC/0`` → experiment, optimizer, seed.

    Raises:
        StudyStoreError: when it is not of that form.
    """
    if not is_ours(study):
        raise StudyStoreError(f"{study}: not a study of lcsc_opt; their names are experiment/optimizer/seed")
    experiment, optimizer, seed = study.rsplit("/", 2)
    return experiment, optimizer, int(seed)


def is_ours(study: str) -> bool:
    """Whether a study's name has our form."""
    parts = study.rsplit("/", 2)
    return len(parts) == 3 and parts[2].isdecimal()


def is_search(study: str) -> bool:
    """Whether a study is one of ours that is compared with others; a landscape is a picture, and no search."""
    return is_ours(study) and split_name(study)[1] != LANDSCAPE


def label(optimizer: str) -> str:
    """An optimizer as tables and legends call it."""
    return BASELINES.get(optimizer, optimizer)


def compared(
    losses: npt.NDArray[np.float64], images: npt.NDArray[np.float64], other_noise: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    """``[n]``, whether each trial of one study is compared with its others.

    Those are the complete trials on the search's noise with as many images as the largest of them.

    Args:
        losses: ``[n]``, NaN where a trial is not complete.
        images: ``[n]`` that each sampled; zeros where the objective samples none.
        other_noise: ``[n]``, whether it was evaluated on other noise than the search's.
    """
    on_search = ~np.isnan(losses) & ~other_noise
    return np.asarray(on_search & (images == images[on_search].max(initial=0)))


def compared_trials(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Those of a study's trials whose losses compare, in their order."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE and trial.value is not None]
    kept = compared(
        np.array([trial.value for trial in complete], dtype=np.float64),
        np.array([trial.user_attrs.get("cost", {}).get("images", 0) for trial in complete], dtype=np.float64),
        np.array([is_other_noise(trial.user_attrs.get("noise")) for trial in complete], dtype=np.bool_),
    )
    return [trial for trial, is_kept in zip(complete, kept, strict=True) if is_kept]


def is_other_noise(stored: Any) -> bool:
    """Whether a trial's user attribute ``noise``, which trials on the search's noise lack, names another one."""
    if not isinstance(stored, Mapping):
        return False
    return Noise(str(stored.get("group", SEARCH.group)), int(stored.get("seed", SEARCH.seed))) != SEARCH
