"""Judges: metrics of a search's answer compared with those of EMA*; plain data for reports.

A judge is a metric of held-out reports that is not the loss. A loss can fall while single images get worse. The
cross-check is a judge in features that the search did not see.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

_OF_SINGLE_IMAGES = ("precision", "near", "hinge")  # the metrics that keep: precision guards
_SINGLE_GROUP_NOISE = 0.02  # of the baseline's value; with one group, which has no spread, a smaller change is noise


@dataclasses.dataclass(frozen=True)
class Judge:
    """One metric of a study's answer on held-out noise, compared with the baseline's.

    Attributes:
        metric: its name.
        sign: 1 where lower is better, -1 where higher is.
        value: mean over the groups of noise.
        spread: the sample standard deviation over the groups, or ``None`` if there is one group.
        against: the name of the baseline, measured on the same noise, or ``None``.
        baseline: the baseline's value.
        baseline_spread: its sample standard deviation over the groups.
        gain: how much better the answer is than the baseline, in the metric's unit; negative where it is worse.
        gain_spread: the sample standard deviation of the gain over the groups of noise.
        lost: whether the answer is worse by more than ``gain_spread``. Where that is not known, by more than 2 % of the
            baseline's value. Never where it is as good as real images.
        floor: the value of held-out real images, or ``None`` if none are held out.
    """

    metric: str
    sign: int
    value: float
    spread: float | None = None
    against: str | None = None
    baseline: float | None = None
    baseline_spread: float | None = None
    gain: float | None = None
    gain_spread: float | None = None
    lost: bool = False
    floor: float | None = None

    @classmethod
    def parse_all(cls, stored: Any) -> tuple[Judge, ...]:
        """The part ``judges`` of a held-out report; none where there is none."""
        known = {field.name for field in dataclasses.fields(cls)}
        return tuple(cls(**{key: value for key, value in one.items() if key in known}) for one in stored or ())

    @property
    def text(self) -> str:
        """The change from the baseline: ``precision 0.615 → 0.557``."""
        return f"{self.metric} {self.baseline:.4g} → {self.value:.4g}"


def judges_of(
    report: Mapping[str, Any], signs: Mapping[str, int], against: str | None, floors: Mapping[str, float]
) -> tuple[Judge, ...]:
    """The judges of a held-out report.

    Args:
        report: with ``metrics``, ``groups``, ``baselines``.
        signs: judge → 1, or -1 where higher is better.
        against: the baseline's name.
        floors: metric → value of held-out real images.
    """
    found = []
    for metric, sign in signs.items():
        if metric not in report["metrics"]:
            continue
        value, spread = _value(report, metric)
        judge = Judge(metric, sign, value, spread, floor=floors.get(metric))
        if (baseline := _baseline_of(report, metric, against)) is not None:
            gain = _Gain.of(report, baseline, metric, sign)
            before = _value(baseline, metric)
            judge = dataclasses.replace(
                judge,
                against=against,
                baseline=before[0],
                baseline_spread=before[1],
                gain=gain.mean,
                gain_spread=gain.spread,
                lost=gain.lost and not _as_good_as_real(judge),
            )
        found.append(judge)
    return tuple(found)


def _as_good_as_real(judge: Judge) -> bool:
    return judge.floor is not None and judge.sign * judge.value <= judge.sign * judge.floor


@dataclasses.dataclass(frozen=True)
class _Gain:
    """How much better a number is than a baseline's: ``mean``, and ``spread`` over ``groups`` of noise if known."""

    mean: float
    baseline: float
    spread: float | None
    groups: int

    @classmethod
    def of(cls, report: Mapping[str, Any], baseline: Mapping[str, Any], metric: str | None, sign: int = 1) -> _Gain:
        """The gain in a metric or in the loss. The spread is that of differences on the same noise."""
        theirs = {group["seed"]: group for group in baseline.get("groups") or ()}
        pairs = [(group, theirs[group["seed"]]) for group in report.get("groups") or () if group["seed"] in theirs]
        differences = [sign * (_number(beside, metric) - _number(group, metric)) for group, beside in pairs]
        spread = statistics.stdev(differences) if len(differences) > 1 else None
        before = _number(baseline, metric)
        return cls(sign * (before - _number(report, metric)), before, spread, len(differences))

    @property
    def certain(self) -> bool:
        """Whether it is a gain, and larger than its spread where that is known."""
        return self.mean > (self.spread or 0.0)

    @property
    def lost(self) -> bool:
        """Whether it is a loss beyond noise."""
        noise = _SINGLE_GROUP_NOISE * abs(self.baseline) if self.spread is None else self.spread
        return self.mean < -noise

    @property
    def share(self) -> float | None:
        """The gain as a share of the baseline's number, or ``None`` if one of the two is not positive."""
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


def _baseline_of(report: Mapping[str, Any], metric: str, name: str | None) -> Mapping[str, Any] | None:
    """The baseline of that name in a held-out report, or ``None`` if the metric was not measured for it."""
    found: Mapping[str, Any] | None = (report.get("baselines") or {}).get(name)
    return found if found is not None and metric in found["metrics"] else None


