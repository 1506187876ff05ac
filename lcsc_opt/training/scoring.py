"""How the samples of objectives that are trained here are scored, by networks that are trained here, too."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

from pydantic import Field
from torch import Tensor

from lcsc_opt.base.errors import MetricError
from lcsc_opt.base.settings import FrozenModel
from lcsc_opt.metrics import Scores, View
from lcsc_opt.metrics.extractors.base import FeatureExtractor
from lcsc_opt.metrics.judges import known_features
from lcsc_opt.metrics.keeping import kept_metric
from lcsc_opt.metrics.loss import why_no_gradient
from lcsc_opt.metrics.names import CROSS_CHECK, INCEPTION, MetricName, parse_loss, parse_names
from lcsc_opt.metrics.scores import CrossCheckSpace
from lcsc_opt.training.classifier import view_of


class ScoredImages(FrozenModel):
    """``loss``, ``metrics``, ``held_out_metrics`` and ``keep``, as for all objectives over images, and ``data``.

    ``data: half`` trains on half of the images and leaves the other half held out, for judges.
    """

    loss: str | dict[str, float] = "fid"
    metrics: list[str] = Field(default_factory=list)
    held_out_metrics: list[str] | None = None
    keep: str | None = None
    data: Literal["all", "half"] = "all"

    def check(self) -> None:
        """Refuse metrics that :meth:`scores` would refuse.

        Raises:
            MetricError: a metric is not known, needs another network, or cannot be kept.
        """
        loss = parse_loss(self.loss)
        metrics = [*loss, *parse_names([*self.metrics, *(self.held_out_metrics or ())])]
        for metric in [*metrics, *([] if self.keep is None else [kept_metric(self.keep, loss)])]:
            if metric.extractor != INCEPTION:
                raise MetricError(f"{metric}: digits and crops are seen by one network here; leave out what follows @")

    def why_no_gradient(self) -> str | None:
        """Why the loss has no gradient, as one clause; ``None`` if it has one."""
        return why_no_gradient(parse_loss(self.loss))

    def seen(self, images: Tensor) -> Tensor:
        """The real images ``[n, C, H, W]`` that training and loss may look at."""
        return images if self.data == "all" else images[::2]

    def unseen(self, images: Tensor) -> Tensor:
        """The other images; none if all are seen."""
        return images[:0] if self.data == "all" else images[1::2]

    def key(self, training: str) -> str:
        """The key ``training``, extended by the data that the training sees."""
        return training if self.data == "all" else f"{training}-{self.data}"

    def scores(self, extractor: FeatureExtractor, images: Tensor, cross_check: Callable[[], View]) -> Scores:
        """Metrics in the features of ``extractor``, against the part of ``images`` that is :meth:`seen`."""
        return Scores(
            {INCEPTION: self._view(extractor, images)},
            loss=self.loss,
            metrics=self.metrics,
            held_out_metrics=self.held_out_metrics or (),
            keep=self.keep,
            cross_check=CrossCheckSpace(
                MetricName("fid", CROSS_CHECK), lambda: self._view(cross_check().extractor, images)
            ),
            judge_reference=known_features if self.held_out_metrics is None else None,
        )

    def _view(self, extractor: FeatureExtractor, images: Tensor) -> View:
        view = view_of(extractor, self.seen(images))
        if view.reference is None or not len(unseen := self.unseen(images)):
            return view
        held_out = view_of(extractor, unseen).reference
        return View(extractor, dataclasses.replace(view.reference, held_out=held_out))
