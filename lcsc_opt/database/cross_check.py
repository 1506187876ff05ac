"""Whether what a search gained shows in features that it did not look at, too: plain data for reports."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class CrossCheck:
    """A study's answer in features that its loss does not look at, on held-out noise.

    Attributes:
        metric: its name; lower is better.
        value: mean over the groups of noise.
        against: what the gains are over, on the same noise; ``None`` where there is no baseline.
        gain: how far the loss is below that baseline's, as a share of it: 0.6 is 60 % below, -0.1 is 10 % above.
            ``None`` where a share means nothing, since one of the two is not positive.
        cross_check_gain: the same of ``metric``.
        gain_spread: the sample standard deviation of ``gain`` over the groups of noise, each beside the baseline on the
            same noise; ``None`` where there is one group.
        cross_check_gain_spread: the same of ``cross_check_gain``.
    """

    metric: str
    value: float
    against: str | None = None
    gain: float | None = None
    cross_check_gain: float | None = None
    gain_spread: float | None = None
    cross_check_gain_spread: float | None = None

    @classmethod
    def parse(cls, stored: Any) -> CrossCheck | None:
        """The part ``cross_check`` of a held-out report; ``None`` where there is none."""
        if not isinstance(stored, Mapping) or "value" not in stored:
            return None
        known = {field.name for field in dataclasses.fields(cls)}
        found = {name: value for name, value in stored.items() if name in known}
        return cls(**{**found, "metric": str(stored.get("metric")), "value": float(stored["value"])})

    @property
    def text(self) -> str | None:
        """Both beside the baseline's, in one line and with the signs of tables: a gain is negative.

        ``None`` where one of them is not known.
        """
        if self.gain is None or self.cross_check_gain is None:
            return None
        loss, cross_check = (
            _percent(-self.gain, self.gain_spread),
            _percent(-self.cross_check_gain, self.cross_check_gain_spread),
        )
        return f"against {self.against}: loss {loss}, {self.metric} {cross_check}"


def cross_check_of(report: Mapping[str, Any], metric: str, against: str | None) -> CrossCheck | None:
    """What a held-out report says of the cross-check, beside one of its ``baselines``.

    ``None`` where the metric was not measured.
    """
    value = report["metrics"].get(metric)
    if value is None:
        return None
    baseline = _baseline(report, metric, against)
    if baseline is None:
        return CrossCheck(metric, value)
    found = _Gain.of(report, baseline, None), _Gain.of(report, baseline, metric)
    return CrossCheck(metric, value, against, *(gain.share for gain in found), *(gain.spread_share for gain in found))


def warning_of(report: Mapping[str, Any], cross_check: CrossCheck | None) -> str | None:
    """One line where the loss is below the baseline's and the cross-check is not; else ``None``.

    Where several groups of noise were measured, a gain of the cross-check within its spread over them is none.
    """
    baseline = None if cross_check is None else _baseline(report, cross_check.metric, cross_check.against)
    if cross_check is None or baseline is None:
        return None
    loss, other = _Gain.of(report, baseline, None), _Gain.of(report, baseline, cross_check.metric)
    if loss.mean <= 0 or other.certain:
        return None
    doubt = "this may please the loss's own features and no eye; compare the images of both before you use it"
    if not loss.certain:
        doubt = "neither is a certain gain; measure with more --groups, or search on"
    return f"the loss is {loss.text(whose=cross_check.against)}, but {cross_check.metric} {other.text()}: {doubt}"


@dataclasses.dataclass(frozen=True)
class _Gain:
    """How far a number is below a baseline's: ``mean``, and ``spread`` over ``groups`` of noise where it is known."""

    mean: float
    baseline: float
    spread: float | None
    groups: int

    @classmethod
    def of(cls, report: Mapping[str, Any], baseline: Mapping[str, Any], metric: str | None) -> _Gain:
        """Of a metric, or of the loss; the spread is of differences on the same noise."""
        theirs = {group["seed"]: group for group in baseline.get("groups") or ()}
        pairs = [(group, theirs[group["seed"]]) for group in report.get("groups") or () if group["seed"] in theirs]
        differences = [_number(beside, metric) - _number(group, metric) for group, beside in pairs]
        spread = statistics.stdev(differences) if len(differences) > 1 else None
        before = _number(baseline, metric)
        return cls(before - _number(report, metric), before, spread, len(differences))

    @property
    def certain(self) -> bool:
        """Whether it is a gain, and larger than its spread where that is known."""
        return self.mean > (self.spread or 0.0)

    @property
    def share(self) -> float | None:
        """Of the baseline's number; ``None`` where one of the two is not positive, and a share means nothing."""
        return self.mean / self.baseline if self.baseline > 0 and self.mean < self.baseline else None

    @property
    def spread_share(self) -> float | None:
        """The spread in the unit of :attr:`share`."""
        return None if self.spread is None or self.share is None else self.spread / self.baseline

    def text(self, whose: str | None = None) -> str:
        """``3.1 % below EMA*'s``, and whether that is within the spread."""
        where = "below" if self.mean > 0 else "above" if self.mean < 0 else "the same"
        far = "" if self.share is None or not self.mean else f"{100 * abs(self.share):.1f} % "
        within = self.spread is not None and abs(self.mean) <= self.spread
        note = f", within its spread over {self.groups} groups of noise" if within else ""
        beside = f" {whose}'s" if whose else ""
        return f"{far}{where}{beside}{note}"


def _number(result: Mapping[str, Any], metric: str | None) -> float:
    return float(result["loss"] if metric is None else result["metrics"][metric])


def _baseline(report: Mapping[str, Any], metric: str, name: str | None) -> Mapping[str, Any] | None:
    found: Mapping[str, Any] | None = (report.get("baselines") or {}).get(name)
    return found if found is not None and metric in found["metrics"] else None


def _percent(share: float, spread: float | None) -> str:
    return f"{100 * share:+.1f}{'' if spread is None else f' ± {100 * spread:.1f}'} %"
