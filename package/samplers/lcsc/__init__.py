"""LCSC as Optuna samplers: K coefficients that sum to one, searched by lcsc_opt's own optimizers.

Only Optuna's trials are stored. The optimizer's state is derived from them: for each trial of a study, in order, a new
optimizer is told what had ended when the trial began, and asks again.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from datetime import datetime
from typing import Any, ClassVar

import nevergrad as ng
import numpy as np
import numpy.typing as npt
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from lcsc_opt.base.records import Candidate, Evaluation
from lcsc_opt.base.reproducibility import blas_threads, derive_seed
from lcsc_opt.base.study_spec import OptimizerSpec
from lcsc_opt.coefficients import AffineSpace, default_origin
from lcsc_opt.optimizers import attach_evaluation, build_optimizer, candidate_of
from lcsc_opt.optimizers.told_losses import ToldLosses

__all__ = ["LCSCGradientSampler", "LCSCQuadraticSampler", "LCSCSampler"]

_BOUND = 1e6  # of coefficients, since Optuna's parameters need bounds
_ENDLESS = 10**9  # trials, if no budget is given
_LOCK = threading.Lock()  # shared by all samplers, since a sampler with a lock could not be pickled


class LCSCSampler(optuna.samplers.BaseSampler):
    """Algorithm 1 of Liu et al. 2024 over K coefficients, the parameters ``c0`` to ``c{K-1}`` of a trial.

    Args:
        steps: ``[K]`` training steps of the checkpoints, or K for steps from 1 to K.
        seed: the seed of all random numbers; ``None`` derives it from the study's name.
        budget: how many trials are planned; :class:`LCSCQuadraticSampler` and :class:`LCSCGradientSampler` plan by it.
        num_workers: how many trials run at once, in all processes. If more have not ended, the oldest count as failed.
        images: images of a plain evaluation; 0 if the objective samples none. With it, the quadratic and the gradient
            sampler also ask for evaluations with fewer images: see :meth:`candidate`.
        options: settings of the optimizer, such as ``mutation``.

    Raises:
        lcsc_opt.base.errors.StudySpecError: an option that the optimizer does not have.
    """

    optimizer: ClassVar[str] = "LCSC"
    """Its name in lcsc_opt; a subclass may name any of Nevergrad's registry."""

    def __init__(
        self,
        steps: int | Sequence[int],
        *,
        seed: int | None = None,
        budget: int | None = None,
        num_workers: int = 1,
        images: int = 0,
        **options: Any,
    ) -> None:
        if isinstance(steps, int | np.integer):
            steps = range(1, int(steps) + 1)
        self._steps = tuple(steps)
        self._spec = OptimizerSpec(name=self.optimizer, options=options)
        self._seed = seed
        self._budget = budget
        self._num_workers = num_workers
        self._images = images
        self._names = [f"c{i}" for i in range(len(self._steps))]
        self._begin("")

    def suggest(self, trial: optuna.Trial) -> npt.NDArray[np.float64]:
        """``[K]`` coefficients that sum to one, as ``trial.suggest_float`` gives them one by one."""
        return np.array([trial.suggest_float(name, -_BOUND, _BOUND) for name in self._names])

    def candidate(self, trial: optuna.Trial | FrozenTrial) -> Candidate:
        """How a trial whose coefficients were suggested should be evaluated.

        Returns:
            ``gradient`` (whether to set the trial's attribute ``gradient``), ``images`` (``None``: as many as a plain
            evaluation) and ``noise``. If ``compares()`` is false, the loss does not compare with those of other trials:
            report it to the trial, and prune the trial.
        """
        asked = self._asked.get(trial.number)
        if asked is None:  # it was enqueued
            return Candidate(self._coefficients(trial))
        return candidate_of(asked)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The K coefficients."""
        return {name: FloatDistribution(-_BOUND, _BOUND) for name in self._names}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The coefficients of a trial; none for an enqueued one.

        Raises:
            ValueError: the study has several objectives, or a trial lacks the gradient that was asked for.
        """
        self._raise_error_if_multi_objective(study)
        if "fixed_params" in trial.system_attrs:
            return {}
        with _LOCK, blas_threads(1):
            return self._parameters(self._ask(study, trial))

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Refuse to sample a single coefficient.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{param_name}: {type(self).__name__} searches {self._names[0]} to {self._names[-1]}, all at once and "
            f"without bounds: take them from sampler.suggest(trial), or suggest them from {-_BOUND:g} to {_BOUND:g}"
        )

    def _begin(self, study_name: str) -> None:
        """Start with a new optimizer, which was told no trials."""
        seed = derive_seed(0, study_name) if self._seed is None else self._seed
        space = AffineSpace(self._steps, default_origin(self._steps))
        self._optimizer = build_optimizer(self._spec, space, budget=self._budget, workers=self._num_workers, seed=seed)
        plan_budget = getattr(self._optimizer, "plan_budget", None)
        if plan_budget is not None:
            plan_budget(evaluations=self._budget or _ENDLESS, images=None, images_per_evaluation=self._images)
        self._study_name = study_name
        self._next = 0  # the first trial that was not asked for
        self._asked: dict[int, ng.p.Parameter] = {}  # by the trial's number
        self._told: set[int] = set()
        self._lost: set[int] = set()  # told as failed; their results may still come
        self._told_losses = ToldLosses()

    def _parameters(self, candidate: ng.p.Parameter) -> dict[str, float]:
        return dict(zip(self._names, candidate.value.tolist(), strict=True))

    def _coefficients(self, trial: optuna.Trial | FrozenTrial) -> npt.NDArray[np.float64]:
        return np.array([trial.params[name] for name in self._names])

    def _ask(self, study: optuna.Study, trial: FrozenTrial) -> ng.p.Parameter:
        """Ask for every trial up to this one that was not asked for yet, in the order of their numbers.

        If the stored coefficients are not those that this optimizer asks for, another search made them: a new optimizer
        is told their results.
        """
        if study.study_name != self._study_name:
            self._begin(study.study_name)
        sign = -1 if study.direction == StudyDirection.MAXIMIZE else 1
        earlier = [stored for stored in study.get_trials(deepcopy=False) if stored.number < trial.number]
        for stored in earlier:
            if trial.number in self._asked:
                break
            if stored.number < self._next or not self._is_asked(stored):
                continue
            self._ask_for(stored, earlier, sign)
            if not self._has_asked_values(stored):
                self._begin(study.study_name)
                break
        if trial.number not in self._asked:  # else another trial that began later has asked for it
            self._ask_for(trial, earlier, sign)
        return self._asked[trial.number]

    def _ask_for(self, trial: FrozenTrial, earlier: Sequence[FrozenTrial], sign: int) -> None:
        """Ask for one trial, after telling what had ended when it began."""
        self._tell_ended(earlier, trial, sign)
        self._asked[trial.number] = self._optimizer.ask()
        self._next = max(trial.number + 1, self._next)

    def _is_asked(self, trial: FrozenTrial) -> bool:
        """Whether the coefficients of a trial came from a sampler; a running one may not have them yet."""
        suggested = self._names[0] in trial.params or trial.state == TrialState.RUNNING
        return suggested and trial.datetime_start is not None and "fixed_params" not in trial.system_attrs

    def _has_asked_values(self, trial: FrozenTrial) -> bool:
        """Whether the coefficients that a trial has so far are those that were asked for it."""
        asked = self._parameters(self._asked[trial.number])
        return all(trial.params.get(name, value) == value for name, value in asked.items())

    def _tell_ended(self, trials: Sequence[FrozenTrial], before: FrozenTrial, sign: int) -> None:
        """Tell what had ended when a trial began: a function of the stored trials, so that it can be repeated."""
        untold = [trial for trial in trials if trial.number < before.number and trial.number not in self._told]
        began = before.datetime_start or datetime.min
        ended = {trial.number for trial in untold if (trial.datetime_complete or datetime.max) <= began}
        running = [trial.number for trial in untold if trial.number not in ended]
        killed = running[: max(len(running) - self._num_workers + 1, 0)]  # more than run at once
        for trial in untold:
            candidate = self._asked.get(trial.number)
            if trial.number in self._lost:  # its candidate was told as failed; its result is told without it
                candidate = None
            if trial.number in ended:
                self._told.add(trial.number)
                self._tell(candidate, trial, sign)
            elif trial.number in killed and candidate is not None:
                self._lost.add(trial.number)
                self._tell_evaluation(candidate, None)

    def _tell(self, candidate: ng.p.Parameter | None, trial: FrozenTrial, sign: int) -> None:
        """Tell the result of a trial that has ended; without a candidate, as one of another search."""
        if candidate is not None:
            self._tell_evaluation(candidate, self._evaluation(trial, candidate_of(candidate), sign))
            return
        if not set(self._names) <= set(trial.params):
            return
        evaluation = self._evaluation(trial, Candidate(self._coefficients(trial)), sign)
        if evaluation is not None:
            candidate = self._optimizer.parametrization.spawn_child(new_value=self._coefficients(trial))
            self._tell_evaluation(candidate, evaluation)

    def _tell_evaluation(self, candidate: ng.p.Parameter, evaluation: Evaluation | None) -> None:
        """Tell an evaluation, or that there is none: then the loss is the worst so far."""
        if evaluation is None:
            attach_evaluation(candidate, None)
            self._optimizer.tell(candidate, self._told_losses.of_failure)
            return
        told = self._told_losses.of_success(evaluation)
        attach_evaluation(candidate, told)
        self._optimizer.tell(candidate, told.loss)

    def _evaluation(self, trial: FrozenTrial, asked: Candidate, sign: int) -> Evaluation | None:
        """What a trial measured; ``None`` if it failed, or was pruned although its loss compares with others."""
        is_step = trial.state == TrialState.PRUNED and not asked.compares(self._images)
        if trial.value is None or not (trial.state == TrialState.COMPLETE or is_step):
            return None
        loss = sign * trial.value
        gradient = trial.user_attrs.get("gradient")
        if gradient is not None and np.shape(gradient) == (len(self._names),):
            return Evaluation(loss, gradient=sign * np.array(gradient, dtype=np.float64))
        if asked.gradient:
            raise ValueError(
                f"trial {trial.number} has no gradient: trial.set_user_attr('gradient', [...]) with the "
                f"{len(self._names)} derivatives of its value wherever sampler.candidate(trial).gradient is true"
            )
        return Evaluation(loss)


class LCSCQuadraticSampler(LCSCSampler):
    """``LCSCQuadratic``: a quadratic model of the loss along slow waves over the checkpoints."""

    optimizer = "LCSCQuadratic"


class LCSCGradientSampler(LCSCSampler):
    """``LCSCGradient``: Adam on the gradient, which an objective sets as the trial's attribute ``gradient``."""

    optimizer = "LCSCGradient"
