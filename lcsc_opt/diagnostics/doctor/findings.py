"""What a check says, and the kinds of findings that ``--repair`` has an answer to."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

Severity = Literal["problem", "note"]

LEASE = "dead lease"
TELL_INDEX = "tell_index"
SEARCH_ENDED = "search_ended"
HELD_OUT = "held_out"
ORPHAN_FILE = "orphan file"
REPAIRABLE = (LEASE, TELL_INDEX, SEARCH_ENDED, HELD_OUT, ORPHAN_FILE)

NO_REPAIR = "cannot be repaired"
NOTHING = "nothing to do"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that a check noticed.

    Attributes:
        kind: which check; the kinds in ``REPAIRABLE`` can be repaired.
        severity: a problem stands in the way of continuing or of trusting a study, a note does not.
        text: one line that says what is there.
        advice: what ``--repair`` would do, or what to do otherwise.
        study: its name; ``None`` for what belongs to the database.
        trial: its number.
        file: the artifact's, where it is about one.
    """

    kind: str
    severity: Severity
    text: str
    advice: str = NO_REPAIR
    study: str | None = None
    trial: int | None = None
    file: str | None = None

    @property
    def repairable(self) -> bool:
        """Whether ``--repair`` does something about it."""
        return self.kind in REPAIRABLE

    def as_row(self) -> dict[str, Any]:
        """What ``lcsc doctor --format json`` prints of it."""
        return {**dataclasses.asdict(self), "repairable": self.repairable}


def shown(numbers: Iterable[int]) -> str:
    """The first few numbers, and how many more there are."""
    listed = sorted(numbers)
    more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
    return ", ".join(str(number) for number in listed[:8]) + more
