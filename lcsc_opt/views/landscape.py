"""A landscape as plain data: the loss on the plane through three models, and the candidates of searches beside it.

A candidate is shown at the nearest point of the plane. Nearest is in weights if the study stored the inner products
for it, else in coefficients. The candidate lies off the plane, so its loss is not the plane's loss at that point.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.coefficients.plane import (
    DEFAULT_MARGIN,
    DEFAULT_SIZE,
    PLANE_ATTRIBUTE,
    Plane,
    check_corners,
    corner_label,
    default_corners,
    grid_axis,
    grid_positions,
)
from lcsc_opt.database.history import Floats, StudyHistory, Trials
from lcsc_opt.database.names import is_search, split_name
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.views.curves import improvements

MOST_CANDIDATES = 150  # of one study
ON_GRID = 1e-9


@dataclasses.dataclass(frozen=True)
class Point:
    """A model: its place on the plane, or the nearest place of the plane; its own loss, and its trial's number."""

    x: float
    y: float
    loss: float | None = None
    trial: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Candidates:
    """Candidates of one search: its improvements, and others evenly chosen, in the order of their numbers.

    Attributes:
        study: ``experiment/optimizer/seed``.
        optimizer: its name.
        label: its name in legends.
        seed: of the study.
        positions: ``[m, 2]`` on the plane.
        losses: ``[m]``, on the search's noise.
        numbers: ``[m]``, of the trials.
        improved: ``[m]``, whether each was better than all before it.
        answer: the study's answer, with its loss in the search; ``None`` before there is one.
        images: how many one evaluation samples.
    """

    study: str
    optimizer: str
    label: str
    seed: int
    positions: Floats
    losses: Floats
    numbers: Floats
    improved: np.ndarray
    answer: Point | None
    images: int


@dataclasses.dataclass(frozen=True, eq=False)
class Landscape:
    """The plane and the candidates near it.

    Attributes:
        study: ``experiment/Landscape/seed``.
        metric: the name of the loss.
        corner_labels: of the three corners.
        corners: at (0, 0), (1, 0) and (0, 1).
        axis: ``[n]`` values of x, and of y, on the grid.
        values: ``[n, n]`` losses, a row for each y; NaN where there is none, or none yet.
        failed: ``[m, 2]``, points that could not be evaluated.
        done: how many points were evaluated or failed.
        total: how many points there are, including corners off the grid.
        running: whether the landscape, or a search of the experiment, is running now.
        space: ``weights`` or ``coefficients``, the space in which candidates are projected.
        images: how many one evaluation samples; 0 if the objective samples none.
        best: the lowest point of the plane.
        candidates: of the experiment's searches.
        signature: changes when anything above changes.
    """

    study: str
    metric: str
    corner_labels: tuple[str, str, str]
    corners: tuple[Point, ...]
    axis: Floats
    values: Floats
    failed: Floats
    done: int
    total: int
    running: bool
    space: str
    images: int
    best: Point | None
    candidates: tuple[Candidates, ...]
    signature: str

    @property
    def found(self) -> Candidates | None:
        """The search whose answer has the lowest loss on the search's noise. EMA grids do not count."""
        answered = [known for known in self.candidates if known.answer is not None and known.label == known.optimizer]
        return min(answered, key=lambda known: _loss(known.answer), default=None)

    @property
    def comparable(self) -> bool:
        """Whether the plane was evaluated with as many images as the searches."""
        return all(known.images == self.images for known in self.candidates)

    @property
    def at_edge(self) -> bool:
        """Whether the lowest point is on the edge of the grid. Then a lower one may be outside."""
        ends = (float(self.axis[0]), float(self.axis[-1]))
        return self.best is not None and (self.best.x in ends or self.best.y in ends)

    def named_points(self) -> Iterator[tuple[str, Point]]:
        """The corners, the lowest point of the plane, and the answers of the searches."""
        yield from zip(self.corner_labels, self.corners, strict=True)
        if self.best is not None:
            yield "lowest on the plane", self.best
        for known in self.candidates:
            if known.answer is not None:
                yield f"{known.label}/{known.seed}, trial {known.answer.trial}", known.answer

    def as_row(self) -> dict[str, Any]:
        """JSON-able: what ``lcsc landscape --format json`` prints."""
        return {
            **{"study": self.study, "metric": self.metric, "space": self.space},
            **{"evaluated": self.done, "total": self.total, "images": self.images},
            "points": [{"name": name, **dataclasses.asdict(point)} for name, point in self.named_points()],
            "axis": self.axis.tolist(),
            "values": [[None if math.isnan(value) else value for value in row] for row in self.values.tolist()],
        }


