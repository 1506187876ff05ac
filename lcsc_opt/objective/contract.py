"""The contract of objectives. This is all that searches, optimizers and the database know about models.

An objective is a black box over the K coefficients of a linear combination of checkpoints: :class:`Objective`. The
shortest one needs three members::

    class Distance(Objective):
        steps = (100, 200, 300)                        # of K = 3 checkpoints

        def evaluate(self, candidate):
            return Evaluation(loss=float(np.abs(candidate.coefficients - 1 / 3).sum()))

        def describe(self):
            return {"distance": "L1"}                  # whatever changes results

Whatever else an objective can do has a default: a gradient, checkpoints that it merges, images or items that it draws
(:class:`Samples`), and metrics that only reports have (:class:`ReportedMetrics`). :class:`CoefficientFunction` makes an
objective of a Python function, and :class:`StagedObjective` divides an evaluation into stages that may overlap and be
spread over workers.
"""

from __future__ import annotations

import abc
import contextvars
import dataclasses
import functools
import threading
import time
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from lcsc_opt.base.code import CodeFile
from lcsc_opt.base.errors import ObjectiveError, StudySpecError
from lcsc_opt.base.records import (
    CONTIGUOUS,
    HELD_OUT,
    SEARCH,
    Candidate,
    Coefficients,
    Cost,
    Evaluation,
    Noise,
    ReportedMetrics,
    SamplerTitle,
    Yardstick,
)
from lcsc_opt.base.settings import excerpt
from lcsc_opt.base.study_spec import Rule
from lcsc_opt.coefficients.layer_groups import LayerGroups
from lcsc_opt.coefficients.profiles import average_name, check_coefficients, check_steps
from lcsc_opt.objective.key import Key

if TYPE_CHECKING:  # torch is imported by objectives that need it
    from torch import Tensor

    from lcsc_opt.sampling import Sampler
    from lcsc_opt.trajectory import Trajectory

OF_MACHINE = ("batch_size", "gradient_batch_size", "device")
"""Settings of our objectives that say how the machine computes, and no more."""

Role = Literal["decides", "reported", "asked", "none"]
"""What a setting is for: what decides losses, or the values of reports; or what reports measure."""

