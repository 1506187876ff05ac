"""The report of an experiment: the same models on the same noise that no search saw, and which of them is the answer.

Its models are what the user had before any search (the last checkpoint, the trainer's EMA, EMA*), the best of each
search, and the answer, which is one of these or a point between two. A second sampler has a part of its own. How two of
the models compare is no part of what is stored: :meth:`Report.rows` computes it.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any

from lcsc_opt.base.records import ReportedMetrics, SamplerTitle, as_json
from lcsc_opt.base.study_spec import HeldOutSpec
from lcsc_opt.database.measurement import Measurement
from lcsc_opt.database.metric_rows import MetricRow, directions, metric_rows
from lcsc_opt.database.names import BASELINES, EMA, split_name


@dataclasses.dataclass(frozen=True)
class Part:
    """The models of a report in one sampler, on the same images.

    Attributes:
        sampler: how the images were made; ``None`` without images.
        models: what the user had, the best of each search, and the answer if it is none of these.
        second: the sampler, if it is not that of the searches.
    """

    sampler: str | None
    models: tuple[Measurement, ...]
    second: SamplerTitle | None = None

    def measured(self, name: str) -> Measurement | None:
        """What was measured of the model of this name; ``None`` if it could not be."""
        return next((measured for measured in self.models if measured.model.name == name), None)


@dataclasses.dataclass(frozen=True)
class Report:
    """What was measured on noise that no search saw, and the model that is handed out.

    Attributes:
        parts: the sampler of the searches, then another one if the objective has one.
        answer: the name of the best model that is known, chosen by noise that decided nothing before.
        had: the names of what the user had before any search.
        found: study → the name of its best model, by the noise of the choice.
        evaluations: study → how many its search had when it was measured.
        top: how many trials of all searches were compared on the noise of the choice.
        selection: the name of a model → its loss on that noise.
        metrics: of reports, and which of them is the cross-check.
        sign: −1 where losses are scores times −1, which are maximized; else 1.
        warnings: sentences about the answer and the searches.
        entrants: the names in ``selection`` → the keys of these models.
        rounds: of the choice: how many images each model had, and the seed of the noise.
    """

    parts: tuple[Part, ...]
    answer: str
    had: tuple[str, ...]
    found: Mapping[str, str]
    evaluations: Mapping[str, int]
    top: int
    selection: Mapping[str, float] = dataclasses.field(default_factory=dict)
    metrics: ReportedMetrics = dataclasses.field(default_factory=ReportedMetrics)
    sign: int = 1
    warnings: tuple[str, ...] = ()
    entrants: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rounds: tuple[tuple[int, int], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """What ``lcsc evaluate --format json`` prints."""
        fields = dataclasses.asdict(self)
        del fields["entrants"], fields["rounds"]
        printed: dict[str, Any] = as_json(fields)
        return printed

    def choice_to_json(self) -> dict[str, Any]:
        """Which model was chosen among which: all that is stored of a report beside its trials."""
        models = {measured.model.name: measured.model.to_json() for measured in self.models}
        parts = [
            {
                "title": part.sampler,
                "sampler": None if part.second is None else dataclasses.asdict(part.second),
                "images": part.models[0].images,
                "seeds": list(part.models[0].seeds),
            }
            for part in self.parts
        ]
        return {
            "answer": self.answer,
            "had": list(self.had),
            "found": dict(self.found),
            "models": models,
            "parts": parts,
            "entrants": dict(self.entrants),
            "rounds": [list(of_round) for of_round in self.rounds],
            "evaluations": dict(self.evaluations),
            "top": self.top,
            "warnings": list(self.warnings),
        }

    @property
    def models(self) -> tuple[Measurement, ...]:
        """In the sampler of the searches."""
        return self.parts[0].models

    @property
    def images(self) -> int:
        """How many each model has sampled of each group of noise; 0 where the objective samples none."""
        return self.models[0].images

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of the groups of noise."""
        return self.models[0].seeds

    def measured(self, name: str | None) -> Measurement | None:
        """What was measured of a model in the sampler of the searches."""
        if name is None:
            return None
        return self.parts[0].measured(name)

    @property
    def of_answer(self) -> Measurement:
        """What was measured of the answer."""
        measured = self.measured(self.answer)
        assert measured is not None  # there is no report without it
        return measured

    @property
    def is_found(self) -> bool:
        """Whether a search found the answer, and the user did not have it before."""
        return self.answer not in self.had

    def of_study(self, study: str) -> Measurement | None:
        """The best model of a search; ``None`` if the search had no result when the report was made."""
        return self.measured(self.found.get(study))

    @property
    def best_found(self) -> Measurement | None:
        """What has the lowest loss of all that searches found; ``None`` if only grids were tried.

        What a grid lists, averages and checkpoints, the user had.
        """
        of_searches = [name for study, name in self.found.items() if split_name(study)[1] not in BASELINES]
        measured = [model for model in self.models if model.model.name in of_searches]
        return min(measured, key=lambda model: model.loss, default=None)

    @property
    def ema(self) -> Measurement | None:
        """EMA*, the best plain average of the checkpoints; ``None`` if no grid of averages was tried."""
        return self.measured(EMA)

    def rows(self, name: str, against: str | None = None, *, part: int = 0) -> tuple[MetricRow, ...]:
        """The metrics of a model, each compared with a baseline's; empty if the model was not measured there."""
        measured = self.parts[part].measured(name)
        if measured is None:
            return ()
        baseline = None
        if against is not None:
            baseline = self.parts[part].measured(against)
        return metric_rows(measured, baseline, reported=self.metrics, sign=self.sign)

    def row(self, metric: str, name: str, against: str | None = None) -> MetricRow | None:
        """One metric of a model, as :meth:`rows` has it; ``None`` where it has no row of its own."""
        return next((row for row in self.rows(name, against) if row.metric == metric), None)

    @property
    def headline_metric(self) -> str:
        """What a sentence about the answer names: FID in the first features that have it, else the first metric.

        FID can be compared between experiments, unlike ``fdr``. The first metric of a score is the score itself.
        ``loss`` if only that was measured.
        """
        metrics = self.of_answer.metrics
        fids = [name for name in metrics if name.partition("@")[0] == "fid"]
        return next(iter(fids or metrics), "loss")

    def best_had(self, metric: str) -> Measurement | None:
        """The best in this metric of what the user had; ``None`` if it was measured of none of these."""
        sign = self.direction(metric)
        had = [measured for measured in self.models if measured.model.name in self.had and metric in measured.values]
        return min(had, key=lambda measured: sign * statistics.fmean(measured.values[metric]), default=None)

    def direction(self, metric: str) -> int:
        """1 if lower values of a metric are better, −1 if higher are; where that is not known, 1, as for a distance."""
        if metric in self.metrics.signs:
            return self.metrics.signs[metric]
        return directions(self.of_answer, self.metrics, self.sign).get(metric) or 1

    def costs(self, name: str, against: str) -> list[MetricRow]:
        """The metrics, the loss aside, in which a model is worse than another one by more than the error."""
        return [row for row in self.rows(name, against)[1:] if row.lost]

    def shown(self, measured: Measurement) -> float:
        """A loss as the user knows it: a maximized score has no minus sign."""
        return self.sign * measured.loss


@dataclasses.dataclass(frozen=True)
class ReportPlan:
    """How a report is made.

    Attributes:
        images: how many each model samples of each group of noise; 0 if the objective samples none.
        top: how many trials of all searches together are compared on the noise of the choice; each search has one.
        seeds: of the groups of held-out noise.
    """

    images: int
    top: int
    seeds: tuple[int, ...] = (0,)

    @classmethod
    def of(cls, held_out: HeldOutSpec, report: Report | None, *, own_images: int | None, samples: bool) -> ReportPlan:
        """What a study file asks for. A report that has more images or trials, or other groups of noise, keeps these.

        Args:
            held_out: of the study file.
            report: the one that is stored.
            own_images: the objective's own number, if it has one.
            samples: whether the objective samples images or items.
        """
        images = 0
        if samples:
            images = held_out.images_with(own_images)
        if report is None:
            return cls(images, held_out.top)
        return cls(max(images, report.images), max(held_out.top, report.top), report.seeds)
