"""Who is ahead, in one line."""

from __future__ import annotations

from collections.abc import Sequence

from lcsc_opt.views.ranking import Ranked

ALIKE = "not distinguishable"


def headline(ranked: Sequence[Ranked], metric: str = "loss") -> str:
    """The winner of an experiment, how far below EMA* it is, and who may be as good; plain text.

    Args:
        ranked: the best first.
        metric: what the loss is called.
    """
    known = [row for row in ranked if row.held_out is not None]
    if not known:
        return _searched(ranked, metric)
    first = known[0]
    assert first.held_out is not None
    mean, deviation = first.held_out
    spread = "" if deviation is None else f" ± {deviation:.2g}"
    line = f"{first.label} is ahead: held-out {metric} {mean:.4g}{spread}{_against_ema(first)}{_doubt(first)}"
    close = [row.label for row in known[1:] if row.verdict == ALIKE]
    if close:
        return f"{line}; {_listed(close)} not distinguishable over {first.seeds} seeds"
    if len(known) > 1 and first.seeds == 1:
        return f"{line}; one seed each, so this may be chance"
    return line


def _searched(ranked: Sequence[Ranked], metric: str) -> str:
    known = [row for row in ranked if row.searched is not None]
    if not known:
        return "No result yet."
    first = min(known, key=lambda row: row.searched or (0.0, None))
    assert first.searched is not None
    return (
        f"{first.label} is ahead so far: searched {metric} {first.searched[0]:.4g}; "
        "held-out values come at the end of a search, or with lcsc evaluate STUDY"
    )


def _against_ema(row: Ranked) -> str:
    if not row.below_ema or row.label == "EMA*":
        return ""
    return f", {abs(100 * row.below_ema):.0f} % {'below' if row.below_ema < 0 else 'above'} EMA*"


def _doubt(row: Ranked) -> str:
    """That the gain may be in the loss's own features only."""
    if not row.doubtful:
        return ""
    where = "" if row.seeds == 1 else f" in {row.doubtful} of {row.seeds} seeds"
    return f" (but {row.second_metric or 'the second metric'} gained nothing{where}: compare the images)"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
