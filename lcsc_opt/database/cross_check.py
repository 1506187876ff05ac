"""Cross-checks: whether a search's gain also shows in features that it did not see; plain data for reports."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lcsc_opt.database.judges import Gain, Judge, baseline_of

OF_SINGLE_IMAGES = ("precision", "near", "hinge")  # the metrics that keep: precision guards


@dataclasses.dataclass(frozen=True)
class CrossCheck:
    """A study's answer on held-out noise, in features that its loss does not see.

    Attributes:
        metric: its name; lower is better.
        value: mean over the groups of noise.
        against: the name of the baseline, measured on the same noise; ``None`` where there is none.
        gain: of the loss: 0.6 is 60 % below the baseline's, -0.1 is 10 % above. ``None`` where one of the two is not
            positive: then a share means nothing.
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
        """How the loss and the metric differ from the baseline's, in one line; as in tables, a gain is negative.

        ``None`` where one of the gains is not known.
        """
        if self.gain is None or self.cross_check_gain is None:
            return None
        loss, cross_check = (
            _percent(-self.gain, self.gain_spread),
            _percent(-self.cross_check_gain, self.cross_check_gain_spread),
        )
        return f"against {self.against}: loss {loss}, {self.metric} {cross_check}"


def cross_check_of(report: Mapping[str, Any], metric: str, against: str | None) -> CrossCheck | None:
    """The cross-check of a held-out report, beside one of its ``baselines``.

    ``None`` where the metric was not measured.
    """
    value = report["metrics"].get(metric)
    if value is None:
        return None
    baseline = baseline_of(report, metric, against)
    if baseline is None:
        return CrossCheck(metric, value)
    found = Gain.of(report, baseline, None), Gain.of(report, baseline, metric)
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
    loss = Gain.of(report, report["baselines"][against], None)
    own = None if cross_check is None else cross_check.metric
    clauses = [judge.text for judge in judges if judge.metric in doubts and judge.metric != own]
    doubt = "what it gained there it lost here; compare the images of both before you use it"
    if not kept and any(name.partition("@")[0] in OF_SINGLE_IMAGES for name in doubts):
        doubt += ", or search with keep: precision"
    if own in doubts:
        other = Gain.of(report, report["baselines"][against], own)
        clauses = [f"{own} {other.text()}", *clauses]
        doubt = "this may please the loss's own features and no eye; compare the images of both before you use it"
    if not loss.certain:
        doubt = "neither is a certain gain; measure with more --groups, or search on"
    return f"the loss is {loss.text(whose=against)}, but {' and '.join(clauses)}: {doubt}"


def doubted(report: Mapping[str, Any], cross_check: CrossCheck | None, judges: Sequence[Judge] = ()) -> tuple[str, ...]:
    """The metrics that did not improve with the loss; none where the loss is not below the baseline's."""
    against = _against(cross_check, judges)
    baseline = (report.get("baselines") or {}).get(against)
    if baseline is None or Gain.of(report, baseline, None).mean <= 0:
        return ()
    own = None if cross_check is None else cross_check.metric
    cheated = own is not None and own in baseline["metrics"] and not Gain.of(report, baseline, own).certain
    lost = [judge.metric for judge in judges if judge.lost and judge.metric != own]
    return (*([own] if cheated and own is not None else []), *lost)


def _against(cross_check: CrossCheck | None, judges: Sequence[Judge]) -> str | None:
    return next((one.against for one in (cross_check, *judges) if one is not None and one.against is not None), None)


def _percent(share: float, spread: float | None) -> str:
    return f"{100 * share:+.1f}{'' if spread is None else f' ± {100 * spread:.1f}'} %"
