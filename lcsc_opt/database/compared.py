"""Which losses of a study compare with each other: the rule that best trials, curves and tables share.

An optimizer may ask with fewer images, whose FID is biased, or on noise of its own. Beside the losses of plain
evaluations such a loss would win or lose by how it was measured. What it cost counts like everything else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from optuna.trial import FrozenTrial, TrialState

from lcsc_opt.base.records import SEARCH, Noise


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
