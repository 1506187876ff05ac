"""The specification of one study: one optimizer and one seed over an objective, frozen and validated.

The database stores it as it is, and a study is continued by what is stored. :mod:`lcsc_opt.base.study_file` makes it
of a file.
"""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, Literal

import pydantic

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.settings import Count, FrozenModel, Positive, excerpt, parse_settings, plain

ModelKind = Literal["diffusers", "edm", "lora", "module", "score"]
"""What checkpoints are: each kind has a template of a study file."""

Unit = Literal["evaluations", "images", "seconds"]
"""What a budget counts."""

DEFAULT_BUDGET = 100  # evaluations of an optimizer
BOUND_OF_GRADIENT = 200  # of the one that ends by itself
EMA_GRID = "EMAGrid"
GRIDS = (EMA_GRID, "Grid", "Landscape")
"""Optimizers that search nothing: their candidates are listed, averages or the points of a plane. They have one
row, in the affine space."""
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?) *(s|secs?|seconds?|m|mins?|minutes?|h|hours?)")

Settings = dict[str, pydantic.JsonValue]  # the database keeps them as JSON
_DEVICE = re.compile(r"[a-z]+(:[0-9]+)?")  # such as cpu or cuda:1, which need not be on this machine
Name = Annotated[str, pydantic.StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
EXPERIMENT = re.compile(r"[^\W_][\w.-]*")


def _check_experiment(name: str) -> str:
    """Return the name of an experiment, which names its studies and files, if it is allowed.

    Raises:
        StudySpecError: it has more than 100 characters, or is not of the form of :data:`EXPERIMENT`.
    """
    if len(name) <= 100 and EXPERIMENT.fullmatch(name):
        return name
    raise StudySpecError(f"expected at most 100 letters, digits, dots, dashes and underscores, got {excerpt(name)}")


def experiment_name(text: str) -> str:
    """The name of a file or folder turned into that of an experiment: what is not allowed becomes ``-``.

    Empty where no allowed character is left.
    """
    return re.sub(r"[^\w.-]+", "-", text).strip("._-")[:100]


Experiment = Annotated[str, pydantic.AfterValidator(_check_experiment)]
"""The name of an experiment."""


class ObjectiveSpec(FrozenModel):
    """The file that builds the objective, and the settings for it, which that file checks."""

    file: str
    settings: Settings = pydantic.Field(default_factory=dict)


LAYERS: Final = "layers"
CHANNELS: Final = "channels"
AUTO: Final = "auto"
"""Rows that :mod:`lcsc_opt.experiment.defaults` chooses for each optimizer."""


Rule = str | dict[str, int]
"""How tensors are divided into rows of coefficients: ``layers``, ``channels``, or ``{channels: 8}``, of which eight
neighbouring channels share one."""


def _read_rows(value: Any) -> Rule | None:
    """Parse ``rows``. Pydantic would list an error for each of its forms; this gives one.

    Raises:
        ValueError: it has none of the forms.
    """
    if value is None or (isinstance(value, str) and value in (LAYERS, CHANNELS, AUTO)):
        return value
    if isinstance(value, Mapping) and list(value) == [CHANNELS]:
        shared = value[CHANNELS]
        if type(shared) is int and shared >= 1:
            return {CHANNELS: shared}
    raise ValueError(f"expected {LAYERS}, {CHANNELS}, {AUTO} or {{{CHANNELS}: 8}}, got {excerpt(value)}")


Rows = Annotated[
    Literal["layers", "channels", "auto"] | dict[str, int] | None,
    pydantic.BeforeValidator(_read_rows),
]


class SpaceSpec(FrozenModel):
    """Which coefficients are searched.

    ``kind`` is ``affine`` or ``convex``. ``rows: layers`` gives each layer coefficients of its own, ``rows: channels``
    each output channel; ``None`` is one row for all.
    """

    kind: Literal["affine", "convex"] = "affine"
    rows: Rows = None


class OptimizerSpec(FrozenModel):
    """A name of Nevergrad's registry, where ours are registered too, and its options."""

    name: Name
    options: Settings = pydantic.Field(default_factory=dict)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _read(cls, entry: Any) -> Any:
        """A study file has ``LCSC`` or ``LCSC: {mutation: 0.01}``, the database ``{name: …, options: …}``.

        The database's form, and what has none of these forms, is left to pydantic.
        """
        if isinstance(entry, str):
            return {"name": entry}
        if isinstance(entry, Mapping) and len(entry) == 1 and "name" not in entry:
            ((name, options),) = entry.items()
            return {"name": name, "options": {} if options is None else options}
        return entry


def _list_optimizers(value: Any) -> Any:
    """One name, or a mapping from names to options, as a list with an entry for each optimizer.

    Raises:
        ValueError: it is something else, or names none.
    """
    if isinstance(value, str) and value:
        return [value]
    if isinstance(value, Mapping) and value:
        return [{name: options} for name, options in value.items()]
    if isinstance(value, (list, tuple)) and value:
        return value
    raise ValueError(f"expected names, or mappings from names to options, got {excerpt(value)}")


def _list_seeds(value: Any) -> Any:
    """One seed as a list of one.

    Raises:
        ValueError: it is neither a number nor a list of some.
    """
    if isinstance(value, int):
        return [value]
    if isinstance(value, (list, tuple)) and value:
        return value
    raise ValueError(f"expected whole numbers, got {excerpt(value)}")


Seed = Annotated[int, pydantic.Field(ge=0, strict=True)]
Seeds = Annotated[tuple[Seed, ...], pydantic.Field(strict=False), pydantic.BeforeValidator(_list_seeds)]
"""Several seeds, or one."""
Optimizers = Annotated[
    tuple[OptimizerSpec, ...], pydantic.Field(strict=False), pydantic.BeforeValidator(_list_optimizers)
]
"""Several optimizers, each a name or ``{name: options}``; or one name; or ``{name: options, …}``."""
Budget = int | str | datetime.timedelta
"""A whole number, or a time such as ``5 min``."""


class BudgetSpec(FrozenModel):
    """A total over the study's whole life: a number of evaluations, or of images; or a time.

    ``5 min`` is short for ``{seconds: 300}``.

    Attributes:
        evaluations, images, seconds: exactly one of them.
        patience: the search ends before, as soon as so many evaluations in a row have not lowered its best loss.
            ``LCSCGradient``, whose losses do not compare, ends by itself.
    """

    evaluations: Count | None = None
    images: Count | None = None
    seconds: Positive | None = None
    patience: Count | None = None

    @pydantic.model_validator(mode="wrap")
    @classmethod
    def _read(cls, value: Any, parse: Callable[[Any], BudgetSpec]) -> BudgetSpec:
        """Read the short forms, refuse a number alone, which has no unit, and what has several units or none."""
        if isinstance(value, (str, datetime.timedelta)):
            value = {"seconds": _seconds_of(value)}
        expected = "expected one unit, as in {evaluations: 100}, {images: 50000} or 5 min, got"
        if isinstance(value, int):
            raise ValueError(f"{expected} {value}")  # noqa: TRY004 - the error that pydantic reports
        budget = parse(value)
        units = list(budget.model_dump(exclude_none=True, exclude={"patience"}))
        if len(units) != 1:
            raise ValueError(f"{expected} {' and '.join(units) or 'none'}")
        return budget

    @classmethod
    def default(cls, optimizer: str) -> BudgetSpec:
        """The budget where nobody chose one. For ``LCSCGradient``, which ends by itself, it is only a bound."""
        return cls(evaluations=BOUND_OF_GRADIENT if optimizer == "LCSCGradient" else DEFAULT_BUDGET)

    @classmethod
    def of(cls, budget: Budget, *, unit: Unit = "evaluations") -> BudgetSpec:
        """A budget as callers give it: a number, which counts this unit, or a time.

        Raises:
            StudySpecError: it is something else, or not above zero.
        """
        content = budget if isinstance(budget, (str, datetime.timedelta)) else {unit: plain(budget)}
        try:
            return cls.model_validate(content)
        except pydantic.ValidationError as error:
            raise StudySpecError(
                f'budget: expected a whole number of {unit}, or a time such as "5 min", got {excerpt(budget)}'
            ) from error

    @property
    def unit(self) -> Unit:
        """What the budget counts."""
        if self.seconds is not None:
            return "seconds"
        if self.evaluations is None:
            return "images"
        return "evaluations"

    @property
    def total(self) -> int:
        """The number of evaluations, of images, or of seconds, rounded up."""
        return self.evaluations or self.images or math.ceil(self.seconds or 0)

    def with_total(self, total: Budget) -> BudgetSpec:
        """Another total in the same unit; or a time. Raises as :meth:`of`."""
        return BudgetSpec.of(total, unit=self.unit).model_copy(update={"patience": self.patience})

    def __str__(self) -> str:
        return f"{self.total:,} {self.unit}"


def _seconds_of(duration: str | datetime.timedelta) -> float:
    """A time, also as people write it, such as ``5 min``, in seconds.

    Raises:
        ValueError: it is no time, or none above zero.
    """
    if isinstance(duration, datetime.timedelta):
        return duration.total_seconds()
    match = _DURATION.fullmatch(duration.strip().lower())
    seconds = 0.0
    if match is not None:
        seconds = float(match[1]) * _SECONDS[match[2][0]]
    if seconds <= 0:
        raise ValueError(f"expected a time such as 5 min, got {excerpt(duration)}")
    return seconds


class HeldOutSpec(FrozenModel):
    """After the searches, the best trials are scored on selection noise, and the best of each on held-out noise.

    Attributes:
        images: for each model and each group of noise; items of a score. ``None`` is the objective's own number, or
            10,000.
        top: how many trials of all searches together, the same number of each, at least one.
    """

    images: Annotated[int, pydantic.Field(ge=2)] | None = None
    top: Count = 5

    def images_with(self, objective_images: int | None) -> int:
        """How many images to sample.

        Args:
            objective_images: the number in the objective's settings; ``None`` if it has none.
        """
        return self.images or objective_images or 10_000


class FailureSpec(FrozenModel):
    """What happens to evaluations that fail.

    Attributes:
        retries: how often a candidate is tried again before its trial fails; never after an error of this library,
            which would come again.
        in_a_row: the search stops when so many trials have failed one after the other; ``None`` lets it go on.
    """

    retries: Annotated[int, pydantic.Field(ge=0)] = 2
    in_a_row: Count | None = 5


class RayWorkers(FrozenModel):
    """Workers on a Ray cluster. Only their number belongs to the study; the rest may change when it is continued.

    Attributes:
        ray: how many workers.
        gpus: GPUs per worker; ``None`` means one where the cluster has GPUs and the objective may use them. With 0.5,
            two workers share a GPU.
        cpus: CPUs per worker; also its number of threads.
        address: the address of the cluster's head, ``host:port``; ``auto`` is the cluster that this machine belongs to.
    """

    ray: Count
    gpus: Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)] | None = None
    cpus: Positive = 1
    address: Annotated[str, pydantic.StringConstraints(min_length=1)] = "auto"