stop_flag: contextvars.ContextVar[threading.Event | None] = contextvars.ContextVar("stop_flag", default=None)
"""Once the event is set, evaluations in this thread end at their next :func:`stop_if_told`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
    """What evaluations draw: images, or the items of a score.

    Attributes:
        per_evaluation: how many, in a search; 0 without any, or if nobody counts them.
        per_report: how many in a held-out report whose study file does not say it; ``None`` leaves that to
            :class:`~lcsc_opt.base.study_spec.HeldOutSpec`.
        prompts_per_report: how many prompts a report has, each of which needs an image; 0 without prompts.
        samplers: how images are sampled: in searches, then in another way that only reports use, if any.
        real_per_dimension: real images of the loss, divided by the effective dimension of their features; ``None`` if
            unknown.
    """

    per_evaluation: int = 0
    per_report: int | None = None
    prompts_per_report: int = 0
    samplers: Sequence[SamplerTitle] = ()
    real_per_dimension: float | None = None


class Objective(abc.ABC):
    """A black box over coefficients: ``objective(coefficients) -> float``, lower is better.

    A subclass defines :meth:`evaluate`, :meth:`describe` and, without a trajectory, :attr:`steps`. It is worth its
    lines where a loss is neither that of images nor a function of one network, such as of two models that are merged
    alike:

    >>> import lcsc_opt
    >>> class Distance(lcsc_opt.Objective):
    ...     steps = (100, 200)
    ...
    ...     def evaluate(self, candidate):
    ...         return lcsc_opt.Evaluation(loss=float(abs(candidate.coefficients[1] - 1.5)))
    ...
    ...     def describe(self):
    ...         return {"target": 1.5}
    >>> Distance()([-1.0, 2.0])
    0.5

    Attributes:
        trajectory: the checkpoints that it merges, for exports, checks and profiles; ``None`` without weights.
        sampler: samples images with the merged weights; ``None`` without images.
        samples: what evaluations draw.
        code: name → file of each of the user's modules that the objective was loaded from.
        places: text of a setting → the whole path that was found there.
        key: what its evaluations are of, as it was loaded.
        layout: how the weights of its network lie in memory, which changes the speed, and losses in their last bits.
        is_random: whether one model may have several scores, which its author has averaged.
        maximizes: whether the loss is a score times −1, of which higher is better.
    """

    trajectory: Trajectory | None = None
    sampler: Sampler | None = None
    samples: Samples = Samples()
    code: Mapping[str, CodeFile] = types.MappingProxyType({})
    places: Mapping[str, str] = types.MappingProxyType({})
    key: Key = Key({})
    layout: str = CONTIGUOUS
    is_random: bool = False
    maximizes: bool = False

    @property
    def steps(self) -> tuple[int, ...]:
        """``[K]`` training steps of the checkpoints that coefficients combine, strictly increasing.

        Raises:
            ObjectiveError: it has neither a trajectory, whose steps these are, nor defines them.
        """
        if self.trajectory is None:
            raise ObjectiveError(f"{type(self).__name__} defines neither steps nor a trajectory that has them")
        return self.trajectory.steps

    @property
    def checkpoint_names(self) -> list[str]:
        """``[K]`` what people call each checkpoint: ``step 300``, and its file where that does not name the step."""
        if self.trajectory is None:
            return [f"step {step}" for step in self.steps]
        return self.trajectory.checkpoint_names

    def average_name(self, coefficients: Coefficients) -> str | None:
        """What people call coefficients that a baseline asks; ``None`` for others."""
        return average_name(coefficients, self.steps, self.checkpoint_names)

    @abc.abstractmethod
    def evaluate(self, candidate: Candidate) -> Evaluation:
        """Evaluate a candidate; with ``candidate.gradient``, also the gradient of the loss in its coefficients.

        Raises:
            Exception: any exception fails this trial, with its text as the reason; the search continues.
        """

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """JSON-able: everything that changes losses. An experiment continues only while this stays the same."""

    def describe_reports(self) -> dict[str, Any]:
        """JSON-able: what only reports have, such as further metrics. It may change while an experiment goes on."""
        return {}

    def __call__(self, coefficients: npt.ArrayLike) -> float:
        """The loss of ``[K]`` or ``[S, K]`` coefficients that sum to one."""
        checked = check_coefficients(coefficients, len(self.steps), rows=self.layer_groups)
        return self.evaluate(Candidate(checked, noise=SEARCH, yardstick=self._search_yardstick)).loss

    @property
    def fixed_average(self) -> Coefficients | None:
        """``[K]``: the average of the checkpoints that losses are relative to; ``None`` if they are absolute."""
        return None

    def yardstick(self, measured: Evaluation) -> Yardstick:
        """What losses are relative to, from an evaluation of :attr:`fixed_average` on the same noise.

        Raises:
            ObjectiveError: nothing can be relative to it.
        """
        return Yardstick(measured.metrics)

    @functools.cached_property
    def _search_yardstick(self) -> Yardstick | None:
        """The yardstick on the search's noise, for whoever calls the objective without a study."""
        average = self.fixed_average
        if average is None:
            return None
        return self.yardstick(self.evaluate(Candidate(average, noise=SEARCH)))

    def fastest_layout(self, *, gradient: bool) -> str:  # noqa: ARG002 - for subclasses
        """The fastest :attr:`layout`, as measured here; ``gradient`` says whether searches follow the gradient."""
        return self.layout

    def role_of(self, setting: tuple[str, ...]) -> Role:
        """What a setting of the study file is for, by its keys: by default it decides losses.

        A setting whose content :meth:`describe` says, and one of the machine that computes, has no part in a key.
        """
        if setting == ("device",) or (setting[0] == "checkpoints" and self.trajectory is not None):
            return "none"
        return "decides"

    def name_of(self, setting: tuple[str, ...]) -> str:
        """What people call a setting in messages."""
        return ".".join(("settings", *setting))

    def content_of(self, place: Path, files: Path) -> tuple[str, str] | None:  # noqa: ARG002 - for subclasses
        """The digest of what was read at a place, and how much that is, as ``150 images``; ``None`` for a file's bytes.

        Args:
            place: of a setting.
            files: the folder beside the database, where digests are kept.
        """
        return None

    def why_no_gradient(self) -> str | None:
        """Why gradients are unavailable, as the end of a sentence; ``None`` if they are available."""
        return "it gives a loss without a gradient"

    def why_nothing_held_out(self) -> str | None:
        """Why reports have no held-out loss, as the end of a sentence; ``None`` if ``candidate.noise`` matters."""
        return None

    def reported_metrics(self) -> ReportedMetrics:
        """The metrics of held-out reports beside the loss; what they need may be computed in the first call."""
        return ReportedMetrics()

    def images(self, coefficients: Coefficients, noise: Noise, count: int) -> Tensor:  # noqa: ARG002 - for subclasses
        """The first ``count`` images of a group of noise, to be looked at: ``[count, C, H, W]`` in [-1, 1].

        Raises:
            ObjectiveError: it samples none.
        """
        raise ObjectiveError("this objective scores models without images, so there is nothing to look at")

    def real_images(self, count: int) -> Tensor | None:  # noqa: ARG002 - for subclasses
        """At most ``count`` real images, to be looked at beside samples: ``[B, C, H, W]`` in [-1, 1].

        ``None`` where there are none.

        Raises:
            LcscError: they cannot be read.
        """
        return None

    def statistics(self, coefficients: Coefficients) -> Mapping[str, Tensor]:  # noqa: ARG002 - for subclasses
        """Name → tensor of the merged model that is computed, not merged; exports contain them."""
        return {}

    @property
    def layer_groups(self) -> LayerGroups | None:
        """The S groups of tensors with a row of coefficients each; ``None`` for one row."""
        if self.trajectory is None:
            return None
        return self.trajectory.layer_groups

    @property
    def row_rule(self) -> Rule | None:
        """The rule by which layers are divided into these groups; ``None`` for one row."""
        groups = self.layer_groups
        return None if groups is None else groups.rule

    def merge_in_rows(self, rule: Rule | None) -> None:
        """From now on coefficients may be ``[S, K]``, a row for each layer group; ``None`` goes back to one row.

        Raises:
            StudySpecError: the objective merges no weights, or the rule does not fit them.
        """
        if rule == self.row_rule:
            return
        if self.trajectory is not None:
            # not an assignment: an objective may be a frozen dataclass
            object.__setattr__(self, "trajectory", self.trajectory.in_rows(rule))
        else:
            raise StudySpecError("space.rows: this objective merges no weights; leave the key out")


