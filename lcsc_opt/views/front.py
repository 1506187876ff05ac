"""A front: the results of searches with several weights of a fidelity term, and of plain averages; plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lcsc_opt.base.sweep import split_point
from lcsc_opt.coefficients.profiles import average_name, last_rate
from lcsc_opt.database.comparing import EMA_GRID
from lcsc_opt.database.history import StudyHistory
from lcsc_opt.database.names import TERMS
from lcsc_opt.database.reader import HistoryReader

AVERAGES = "plain averages"
WITHIN = 0.01  # a precision at most this much lower counts as the same
NOTE = (
    "Models of searches on held-out noise; averages on the noise that answers are chosen on, where none of them was "
    "chosen. Each is written by lcsc export STUDY --trial TRIAL."
)


@dataclasses.dataclass(frozen=True)
class Measured:
    """One model of a front, on noise that no search saw.

    Attributes:
        study: the study that found it; ``lcsc export STUDY --trial TRIAL`` writes it.
        trial: the number of its trial in the study.
        shown: its name in tables: ``near=3``, ``EMA 0.9995`` or ``last checkpoint``.
        place: the weight, or the rate of the EMA that weights the last checkpoint alike; curves are ordered by it.
        fid: in the features of :attr:`Front.extractor`.
        precision: in the same features.
        recall: in the same features.
        images: how many it was measured on; ``None`` if that is not stored.
        noise: ``held-out``; or ``selection``, if every trial was measured and none was chosen.
    """

    study: str
    trial: int
    shown: str
    place: float
    fid: float
    precision: float
    recall: float
    images: int | None
    noise: str

    @property
    def short(self) -> str:
        """The weight or the rate alone, where there is one."""
        return self.shown.rpartition("=")[2].removeprefix("EMA ")


@dataclasses.dataclass(frozen=True)
class FrontCurve:
    """Models of one optimizer and seed at several weights, or plain averages of the checkpoints.

    Attributes:
        label: of tables and legends.
        optimizer: its name.
        points: by their place; at least one.
    """

    label: str
    optimizer: str
    points: tuple[Measured, ...]


@dataclasses.dataclass(frozen=True)
class Front:
    """A front.

    Attributes:
        name: the common part of its experiments' names.
        extractor: the end of its metrics' names: ``@clip``, or empty for Inception.
        curves: of searches.
        ema: the curve of the plain averages, EMAs and others, if they were measured.
    """

    name: str
    extractor: str
    curves: tuple[FrontCurve, ...]
    ema: FrontCurve | None = None

    @property
    def all_curves(self) -> tuple[FrontCurve, ...]:
        """The curves of searches, then that of the averages."""
        return (*self.curves, *([] if self.ema is None else [self.ema]))

    @property
    def points(self) -> tuple[Measured, ...]:
        """The points of all curves, one curve after the other."""
        return tuple(point for curve in self.all_curves for point in curve.points)

    @property
    def ema_star(self) -> Measured | None:
        """The average with the lowest FID."""
        return None if self.ema is None else min(self.ema.points, key=lambda point: point.fid)

    @property
    def headline(self) -> str | None:
        """One line: the lowest FID at EMA*'s precision or better; ``None`` if EMA* or a search is missing."""
        ema, found = self.ema_star, [point for curve in self.curves for point in curve.points]
        if ema is None or not found:
            return None
        as_precise = [point for point in found if point.precision >= ema.precision - WITHIN]
        if not as_precise:
            return f"no search has EMA*'s precision, {ema.precision:.3f} (within {WITHIN}); try larger weights"
        best = min(as_precise, key=lambda point: point.fid)
        share = f", {100 * best.fid / ema.fid:.0f} % of EMA*'s {ema.fid:.4g}" if ema.fid > 0 else ""
        return f"at EMA*'s precision, {ema.precision:.3f} (within {WITHIN}): {best.shown}, FID {best.fid:.4g}{share}"


def front_of(reader: HistoryReader, name: str) -> Front | None:
    """The front that an experiment belongs to; ``None`` if no weight of a fidelity term is varied.

    Args:
        reader: of the database.
        name: of the experiment that was varied, or of a point: ``digits``, ``digits,near=3``.
    """
    wanted = without_term(name)
    experiments = [known for known in reader.experiments() if _term(known) and without_term(known) == wanted]
    studies = [study for experiment in experiments for study in reader.read(experiment)]
    curves = list(_search_curves([study for study in studies if study.optimizer != EMA_GRID]))
    grids = [study for study in studies if study.optimizer == EMA_GRID]
    ema = max((_averages(reader, grid) for grid in grids), key=len, default=())
    measured = [study.held_out.metrics for study in studies if study.held_out is not None]
    if not curves and not ema:
        return None
    averages = FrontCurve(AVERAGES, EMA_GRID, ema) if ema else None
    extractor = next((found for metrics in measured if (found := _extractor(metrics)) is not None), "")
    return Front(wanted, extractor, tuple(curves), averages)


