"""Whether what a search gained shows in a second feature space, too: plain data for reports."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Second:
    """A study's answer in features that its loss does not look at, on held-out noise.

    Attributes:
        metric: its name; lower is better.
        value: mean over the groups of noise.
        against: what the gains are over, on the same noise; ``None`` where there is no baseline.
        gain: how far the loss is below that baseline's, as a share of it: 0.6 is 60 % below, -0.1 is 10 % above.
            ``None`` where a share means nothing, since one of the two is not positive.
        second_gain: the same of ``metric``.
    """

    metric: str
    value: float
    against: str | None = None
    gain: float | None = None
    second_gain: float | None = None

    @classmethod
    def parse(cls, stored: Any) -> Second | None:
        """The part ``second`` of a held-out report; ``None`` where there is none."""
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
        if self.gain is None or self.second_gain is None:
            return None
        return f"against {self.against}: loss {_percent(-self.gain)}, {self.metric} {_percent(-self.second_gain)}"


def second_of(report: Mapping[str, Any], metric: str, against: str | None) -> Second | None:
    """What a held-out report says of the second metric, beside one of its ``baselines``.

    ``None`` where the metric was not measured.
    """
    value = report["metrics"].get(metric)
    if value is None:
        return None
    baseline = _baseline(report, metric, against)
    if baseline is None:
        return Second(metric, value)
    gains = _gain(report["loss"], baseline["loss"]), _gain(value, baseline["metrics"][metric])
    return Second(metric, value, against, *gains)


def warning_of(report: Mapping[str, Any], second: Second | None) -> str | None:
    """One line where the loss is below the baseline's and the second metric is not; else ``None``."""
    baseline = None if second is None else _baseline(report, second.metric, second.against)
    if second is None or baseline is None:
        return None
    before = baseline["metrics"][second.metric]
    if report["loss"] >= baseline["loss"] or second.value < before:
        return None
    return (
        f"the loss is {_beside(report['loss'], baseline['loss'], second.gain)} {second.against}'s, but {second.metric} "
        f"{_beside(second.value, before, second.second_gain)}: this may please the loss's own features and no eye; "
        "compare the images of both before you use it"
    )


def _baseline(report: Mapping[str, Any], metric: str, name: str | None) -> Mapping[str, Any] | None:
    found: Mapping[str, Any] | None = (report.get("baselines") or {}).get(name)
    return found if found is not None and metric in found["metrics"] else None


def _gain(value: float, baseline: float) -> float | None:
    return (baseline - value) / baseline if baseline > 0 and value > 0 else None


def _beside(value: float, baseline: float, gain: float | None) -> str:
    where = "below" if value < baseline else "above" if value > baseline else "equal to"
    return where if gain is None or value == baseline else f"{100 * abs(gain):.1f} % {where}"


def _percent(share: float) -> str:
    return f"{100 * share:+.1f} %"