class StagedObjective(Objective):
    """An objective in stages: ``prepare``, ``sample``, ``score``, and ``vjp`` for a gradient.

    The stages of one candidate follow each other. Stages of different candidates run at the same time in different
    threads, but never two of the same kind. The images of one candidate can be divided into parts, which different
    processes sample. A stage that runs for long calls :func:`stop_if_told` now and then.

    Attributes:
        overlaps: whether stages use different parts of the machine, so that overlapping saves time.
    """

    overlaps: bool = False

    @abc.abstractmethod
    def images_of(self, candidate: Candidate) -> int:
        """The number of images that a candidate is evaluated on."""

    def needs(self, candidate: Candidate) -> Candidate | None:  # noqa: ARG002 - for subclasses
        """What this process has to evaluate and :meth:`score` before it can score a candidate; ``None`` if nothing."""
        return None

    @abc.abstractmethod
    def prepare(self, candidate: Candidate) -> Any:
        """Merge. The result stays in this process."""

    @abc.abstractmethod
    def sample(self, candidate: Candidate, prepared: Any, first: int, last: int) -> Any:
        """Sample the images ``[first, last)`` and reduce them to a part: something small and picklable."""

    @abc.abstractmethod
    def score(self, candidate: Candidate, parts: Sequence[Any]) -> tuple[Evaluation, Sequence[Any]]:
        """The evaluation, from all parts in the order of their images.

        Returns:
            The evaluation, still without its gradient; and for each part what :meth:`vjp` needs, picklable, or ``None``
            if the candidate asks for no gradient.
        """

    @abc.abstractmethod
    def vjp(
        self,
        candidate: Candidate,
        first: int,
        last: int,
        back: Any,
    ) -> tuple[Coefficients, Cost]:
        """The vector-Jacobian product of the images ``[first, last)``: what they contribute to the gradient; its cost.

        It is usually called in the process that has just sampled this part. If that process died, or sampled other
        parts since, what it kept must be computed again: bit for bit, so that trials can be repeated.

        Args:
            candidate: the candidate.
            first: the index of the first image.
            last: the index after the last image.
            back: what :meth:`score` returned for this part.
        """

    def evaluate(self, candidate: Candidate) -> Evaluation:
        """Evaluate in one stage after the other, with all images in one part.

        Raises:
            ObjectiveError: a gradient is asked for and unavailable.
            Exception: any that a stage raises.
        """
        start = time.perf_counter()
        if candidate.gradient:
            reason = self.why_no_gradient()
            if reason:
                raise ObjectiveError(f"a gradient was asked for, and {reason}")
        while (needed := self.needs(candidate)) is not None:
            self.evaluate(needed)
        count = self.images_of(candidate)
        prepared = self.prepare(candidate)
        part = self.sample(candidate, prepared, 0, count)
        evaluation, [back] = self.score(candidate, [part])
        cost = evaluation.cost
        product = None
        if candidate.gradient:
            product, gradient_cost = self.vjp(candidate, 0, count, back)
            cost += gradient_cost
        cost = dataclasses.replace(cost, seconds=time.perf_counter() - start)  # also of what no stage has measured
        return dataclasses.replace(evaluation, cost=cost, gradient=product)