def _loss(point: Point | None) -> float:
    return math.inf if point is None or point.loss is None else point.loss


@dataclasses.dataclass(frozen=True, eq=False)
class _Geometry:
    """The plane of a landscape study, which never changes."""

    plane: Plane
    labels: tuple[str, str, str]
    axis: Floats
    positions: Floats
    products: Floats | None


class LandscapeReader:
    """Reads landscapes repeatedly. Reads coefficients of candidates only when their study has changed."""

    def __init__(self, reader: HistoryReader) -> None:
        self._reader = reader
        self._candidates: dict[tuple[object, ...], tuple[int, Candidates]] = {}

    def names(self, experiment: str | None = None) -> list[str]:
        """The landscapes of the database, or of one experiment, in the order in which they were created."""
        landscapes = [name for name in self._reader.names() if not is_search(name)]
        return [name for name in landscapes if experiment in (None, split_name(name)[0])]

    def read(self, name: str) -> Landscape:
        """A landscape and the searches of its experiment as they are now.

        Raises:
            StudyStoreError: there is no such landscape, or its plane cannot be read.
        """
        if name not in self.names():
            raise StudyStoreError(f"{name}: no such landscape; compute one: lcsc landscape experiment/optimizer/seed")
        experiment = split_name(name)[0]
        searches = [other for other in self._reader.searches() if split_name(other)[0] == experiment]
        found = {study.study: study for study in self._reader.read_studies([name, *searches])}
        if name not in found:
            raise StudyStoreError(f"{name}: was deleted from the database while it was read")
        own = found.pop(name)
        geometry = _geometry(StoredStudy.open(self._reader.storage, name).attributes, own)
        near = [study for study in found.values() if study.steps == own.steps and study.best is not None]
        return dataclasses.replace(
            _landscape(own, geometry, tuple(self._near(geometry, study) for study in near)),
            running=any(study.running for study in (own, *near)),
            signature=repr([(study.study_id, study.revision) for study in (own, *near)]),
        )

    def _near(self, geometry: _Geometry, study: StudyHistory) -> Candidates:
        """The candidates of a search; from memory if the search has not changed."""
        key = *geometry.labels, study.study_id
        revision, known = self._candidates.get(key, (-1, None))
        if known is None or revision != study.revision:
            known = _candidates(self._reader, geometry, study)
            self._candidates[key] = study.revision, known
        return known