def without_term(experiment: str) -> str:
    """``samples,images=200,near=3`` → ``samples,images=200``."""
    return ",".join(part for part in experiment.split(",") if part.partition("=")[0] not in TERMS or "=" not in part)


def at_weight_zero(experiment: str) -> str | None:
    """``digits,near=3`` → ``digits,near=0``; ``None`` if the experiment is no point of a front."""
    known = _term(experiment)
    return None if known is None else f"{without_term(experiment)},{known[0]}=0"


def _term(experiment: str) -> tuple[str, float] | None:
    """The term, such as ``near``, and its weight; ``None`` if the experiment varies none."""
    varied = split_point(experiment)[1]
    for term in TERMS:
        try:
            if term in varied:
                return term, float(varied[term])
        except ValueError:  # a user's own key with this name
            continue
    return None


def _search_curves(studies: Sequence[StudyHistory]) -> Iterator[FrontCurve]:
    """A curve for each term, optimizer and seed with a measured answer."""
    found: dict[tuple[str, str, int], list[Measured]] = {}
    for study in studies:
        known, held_out = _term(study.experiment), study.held_out
        if known is None or held_out is None or held_out.trial is None:
            continue
        numbers = _numbers(held_out.metrics)
        if numbers is not None:
            shown = f"{known[0]}={known[1]:g}"
            point = Measured(study.study, held_out.trial, shown, known[1], *numbers, held_out.images, "held-out")
            found.setdefault((known[0], study.optimizer, study.seed), []).append(point)
    several = len({seed for _, _, seed in found}) > 1
    for (term, optimizer, seed), points in found.items():
        label = f"{optimizer}, {term}" + (f", seed {seed}" if several else "")
        yield FrontCurve(label, optimizer, tuple(sorted(points, key=lambda point: point.place)))


def _averages(reader: HistoryReader, grid: StudyHistory) -> tuple[Measured, ...]:
    """Every average that was measured on the selection noise."""
    measured = reader.selections(grid, [int(number) for number in grid.trials["number"]])
    if len(grid.steps) < 2 or not measured:
        return ()
    found = []
    for (number, stored), coefficients in zip(measured.items(), reader.coefficients(grid, list(measured)), strict=True):
        numbers = _numbers(stored.get("metrics") or {})
        if numbers is not None:
            shown = average_name(coefficients, grid.steps) or f"trial {number}"
            images = stored.get("images") or None
            place = last_rate(coefficients, grid.steps)
            found.append(Measured(grid.study, number, shown, place, *numbers, images, "selection"))
    return tuple(sorted(found, key=lambda point: point.place))


def _extractor(metrics: Mapping[str, Any]) -> str | None:
    """The extractor of the first precision: ``@clip``, or empty for Inception; ``None`` if there is no precision."""
    return next((name.removeprefix("precision") for name in metrics if name.partition("@")[0] == "precision"), None)


def _numbers(metrics: Mapping[str, Any]) -> tuple[float, float, float] | None:
    """FID, precision and recall in the same features; ``None`` if one of them was not measured."""
    extractor = _extractor(metrics)
    wanted = [f"{formula}{extractor}" for formula in ("fid", "precision", "recall")]
    if not all(isinstance(metrics.get(name), (int, float)) for name in wanted):
        return None
    fid, precision, recall = (float(metrics[name]) for name in wanted)
    return fid, precision, recall


def front_table(front: Front) -> tuple[tuple[str, ...], list[list[str]]]:
    """Header and rows, as text for people: a row for each model, with the study's name first."""
    metrics = (f"{name}{front.extractor}" for name in ("FID", "precision", "recall"))
    rows = []
    for point in front.points:
        shown = f"{point.shown} (EMA*)" if point == front.ema_star else point.shown
        images = "-" if point.images is None else f"{point.images:,}"
        values = [f"{point.fid:.4g}", f"{point.precision:.3f}", f"{point.recall:.3f}", images, point.noise]
        rows.append([point.study, shown, str(point.trial), *values])
    return ("study", "", "trial", *metrics, "images", "noise"), rows


def front_rows(front: Front) -> list[dict[str, Any]]:
    """The rows of ``lcsc front --format json``: one for each model, with its ``curve``, in the order of the table."""
    return [{"curve": curve.label, **dataclasses.asdict(point)} for curve in front.all_curves for point in curve.points]