def stop_if_told() -> None:
    """End this evaluation, between two batches, if it is no longer needed.

    It ends like a run that the user interrupts: an ordinary exception would be stored as a failed trial.

    Raises:
        KeyboardInterrupt: it is no longer needed.
    """
    flag = stop_flag.get()
    if flag is not None and flag.is_set():
        raise KeyboardInterrupt


class CoefficientFunction(Objective):
    """A Python function of the coefficients as an objective.

    Args:
        function: ``[K]`` float64 → float, lower is better.
        steps: ``[K]`` training steps.
        name: its name in :meth:`describe`.
        gradient: ``[K]`` float64 → ``[K]``, the function's gradient, for optimizers that need one.
        held_out: ``[K]`` float64 → float, lower is better: the loss of the final report, on data that the search does
            not see. The answer is still chosen by ``function``.
        held_out_name: the name of ``held_out`` in :meth:`describe_reports`.
    """

    def __init__(
        self,
        function: Callable[[Coefficients], float],
        steps: Sequence[int],
        *,
        name: str,
        gradient: Callable[[Coefficients], npt.ArrayLike] | None = None,
        held_out: Callable[[Coefficients], float] | None = None,
        held_out_name: str | None = None,
    ) -> None:
        self._function = function
        self._steps = check_steps(steps)
        self._name = name
        self._gradient = gradient
        self._held_out = held_out
        self._held_out_name = held_out_name

    @property
    def steps(self) -> tuple[int, ...]:
        """``[K]`` training steps."""
        return self._steps

    def why_no_gradient(self) -> str | None:
        """``None`` if a gradient was given."""
        if self._gradient is None:
            return f"no gradient of {self._name} was given"
        return None

    def why_nothing_held_out(self) -> str | None:
        """``None`` if a held-out function was given."""
        if self._held_out is None:
            return f"no held_out function was given with {self._name}"
        return None

    def evaluate(self, candidate: Candidate) -> Evaluation:
        """Call the function, or in the final report ``held_out``; and its gradient if that is asked for.

        Raises:
            ObjectiveError: a function returns no number, the gradient is not K numbers, or a held-out loss or a
                gradient is asked for and there is no function for it.
        """
        function = self._function
        name = self._name
        if candidate.noise.group == HELD_OUT.group:
            function = self._held_out_function(candidate)
            name = self._held_out_name or "held_out"
        loss = _as_loss(function(candidate.coefficients.copy()), name)  # a copy, which it may change
        if not candidate.gradient:
            return Evaluation(loss)
        return Evaluation(loss, gradient=self._gradient_at(candidate.coefficients))

    def describe(self) -> dict[str, Any]:
        """The function's name and the steps."""
        return {"callable": self._name, "steps": list(self._steps)}

    def describe_reports(self) -> dict[str, Any]:
        """The name of the held-out function."""
        return {"held_out": self._held_out_name}

    def role_of(self, setting: tuple[str, ...]) -> Role:
        """The held-out function is only for reports."""
        if setting == ("held_out",):
            return "asked"
        return super().role_of(setting)

    def _held_out_function(self, candidate: Candidate) -> Callable[[Coefficients], float]:
        """``held_out``. Its data are fixed, so under further seeds of held-out noise it would say the same again."""
        if self._held_out is None:
            raise ObjectiveError(f"nothing is held out: {self.why_nothing_held_out()}")
        if candidate.noise.seed != HELD_OUT.seed:
            raise ObjectiveError("a held-out function has one group of noise; leave --groups and --first-group out")
        return self._held_out

    def _gradient_at(self, coefficients: Coefficients) -> Coefficients:
        """What ``gradient`` returns, as float64 of the shape of the coefficients; raises as :meth:`evaluate`."""
        if self._gradient is None:
            raise ObjectiveError(f"a gradient was asked for, and {self.why_no_gradient()}")
        returned = self._gradient(coefficients.copy())
        try:
            gradient = np.asarray(returned, dtype=np.float64)
        except (TypeError, ValueError):
            gradient = np.empty(0)  # whose shape is refused below, with what was returned
        if gradient.shape != coefficients.shape:
            expected = f"it must return {list(coefficients.shape)} numbers"
            raise ObjectiveError(f"the gradient of {self._name} was {excerpt(returned)}; {expected}")
        return gradient


def _as_loss(returned: Any, name: str) -> float:
    """What a user's function returned, as a number.

    Raises:
        ObjectiveError: it is not one.
    """
    value = returned
    if hasattr(value, "detach"):  # a tensor: torch warns when one with a graph becomes a float
        value = value.detach()
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ObjectiveError(
            f"{name} returned {excerpt(returned)}; it must return one number, lower is better"
        ) from error