def _read_workers(value: Any) -> int | str | tuple[str, ...] | RayWorkers:
    """Parse ``workers``. Pydantic would list an error for each of its forms; this gives one.

    Raises:
        ValueError: it has none of the forms.
    """
    if isinstance(value, Mapping):
        try:
            return parse_settings(RayWorkers, value, source="")
        except StudySpecError as error:  # pydantic puts the key's name in front
            raise ValueError(str(error).removeprefix(": ")) from error
    if value == "auto" or isinstance(value, RayWorkers):
        return value  # type: ignore[no-any-return]
    if type(value) is int and value >= 1:
        return value
    if isinstance(value, (list, tuple)) and value and all(_DEVICE.fullmatch(str(name)) for name in value):
        return tuple(value)
    raise ValueError(
        f"expected a number from 1, auto, devices such as [cuda:0, cuda:1], or {{ray: 8}}, got {excerpt(value)}"
    )


Workers = Annotated[int | Literal["auto"] | tuple[str, ...] | RayWorkers, pydantic.BeforeValidator(_read_workers)]
"""A number of processes, ``auto`` for one on each GPU, a list with the device of each process, or those of a Ray
cluster."""


OF_EXPERIMENT = ("objective", "held_out")
"""The parts of a specification that all searches of an experiment share."""