def _geometry(attributes: Mapping[str, Any], own: StudyHistory) -> _Geometry:
    try:
        options = attributes["specification"]["optimizer"]["options"]
        corners = check_corners(options.get("corners") or default_corners(own.steps))
        one, two, three = (corner_label(corner) for corner in corners)
        size, margin = int(options.get("size", DEFAULT_SIZE)), float(options.get("margin", DEFAULT_MARGIN))
        products = (attributes.get(PLANE_ATTRIBUTE) or {}).get("products")
        return _Geometry(
            plane=Plane.through(corners, own.steps),
            labels=(one, two, three),
            axis=grid_axis(size, margin),
            positions=grid_positions(size, margin),
            products=None if products is None else np.array(products, dtype=np.float64).reshape(2, len(own.steps)),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # a StudySpecError is a ValueError
        raise StudyStoreError(
            f"{own.study}: not a landscape of lcsc_opt, or of another version ({error}); delete it, or compute another "
            "one with --seed"
        ) from error


def _landscape(own: StudyHistory, geometry: _Geometry, candidates: tuple[Candidates, ...]) -> Landscape:
    planned, axis = geometry.positions, geometry.axis
    trials = own.trials[~own.trials["inherited"]][: len(planned)]
    positions = planned[: len(trials)]
    losses = trials["loss"]
    points = [_point(x, y, trial) for (x, y), trial in zip(positions.tolist(), trials, strict=True)]
    known = [point for point in points if point.loss is not None]
    places = ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0))
    return Landscape(
        study=own.study,
        metric=own.metric,
        corner_labels=geometry.labels,
        corners=tuple(points[i] if i < len(points) else Point(x, y) for i, (x, y) in enumerate(places)),
        axis=axis,
        values=_on_grid(axis, positions, losses),
        failed=positions[np.isin(trials["number"], own.failed["number"])],
        done=int(np.isin(trials["number"], own.finished["number"]).sum()),
        total=len(planned),
        running=False,
        space="coefficients" if geometry.products is None else "weights",
        images=_images(trials),
        best=min(known, key=_loss, default=None),
        candidates=candidates,
        signature="",
    )


def _point(x: float, y: float, trial: np.void) -> Point:
    loss = float(trial["loss"])
    return Point(x, y, None if math.isnan(loss) else loss, int(trial["number"]))


def _images(trials: Trials) -> int:
    return int(trials["images"].max(initial=0))


def _on_grid(axis: Floats, positions: Floats, losses: Floats) -> Floats:
    """``[n, n]`` losses, a row for each y. Corners that are not on the grid are left out."""
    values = np.full((len(axis), len(axis)), np.nan)
    nearest = np.abs(positions[:, :, None] - axis).argmin(axis=2)
    there = (np.abs(positions - axis[nearest]) <= ON_GRID).all(axis=1)
    values[nearest[there, 1], nearest[there, 0]] = losses[there]
    return values


def _candidates(reader: HistoryReader, geometry: _Geometry, study: StudyHistory) -> Candidates:
    is_complete = ~np.isnan(study.finished["loss"])
    complete = study.finished[is_complete]
    improved = improvements(study.compared["loss"][is_complete])
    shown = _chosen(len(complete), improved, np.flatnonzero(complete["number"] == study.chosen))
    trials = complete[shown]
    coefficients = reader.coefficients(study, trials["number"].tolist())
    positions = geometry.plane.project(coefficients, geometry.products)
    answer = None
    for (x, y), trial in zip(positions.tolist(), trials, strict=True):
        if trial["number"] == study.chosen:
            answer = _point(x, y, trial)
    return Candidates(
        study=study.study,
        optimizer=study.optimizer,
        label=study.label,
        seed=study.seed,
        positions=positions,
        losses=trials["loss"].copy(),
        numbers=trials["number"].copy(),
        improved=np.isin(shown, improved),
        answer=answer,
        images=_images(complete),
    )


def _chosen(count: int, improved: np.ndarray, answer: np.ndarray) -> np.ndarray:
    """Indices of about :data:`MOST_CANDIDATES` trials at most: the answer, improvements, and others chosen evenly."""
    kept = _evenly(improved, MOST_CANDIDATES // 2)
    others = _evenly(np.setdiff1d(np.arange(count), improved), MOST_CANDIDATES - len(kept))
    return np.unique(np.concatenate([kept, improved[-1:], answer, others]))


def _evenly(indices: np.ndarray, most: int) -> np.ndarray:
    if len(indices) <= most:
        return indices
    return indices[np.linspace(0, len(indices) - 1, most).round().astype(np.intp)]