def _value(result: Mapping[str, Any], metric: str) -> tuple[float, float | None]:
    return float(result["metrics"][metric]), (result.get("metrics_std") or {}).get(metric)


def _number(result: Mapping[str, Any], metric: str | None) -> float:
    return float(result["loss"] if metric is None else result["metrics"][metric])


@dataclasses.dataclass(frozen=True)
class CrossCheck:
    """A study's answer on held-out noise, in features that its loss does not see.

    Attributes:
        metric: its name; lower is better.
        value: mean over the groups of noise.
        against: the name of the baseline, measured on the same noise, or ``None``.
        gain: of the loss: 0.6 is 60 % below the baseline's, -0.1 is 10 % above. ``None`` if one of the two is not
            positive: then a share means nothing.
        cross_check_gain: the same of ``metric``.
        gain_spread: the sample standard deviation of ``gain`` over the noise seeds, each against the baseline on the
            same noise, or ``None`` if there is one seed.
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
        """The part ``cross_check`` of a held-out report, or ``None``."""
        if not isinstance(stored, Mapping) or "value" not in stored:
            return None
        known = {field.name for field in dataclasses.fields(cls)}
        found = {name: value for name, value in stored.items() if name in known}
        return cls(**{**found, "metric": str(stored.get("metric")), "value": float(stored["value"])})

    @property
    def text(self) -> str | None:
        """How the loss and the metric differ from the baseline's, in one line; as in tables, a gain is negative.

        ``None`` if one of the gains is not known.
        """
        if self.gain is None or self.cross_check_gain is None:
            return None
        loss, cross_check = (
            _percent(-self.gain, self.gain_spread),
            _percent(-self.cross_check_gain, self.cross_check_gain_spread),
        )
        return f"against {self.against}: loss {loss}, {self.metric} {cross_check}"


def cross_check_of(report: Mapping[str, Any], metric: str, against: str | None) -> CrossCheck | None:
    """The cross-check of a held-out report, against one of its ``baselines``.

    ``None`` if the metric was not measured.
    """
    value = report["metrics"].get(metric)
    if value is None:
        return None
    baseline = _baseline_of(report, metric, against)
    if baseline is None:
        return CrossCheck(metric, value)
    found = _Gain.of(report, baseline, None), _Gain.of(report, baseline, metric)
    return CrossCheck(metric, value, against, *(gain.share for gain in found), *(gain.spread_share for gain in found))


def warning_of(
    report: Mapping[str, Any], cross_check: CrossCheck | None, judges: Sequence[Judge] = (), *, kept: bool = False
) -> str | None:
    """One line where the loss is below the baseline's, but the cross-check is not, or a judge is worse; else ``None``.

    With several groups of noise, a gain of the cross-check that is within its spread does not count. ``kept`` is
    whether the search has kept a metric already.
    """
    doubts = doubted(report, cross_check, judges)
    if not doubts:
        return None
    against = _against(cross_check, judges)
    loss = _Gain.of(report, report["baselines"][against], None)
    own = None if cross_check is None else cross_check.metric
    clauses = [judge.text for judge in judges if judge.metric in doubts and judge.metric != own]
    doubt = "what it gained there it lost here; compare the images of both before you use it"
    if not kept and any(name.partition("@")[0] in _OF_SINGLE_IMAGES for name in doubts):
        doubt += ", or search with keep: precision"
    if own in doubts:
        other = _Gain.of(report, report["baselines"][against], own)
        clauses = [f"{own} {other.text()}", *clauses]
        doubt = "this may please the loss's own features and no eye; compare the images of both before you use it"
    if not loss.certain:
        doubt = "neither is a certain gain; measure with more --groups, or search on"
    return f"the loss is {loss.text(whose=against)}, but {' and '.join(clauses)}: {doubt}"


def doubted(report: Mapping[str, Any], cross_check: CrossCheck | None, judges: Sequence[Judge] = ()) -> tuple[str, ...]:
    """The metrics that did not improve with the loss; none where the loss is not below the baseline's."""
    against = _against(cross_check, judges)
    baseline = (report.get("baselines") or {}).get(against)
    if baseline is None or _Gain.of(report, baseline, None).mean <= 0:
        return ()
    own = None if cross_check is None else cross_check.metric
    cheated = own is not None and own in baseline["metrics"] and not _Gain.of(report, baseline, own).certain
    lost = [judge.metric for judge in judges if judge.lost and judge.metric != own]
    return (*([own] if cheated and own is not None else []), *lost)


def _against(cross_check: CrossCheck | None, judges: Sequence[Judge]) -> str | None:
    return next((one.against for one in (cross_check, *judges) if one is not None and one.against is not None), None)


def _percent(share: float, spread: float | None) -> str:
    return f"{100 * share:+.1f}{'' if spread is None else f' ± {100 * spread:.1f}'} %"