class StudySpec(FrozenModel):
    """One study: one optimizer and one seed of a study file. The database holds it as it is.

    Attributes:
        experiment: the name in the study file.
        optimizer: the optimizer that searches.
        seed: of everything random in the search.
        objective, space, budget, workers, failures, held_out: as in the study file.
        start: a stored study, at whose answer the search begins; grids have none.
    """

    experiment: Experiment
    optimizer: OptimizerSpec
    seed: Seed = 0
    objective: ObjectiveSpec
    space: SpaceSpec = SpaceSpec()
    start: str | None = None
    budget: BudgetSpec = BudgetSpec(evaluations=DEFAULT_BUDGET)
    workers: Workers = 1
    failures: FailureSpec = FailureSpec()
    held_out: HeldOutSpec | None = None

    @property
    def name(self) -> str:
        """The name of the Optuna study."""
        return f"{self.experiment}/{self.optimizer.name}/{self.seed}"

    @property
    def is_grid(self) -> bool:
        """Whether candidates are listed, not searched."""
        return self.optimizer.name in GRIDS

    def content(self) -> dict[str, Any]:
        """The content of a study file that asks for this study alone."""
        shared = self.model_dump(mode="json", exclude={"experiment", "optimizer", "seed"})
        optimizer = {self.optimizer.name: self.optimizer.options}
        return {"name": self.experiment, "optimizers": [optimizer], "seeds": [self.seed], **shared}

    @property
    def ray(self) -> RayWorkers | None:
        """The workers of a Ray cluster; ``None`` if this machine evaluates."""
        if isinstance(self.workers, RayWorkers):
            return self.workers
        return None

    @property
    def worker_count(self) -> int:
        """How many processes evaluate; ``auto`` is one for each GPU, or one."""
        if isinstance(self.workers, int):
            return self.workers
        if isinstance(self.workers, RayWorkers):
            return self.workers.ray
        if self.workers == "auto":
            from lcsc_opt.base import accelerator  # with torch

            return max(len(accelerator.names()), 1)
        return len(self.workers)

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices of the workers, if the study file lists them."""
        if isinstance(self.workers, tuple):
            return self.workers
        return ()

    @property
    def device(self) -> str:
        """The device in the objective's settings; ``auto`` if they name none."""
        return str(self.objective.settings.get("device", "auto"))

    @property
    def names_device(self) -> bool:
        """Whether the objective's settings name one device, which workers then share: ``cuda`` is only a kind."""
        return self.device == "cpu" or ":" in self.device
